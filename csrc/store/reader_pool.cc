#include "store/reader_pool.h"

#include <thread>
#include <vector>

#include "base/error.h"
#include "base/mutex.h"
#include "store/io_scratch.h"

namespace sluice {
namespace {

// The bounce buffers of one session stay within this (and their alignment).
constexpr std::size_t kMaxBounceBytes = 16 * kMiB;

struct Job {
  std::uint64_t token = 0;
  ExpertKey key{};
  std::int32_t chunk = 0;
  std::byte* slot = nullptr;
  EventHandle last_use{};
};

// First in, first out, in one buffer that stops growing once it has held the longest queue.
class JobQueue {
 public:
  JobQueue() { jobs_.reserve(256); }
  [[nodiscard]] bool empty() const { return head_ == jobs_.size(); }
  void push(const Job& job) {
    if (empty()) {
      jobs_.clear();
      head_ = 0;
    } else if (jobs_.size() == jobs_.capacity() && head_ > 0) {
      jobs_.erase(jobs_.begin(), jobs_.begin() + static_cast<std::ptrdiff_t>(head_));
      head_ = 0;
    }
    jobs_.push_back(job);
  }
  Job pop() { return jobs_[head_++]; }

 private:
  std::vector<Job> jobs_;
  std::size_t head_ = 0;
};

}  // namespace

struct ReaderPool::Impl {
  std::shared_ptr<const ExpertStore> store;
  Done done;
  Await await;
  std::vector<IoScratch> scratches;
  Mutex mu;
  CondVar changed;
  JobQueue queue GUARDED_BY(mu);
  bool closing GUARDED_BY(mu) = false;
  Mutex join_mu;
  std::vector<std::jthread> threads GUARDED_BY(join_mu);

  // Takes the oldest job; false when the pool closes and none is left.
  bool take(Job& job) EXCLUDES(mu) {
    const MutexLock lock(mu);
    while (queue.empty()) {
      if (closing) return false;
      changed.wait(mu);
    }
    job = queue.pop();
    return true;
  }

  void work(IoScratch& scratch) {
    Job job;
    while (take(job)) {
      std::exception_ptr error;
      std::uint64_t bytes_read = 0;
      try {
        if (job.last_use != EventHandle{}) await(job.last_use);
        store->read(job.key, job.chunk, job.slot, scratch, &bytes_read);
      } catch (...) {
        error = std::current_exception();
      }
      done(job.token, std::move(error), bytes_read);
    }
  }
};

ReaderPool::ReaderPool(std::shared_ptr<const ExpertStore> store, int num_threads, Done done,
                       Await await)
    : impl_(std::make_unique<Impl>()) {
  const std::size_t largest = store->largest_read_bytes();
  require<ConfigError>(
      num_threads >= 1 && num_threads <= 64 &&
          static_cast<std::size_t>(num_threads) * align_down(largest, kDirectAlignment) <=
              kMaxBounceBytes + static_cast<std::size_t>(num_threads) * 2 * kDirectAlignment,
      [&] {
        return "io_threads: got " + std::to_string(num_threads) + " with reads of " +
               std::to_string(largest) +
               " bytes, expected 1 to 64 threads whose reads fit 16 MiB together; lower io_threads "
               "or chunk_bytes";
      });
  impl_->store = std::move(store);
  impl_->done = std::move(done);
  impl_->await = std::move(await);
  for (int i = 0; i < num_threads; ++i) impl_->scratches.emplace_back(largest);
  try {
    const MutexLock lock(impl_->join_mu);
    for (IoScratch& scratch : impl_->scratches) {
      impl_->threads.emplace_back([impl = impl_.get(), &scratch] { impl->work(scratch); });
    }
  } catch (...) {  // no thread left in the process: those that run must end before they are joined
    close();
    throw;
  }
}

ReaderPool::~ReaderPool() { close(); }

void ReaderPool::start(std::uint64_t token, ExpertKey key, std::int32_t chunk, std::byte* slot,
                       EventHandle last_use) {
  require<InternalError>(last_use == EventHandle{} || impl_->await != nullptr, [] {
    return std::string(
        "reader pool: got a slot that a copy may still read, and nobody who waits for it");
  });
  {
    const MutexLock lock(impl_->mu);
    require<InternalError>(!impl_->closing, [] {
      return std::string("reader pool: got a chunk after close, expected none");
    });
    impl_->queue.push({token, key, chunk, slot, last_use});
  }
  impl_->changed.notify_one();
}

void ReaderPool::close() {
  {
    const MutexLock lock(impl_->mu);
    impl_->closing = true;
  }
  impl_->changed.notify_all();
  const MutexLock lock(impl_->join_mu);
  impl_->threads.clear();  // joins
}

int ReaderPool::num_threads() const noexcept { return static_cast<int>(impl_->scratches.size()); }

std::uint64_t ReaderPool::workspace_bytes() const noexcept {
  std::uint64_t total = 0;
  for (const IoScratch& scratch : impl_->scratches) total += scratch.bytes();
  return total;
}

}  // namespace sluice
