#include "tests/emulation/planted/scenarios.h"

#include <array>
#include <cmath>
#include <vector>

#include "tests/emulation/harness.h"

namespace simt::planted {
namespace {

using testing::Array;

constexpr int kTokens = 5, kRows = 128, kColumns = 256;
constexpr std::size_t kSlot = std::size_t{kRows} * kColumns;
constexpr std::size_t kThreads = 64;

float x_at(int token, int column) { return static_cast<float>((token * 7 + column * 3) % 11 - 5); }
float w_at(int row, int column) { return static_cast<float>((row * 5 + column) % 13 - 6); }

std::string compare(Array<float>& y) {
  for (int token = 0; token < kTokens; ++token) {
    for (int row = 0; row < kRows; ++row) {
      float sum = 0.0f;
      for (int column = 0; column < kColumns; ++column) {
        sum += x_at(token, column) * w_at(row, column);
      }
      const float got = y[static_cast<std::size_t>(token * kRows + row)];
      if (std::isnan(got)) return "NaN";
      if (got != sum) return "wrong result";
    }
  }
  return "";
}

std::string compare(Array<int>& out) {
  for (std::size_t i = 0; i < kThreads; ++i) {
    if (out[i] != static_cast<int>(3 * i + 1)) return "wrong result";
  }
  return "";
}

int bss[kThreads];
constexpr auto kConstants = [] {
  std::array<int, kThreads> values = {};
  for (std::size_t i = 0; i < kThreads; ++i) values[i] = static_cast<int>(i);
  return values;
}();

}  // namespace

std::string run_product(Bug bug, bool last_slot) {
  Array<__nv_bfloat16> x(std::size_t{kTokens} * kColumns, "x");
  Array<__nv_bfloat16> slab(2 * kSlot, "slab");
  Array<float> y(std::size_t{kTokens} * kRows, "y");
  const std::size_t first = last_slot ? kSlot : 0;
  slab.fill(__float2bfloat16(99.0f));  // the neighbour's
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      slab[first + static_cast<std::size_t>(row * kColumns + column)] =
          __float2bfloat16(w_at(row, column));
    }
  }
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
    x.generate([](std::size_t i) {
      return __float2bfloat16(x_at(static_cast<int>(i) / kColumns, static_cast<int>(i) % kColumns));
    });
    grid->set_dependency_done(true);
    end = testing::finish(*grid);
  }
  clear_forbidden();
  return end.empty() ? compare(y) : end;
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
  return end.empty() ? compare(out) : end;
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
