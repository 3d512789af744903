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

void* allocate(std::size_t bytes, std::size_t alignment) {
  num_allocations.fetch_add(1, std::memory_order_relaxed);
  void* const data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}
}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }

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

TEST(EngineAllocation, TheRuleItselfCanFail) {
  const std::int64_t before = num_allocations;
  std::vector<int>* const leak = new std::vector<int>(3);
  EXPECT_GE(num_allocations - before, 1);
  delete leak;
}

}  // namespace
}  // namespace sluice::testing
