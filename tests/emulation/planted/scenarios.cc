#include "tests/emulation/planted/scenarios.h"

#include <array>
#include <vector>

#include "tests/emulation/harness.h"
#include "tests/emulation/planted/cases.h"

namespace simt::planted {
namespace {

using testing::Array;

int bss[kThreads];
constexpr auto kConstants = [] {
  std::array<int, kThreads> values = {};
  for (std::size_t i = 0; i < kThreads; ++i) values[i] = static_cast<int>(i);
  return values;
}();

}  // namespace

std::string run_product(Bug bug, bool last_slot) {
  Array<__nv_bfloat16> x(kInputs, "x");
  Array<__nv_bfloat16> slab(2 * kSlot, "slab");
  Array<float> y(kResults, "y");
  const std::size_t first = last_slot ? kSlot : 0;
  slab.fill(__float2bfloat16(99.0f));  // the neighbour's
  for (std::size_t i = 0; i < kSlot; ++i) slab[first + i] = w_value(i);
  clear_forbidden();
  forbid(slab.data() + (kSlot - first), kSlot * sizeof(__nv_bfloat16));

  const ProductArgs args{.x = x.data(),
                         .w = slab.data() + first,
                         .y = y.data(),
                         .tokens = kTokens,
                         .rows = kRows,
                         .columns = kColumns};
  const auto grid = testing::make_grid("product",
                                       {.grid = 2,
                                        .block = kProductThreads,
                                        .shared_bytes = product_shared_bytes(kTokens, kColumns)},
                                       product_kernel(bug), args);
  grid->set_dependency_done(false);
  std::string end = testing::finish(*grid);
  if (end == "waits for the previous grid") {
    x.generate(x_value);
    grid->set_dependency_done(true);
    end = testing::finish(*grid);
  }
  clear_forbidden();
  return end.empty() ? judge_product(y.data()) : end;
}

std::string run_mechanism(Kernel kernel, Input input, unsigned blocks) {
  const std::size_t count = input == Input::kEndsEarly ? kThreads - 1 : kThreads;
  Array<int> in(count, "in"), out(kThreads, "out");
  Array<int> scratch(kThreads * 6, "scratch");
  Array<unsigned> counter(1, "counter");
  counter.fill(0);
  const auto value = [](std::size_t i) { return static_cast<int>(i); };
  if (input != Input::kUndefined) in.generate(value);
  std::vector<int> heap(kThreads);
  for (std::size_t i = 0; i < kThreads; ++i) heap[i] = bss[i] = value(i);

  Buffers buffers{
      .out = out.data(), .in = in.data(), .counter = counter.data(), .scratch = scratch.data()};
  const auto grid_of = [&] {
    return testing::make_grid("kernel", {.grid = blocks, .block = 64, .shared_bytes = 256}, kernel,
                              buffers);
  };
  clear_forbidden();
  switch (input) {
    case Input::kFreed:
      in.free();
      break;
    case Input::kHeap:
      buffers.in = heap.data();
      break;
    case Input::kBss:
      buffers.in = bss;
      break;
    case Input::kConstants:
      buffers.in = kConstants.data();
      break;
    case Input::kEndsAtGap:
      forbid(in.data() + 63, 4);
      break;
    case Input::kNearNull:
      buffers.in = reinterpret_cast<const int*>(16);
      break;
    default:
      break;
  }
  const auto grid = grid_of();
  if (input == Input::kOtherDevice) grid->set_device(1);
  const std::string end = testing::finish(*grid);
  clear_forbidden();
  return end.empty() ? judge_mechanism(out.data()) : end;
}

std::string run_writing(Input target) {
  std::vector<int> heap(kThreads);
  Array<int> memory(kThreads, "memory");
  Buffers buffers{.out = nullptr, .in = nullptr, .scratch = memory.data()};
  switch (target) {
    case Input::kFreed:
      memory.free();
      break;
    case Input::kHeap:
      buffers.scratch = heap.data();
      break;
    case Input::kBss:
      buffers.scratch = bss;
      break;
    case Input::kDefined:
      break;
    case Input::kConstants:
      buffers.scratch = const_cast<int*>(kConstants.data());
      break;
    default:
      break;
  }
  return testing::run("kernel", {.block = 64}, writing_kernel(), buffers);
}

}  // namespace simt::planted
