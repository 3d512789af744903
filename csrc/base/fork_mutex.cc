#include "base/fork_mutex.h"

#include <pthread.h>

#include <algorithm>
#include <vector>

namespace sluice {
namespace {

struct All {
  Mutex mu;
  std::vector<Mutex*> mutexes GUARDED_BY(mu);

  void before_fork() NO_THREAD_SAFETY_ANALYSIS {
    mu.lock();
    for (Mutex* const each : mutexes) each->lock();
  }
  void after_fork() NO_THREAD_SAFETY_ANALYSIS {
    for (Mutex* const each : mutexes) each->unlock();
    mu.unlock();
  }
};

All& all() {
  static All* const kAll = [] {
    auto* made = new All;  // never destroyed: others may be, after it
    pthread_atfork([] { all().before_fork(); }, [] { all().after_fork(); },
                   [] { all().after_fork(); });
    return made;
  }();
  return *kAll;
}

}  // namespace

ForkMutex::ForkMutex() {
  const MutexLock lock(all().mu);
  all().mutexes.push_back(this);
}

ForkMutex::~ForkMutex() {
  const MutexLock lock(all().mu);
  auto& mutexes = all().mutexes;
  mutexes.erase(std::find(mutexes.begin(), mutexes.end(), this));
}

}  // namespace sluice
