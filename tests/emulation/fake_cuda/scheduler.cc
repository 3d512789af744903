// Which step comes next, and on whose time.
#include <chrono>
#include <thread>

#include "tests/emulation/fake_cuda/baton.h"
#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"

namespace fake {

/// Device work runs on this thread: device pages are open in between its steps, unless the host's
/// own code runs.
class Driving {
 public:
  explicit Driving(Session& session) : runtime_(session.runtime) { ++runtime_.num_drivers; }
  ~Driving() {
    if (--runtime_.num_drivers == 0) runtime_.memory.close();
  }
  Driving(const Driving&) = delete;
  Driving& operator=(const Driving&) = delete;

 private:
  Runtime& runtime_;
};

namespace {

// A host thread may answer a polling kernel with a plain store, which nothing signals.
constexpr auto kPollPeriod = std::chrono::milliseconds(10);
// Random steps of a call: mostly none, or everything would be done nearly as soon as it is queued.
std::uint64_t num_random_steps(std::mt19937_64& rng) { return rng() % 4 == 0 ? 1 + rng() % 6 : 0; }

// One stream runs ahead of the others until another is favoured. Choosing anew at every step keeps
// streams abreast of each other, and hides the bugs that need one far ahead.
// Source: the idea of priorities that change at random moments is PCT's (Burckhardt et al., "A
// randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010).
constexpr int kStrayPeriod = 6;

bool runnable(const CUstream_st& stream) {
  return !stream.queue.empty() && !stream.running_host_function && !stream.stalled &&
         !stream.queue.front()->blocked();
}

// The stream whose head must run for `record` to come about.
CUstream_st* first_cause(const Record& record) {
  CUstream_st* stream = record.stream;
  while (!stream->queue.empty()) {
    const Record* const awaited = stream->queue.front()->awaited();
    if (awaited == nullptr || awaited->done) break;
    stream = awaited->stream;  // it was queued earlier: no cycles
  }
  return stream;
}

}  // namespace

cudaError_t Session::push(CUstream_st& stream, std::unique_ptr<Work> work) {
  if (const cudaError_t error = refuse_implicit(*this, stream); error != cudaSuccess) return error;
  if (stream.capture != nullptr) return append(*this, stream, std::move(work));
  for (auto& wait : legacy_waits(*this, stream)) {
    wait->record->stream = &stream;
    stream.queue.push_back(std::move(wait));
  }
  work->record->stream = &stream;
  stream.tail = work->record;
  stream.queue.push_back(std::move(work));

  Driving driving(*this);
  switch (runtime.options.policy) {
    case Policy::kEager:
      while (run_one(nullptr)) {
      }
      break;
    case Policy::kRandom:
      for (auto left = num_random_steps(runtime.rng); left > 0; --left) run_one(nullptr);
      break;
    case Policy::kLazy:
    case Policy::kAhead:
      break;
  }
  // What died in these steps died asynchronously: the next call tells.
  return cudaSuccess;
}

void Session::drive(std::vector<std::shared_ptr<Record>> records) {
  Driving driving(*this);
  for (;;) {
    std::erase_if(records, [](const auto& record) { return record == nullptr || record->done; });
    if (records.empty()) return;
    if (!run_one(records.front().get()) && !sleep_until_changed()) return;
    let_others_in();
  }
}

void Session::step_towards(const Record& record) {
  Driving driving(*this);
  (void)run_one(&record);
}

// One step that changed something; false when every stream waits.
bool Session::run_one(const Record* target) {
  while (CUstream_st* const stream = pick(target)) {
    const Work::Progress progress = step(*stream);
    if (progress == Work::Progress::kSpinning) {
      stream->stalled = true;
      continue;
    }
    if (progress == Work::Progress::kBlocked) continue;
    clear_stalls();
    ++runtime.activity;
    if (runtime.num_waiting > 0) runtime.changed.notify_all();
    return true;
  }
  return false;
}

CUstream_st* Session::pick(const Record* target) {
  CUstream_st* wanted = nullptr;
  if (target != nullptr && !target->done) {
    if (runtime.options.policy == Policy::kLazy) wanted = first_cause(*target);
    if (wanted != nullptr && runnable(*wanted)) return wanted;
  }
  // Any that can run; under kAhead the awaited stream itself comes last.
  std::vector<CUstream_st*> candidates;
  bool awaited_can_run = false;
  for (const auto& stream : runtime.streams) {
    if (!runnable(*stream)) continue;
    const bool awaited = runtime.options.policy == Policy::kAhead && target != nullptr &&
                         !target->done && target->stream == stream.get();
    awaited_can_run |= awaited;
    if (!awaited) candidates.push_back(stream.get());
  }
  if (candidates.empty()) return awaited_can_run ? target->stream : nullptr;
  CUstream_st* const chosen = candidates[runtime.rng() % candidates.size()];
  if (runtime.options.policy != Policy::kRandom) return chosen;
  if (runtime.favourite == nullptr || runtime.rng() % runtime.favour_period == 0) {
    runtime.favourite = chosen;
  }
  return runtime.rng() % kStrayPeriod != 0 && runnable(*runtime.favourite) ? runtime.favourite
                                                                           : chosen;
}

Work::Progress Session::step(CUstream_st& stream) {
  runtime.graveyard.clear();
  ++runtime.counts.steps;
  runtime.memory.open_for(stream.device);
  if (runtime.step_fault && runtime.step_fault->calls_left-- == 0) {
    const cudaError_t error = runtime.step_fault->error;
    runtime.step_fault.reset();
    ++runtime.num_injected;
    lose(runtime.devices.at(stream.device), error,
         std::string("injected ") + cudaGetErrorName(error) + " in " +
             stream.queue.front()->name() + " on " + stream.name());
    return Work::Progress::kFailed;
  }
  // The worst legal order of dependent launches: what may run before the grid ahead ends, does.
  Work* const head = stream.queue.front().get();
  if (head->is_grid() && stream.queue.size() > 1 && stream.queue[1]->step_early(*this, stream)) {
    return Work::Progress::kMore;
  }
  const Work::Progress progress = head->step(*this, stream);
  if (progress == Work::Progress::kDone) {
    head->record->done = true;
    head->record->done_us = runtime.counts.steps;
    stream.queue.pop_front();
  }
  return progress;
}

std::vector<std::shared_ptr<Record>> Session::tails(int device_ordinal) const {
  std::vector<std::shared_ptr<Record>> tails;
  for (const auto& stream : runtime.streams) {
    if (stream->device == device_ordinal) tails.push_back(stream->tail);
  }
  return tails;
}

void Session::lose(Device& lost, cudaError_t error, const std::string& why) {
  runtime.last_failure = why;
  if (lost.fault == cudaSuccess) lost.fault = error;
  for (const auto& stream : runtime.streams) {
    if (stream->device != lost.ordinal) continue;
    // Done, not forgotten: other devices' streams may wait for it.
    for (auto& work : stream->queue) {
      work->record->done = true;
      runtime.graveyard.push_back(std::move(work));
    }
    stream->queue.clear();
  }
}

// Every stream waits: for a host function, or for the host to answer a kernel that polls. False
// when nothing can change any more.
bool Session::sleep_until_changed() {
  CUstream_st* spinning = nullptr;
  bool in_host_function = false;
  for (const auto& stream : runtime.streams) {
    in_host_function |= stream->running_host_function;
    if (stream->stalled && !stream->queue.empty()) spinning = stream.get();
  }
  if (!in_host_function && spinning == nullptr) {
    lose(device(), cudaErrorUnknown, "fake runtime: nothing can run, and awaited work is not done");
    return false;
  }
  const auto until = std::chrono::system_clock::now() + runtime.options.patience;
  const std::uint64_t seen = runtime.activity;
  ++runtime.num_waiting;
  bool answered = in_host_function;
  for (;;) {
    const bool others = runtime.num_threads > runtime.num_waiting;
    if (!in_host_function && (!others || std::chrono::system_clock::now() > until)) break;
    // The system's clock: gcc 12's thread sanitizer does not know waits on the steady one.
    runtime.changed.wait_until(lock, std::chrono::system_clock::now() + kPollPeriod);
    if (runtime.options.baton) let_others_in();
    answered = runtime.activity != seen;
    if (answered) break;
    clear_stalls();
    if (run_one(nullptr)) {
      answered = true;
      break;
    }
  }
  --runtime.num_waiting;
  if (!answered && spinning->stalled && !spinning->queue.empty()) {
    lose(runtime.devices.at(spinning->device), cudaErrorLaunchTimeout,
         "the device waits for the host: every block of " + spinning->queue.front()->name() +
             " on " + spinning->name() + " polls memory that nobody writes");
  }
  clear_stalls();
  return true;
}

void Session::clear_stalls() {
  for (const auto& stream : runtime.streams) stream->stalled = false;
}

void Session::let_others_in() {
  if (runtime.options.baton) {
    lock.unlock();
    Baton::get().yield();
    lock.lock();
    return;
  }
  if (runtime.num_entering == 0) return;
  lock.unlock();
  while (runtime.num_entering > 0) std::this_thread::yield();
  ++runtime.num_entering;
  lock.lock();
  --runtime.num_entering;
}

}  // namespace fake
