#include "base/fork_mutex.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

namespace sluice {
namespace {

TEST(ForkMutex, AChildFindsItFreeHoweverBusyTheParentWas) {
  ForkMutex mutex;
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) const MutexLock lock(mutex);
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(20);  // a child that hangs is killed by name
      const MutexLock lock(mutex);
      _exit(0);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "round " << i;
  }
  stop = true;
  busy.join();
}

TEST(ForkMutex, OneThatIsGoneIsNotTaken) {
  {
    const ForkMutex gone;
  }
  const pid_t child = fork();
  if (child == 0) _exit(0);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace sluice
