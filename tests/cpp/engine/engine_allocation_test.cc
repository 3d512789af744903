// Law 3: once warm, the hot path of the few-token kernel takes no memory. The counting operator new
// below sees every allocation of this executable.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "engine/plain.h"
#include "engine/rig.h"

namespace {
std::atomic<std::int64_t> num_allocations{0};
std::atomic<std::int64_t> allowed{INT64_MAX};  // so many more succeed, then one is refused …
std::atomic<bool> refuses_on{false};           // … and all behind it

void* allocate(std::size_t bytes, std::size_t alignment) {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  const std::int64_t left = allowed.fetch_sub(1, std::memory_order_relaxed);
  if (left == 0 || (left < 0 && refuses_on)) throw std::bad_alloc();
  void* const data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}
// Inlined, it would be a free() of what a new has given: a warning of GCC's.
[[gnu::noinline]] void release(void* data) noexcept { std::free(data); }
}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* data) noexcept { release(data); }
void operator delete(void* data, std::size_t) noexcept { release(data); }
void operator delete(void* data, std::align_val_t) noexcept { release(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { release(data); }

namespace sluice::testing {
namespace {

std::int64_t allocations_of(Engine& engine, const std::vector<Call>& calls,
                            std::vector<std::byte>& out) {
  const std::int64_t before = num_allocations;
  for (const Call& call : calls) engine.forward(call.args(out.data()));
  return num_allocations - before;
}

TEST(EngineAllocation, AWarmForwardThatHitsTakesNoMemory) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    ModelShape shape{.dtype = dtype};
    const Model model(shape, 1);
    std::mt19937_64 rng(1);
    std::vector<Call> calls;
    for (int i = 0; i < 16; ++i) {
      calls.push_back(
          make_call(shape, i % 2, {.num_tokens = 1, .top_k = 4, .activations = dtype}, rng));
    }
    std::vector<std::byte> out(1024);
    Rig rig(model, {.device_memory = model.slots(16), .timeline = true, .host_device = true});
    (void)allocations_of(rig.engine(), calls, out);
    EXPECT_EQ(allocations_of(rig.engine(), calls, out), 0);
    EXPECT_GT(rig.engine().stats().hits, 60);
  }
}

TEST(EngineAllocation, WarmManyTokensTakeNoMemoryEither) {
  ModelShape shape{.dtype = DType::kBF16, .has_bias = true};
  const Model model(shape, 1);
  std::mt19937_64 rng(1);
  const std::vector<Call> calls = {
      make_call(shape, 0, {.num_tokens = 33, .top_k = 3, .activations = DType::kBF16}, rng)};
  std::vector<std::byte> out(16384);
  Rig rig(model, {.device_memory = model.slots(16), .host_device = true});
  (void)allocations_of(rig.engine(), calls, out);
  EXPECT_EQ(allocations_of(rig.engine(), calls, out), 0);
}

// Whichever allocation of a cold forward is refused: the call ends, nothing stays in flight, and
// the next one computes what it should.
void refuse_each_allocation() {
  const ModelShape shape;
  const Model model(shape, 1);
  std::mt19937_64 rng(1);
  const Call call = make_call(shape, 0, {.num_tokens = 3, .top_k = 4}, rng);
  Rig untouched(model, {.device_memory = model.slots(4), .host_device = true});
  const std::vector<std::byte> expected = untouched.forward(call);

  std::int64_t num_refused = 0;
  for (std::int64_t at = 0;; ++at) {
    Rig rig(model, {.device_memory = model.slots(4), .host_device = true});
    std::vector<std::byte> out(call.hidden.size());
    const ForwardArgs args = call.args(out.data());
    const Hint guess{make_key(1, 2), 0.5, kNever};
    std::exception_ptr error;
    rig.on_drive = [&rig] {  // the stepped link's own memory is not what is refused
      const std::int64_t left = allowed.exchange(INT64_MAX);
      rig.land_one();
      allowed = left;
    };
    allowed = at;
    try {
      rig.engine().hint({&guess, 1});
      rig.engine().forward(args);
    } catch (...) {
      error = std::current_exception();
    }
    const bool ran_out = allowed.exchange(INT64_MAX) < 0;  // the number was reached
    if (error) {
      ++num_refused;
      ASSERT_THROW(std::rethrow_exception(error), std::bad_alloc) << "allocation " << at;
    }
    ASSERT_EQ(rig.forward(call), expected) << "allocation " << at << " was refused";
    rig.engine().drain();
    ASSERT_EQ(rig.num_leases(), 0);
    for (const auto& pool : rig.engine().residency()) {
      for (const SlotCache::SlotView& slot : pool) ASSERT_NE(slot.state, SlotState::kLoading);
    }
    if (!ran_out) break;
  }
  EXPECT_GT(num_refused, 10);
}

TEST(EngineAllocation, ARefusedAllocationEndsTheCallAndNothingElse) { refuse_each_allocation(); }

TEST(EngineAllocation, AndSoDoesOneBehindWhichNoneIsGranted) {
  refuses_on = true;
  refuse_each_allocation();
  refuses_on = false;
}

TEST(EngineAllocation, TheRuleItselfCanFail) {
  const std::int64_t before = num_allocations;
  std::vector<int>* const leak = new std::vector<int>(3);
  EXPECT_GE(num_allocations - before, 1);
  delete leak;
}

}  // namespace
}  // namespace sluice::testing
