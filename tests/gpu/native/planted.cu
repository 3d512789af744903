// The planted bugs of tests/emulation on a GPU: `sluice_planted NAME` runs one and prints what
// became of it, `sluice_planted` lists the names, which are those of planted_test.cc. Under
// compute-sanitizer the verdict is the tool's, to be laid beside the emulation's.
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/launch.h"
#include "tests/emulation/planted/cases.h"
#include "tests/gpu/native/api.h"

namespace {

using gpu_tests::Buffer;
using gpu_tests::expect;
using gpu_tests::Failed;
using namespace simt::planted;  // NOLINT: what this file is about

template <class T>
void upload(const Buffer& buffer, const std::vector<T>& values) {
  const std::size_t bytes = values.size() * sizeof(T);
  expect("upload",
         cudaMemcpyAsync(buffer.as<void>(), values.data(), bytes, cudaMemcpyHostToDevice, nullptr));
}
template <class T>
std::vector<T> download(const Buffer& buffer, std::size_t count) {
  std::vector<T> values(count);
  expect("kernel", cudaStreamSynchronize(nullptr));
  expect("download", cudaMemcpyAsync(values.data(), buffer.as<void>(), count * sizeof(T),
                                     cudaMemcpyDeviceToHost, nullptr));
  return values;
}

std::string told(const std::string& verdict) { return verdict.empty() ? "right result" : verdict; }

struct Produced {
  __nv_bfloat16* x;
  const __nv_bfloat16* from;
  int count;
};
// Late on purpose: what starts early without waiting sees the old x.
__global__ void produce_kernel(const __grid_constant__ Produced p) {
  __nanosleep(100'000);
  for (int i = static_cast<int>(threadIdx.x); i < p.count; i += kThreads) p.x[i] = p.from[i];
}

std::string product(Bug bug, bool last_slot) {
  const Buffer x(kInputs * 2), source(kInputs * 2), slab(2 * kSlot * 2), y(kResults * 4);
  std::vector<__nv_bfloat16> rows(kInputs), weights(2 * kSlot, __float2bfloat16(99.0f));
  for (std::size_t i = 0; i < kInputs; ++i) rows[i] = x_value(i);
  const std::size_t first = last_slot ? kSlot : 0;
  for (std::size_t i = 0; i < kSlot; ++i) weights[first + i] = w_value(i);
  upload(source, rows);
  upload(slab, weights);
  expect("produce", sluice::launch("produce", {.grid = {1}, .block = {kThreads}}, produce_kernel,
                                   Produced{x.as<__nv_bfloat16>(), source.as<__nv_bfloat16>(),
                                            static_cast<int>(kInputs)}));
  const ProductArgs args{.x = x.as<__nv_bfloat16>(),
                         .w = slab.as<__nv_bfloat16>() + first,
                         .y = y.as<float>(),
                         .tokens = kTokens,
                         .rows = kRows,
                         .columns = kColumns};
  expect("launch", sluice::launch("product",
                                  {.grid = {2},
                                   .block = {kProductThreads},
                                   .shared_bytes = product_shared_bytes(kTokens, kColumns),
                                   .overlap_previous = true},
                                  product_kernel(bug), args));
  return told(judge_product(download<float>(y, kResults).data()));
}

enum class Input { kDefined, kUndefined, kFreed, kHeap, kEndsEarly, kNearNull };

std::string mechanism(Kernel kernel, Input input = Input::kDefined, unsigned blocks = 1,
                      bool writes = false) {
  Buffer in(static_cast<std::size_t>(kThreads - (input == Input::kEndsEarly ? 1 : 0)) * 4);
  const Buffer out(kThreads * 4), scratch(kThreads * 6 * 4), counter(4);
  std::vector<int> values(kThreads);
  for (int i = 0; i < kThreads; ++i) values[static_cast<std::size_t>(i)] = i;
  if (input == Input::kEndsEarly) values.pop_back();
  if (input != Input::kUndefined) upload(in, values);
  upload(counter, std::vector<unsigned>{0});
  Buffers buffers{.out = out.as<int>(),
                  .in = in.as<int>(),
                  .counter = counter.as<unsigned>(),
                  .scratch = scratch.as<int>()};
  if (input == Input::kFreed) expect("free", in.free());
  if (input == Input::kHeap) buffers.in = values.data();
  if (input == Input::kNearNull) buffers.in = reinterpret_cast<const int*>(16);
  if (writes) buffers.scratch = const_cast<int*>(buffers.in);
  expect("launch",
         sluice::launch("kernel", {.grid = {blocks}, .block = {kThreads}, .shared_bytes = 256},
                        kernel, buffers));
  const auto got = download<int>(out, kThreads);
  if (writes) return "ran";
  return told(judge_mechanism(got.data()));
}

std::map<std::string, std::function<std::string()>> planted() {
  std::map<std::string, std::function<std::string()>> all = {
      {"Control", [] { return product(Bug::kNone, true); }},
      {"ControlOfMechanisms", [] { return mechanism(warp_kernel(Bug::kNone)); }},
      {"ControlOfTheLastBlock",
       [] { return mechanism(last_block_kernel(Bug::kNone), Input::kDefined, 6); }},
      {"ControlOfMemory", [] { return mechanism(memory_kernel(Bug::kNone)); }},
      {"ReadsPastTheRow", [] { return product(Bug::kReadsPastTheRow, true); }},
      {"ReadsPastTheRowOfAnInnerSlot", [] { return product(Bug::kReadsPastTheRow, false); }},
      {"UnorderedBlocks", [] { return mechanism(unordered_blocks_kernel(), Input::kDefined, 2); }},
      {"EndsEarly", [] { return mechanism(reading_kernel(), Input::kEndsEarly); }},
      {"Undefined", [] { return mechanism(reading_kernel(), Input::kUndefined); }},
      {"Freed", [] { return mechanism(reading_kernel(), Input::kFreed); }},
      {"ReadsTheHeap", [] { return mechanism(reading_kernel(), Input::kHeap); }},
      {"ReadsNearNull", [] { return mechanism(reading_kernel(), Input::kNearNull); }},
      {"WritesTheHeap", [] { return mechanism(writing_kernel(), Input::kHeap, 1, true); }},
  };
  const auto add = [&all](const char* name, Bug bug, auto run) {
    all.emplace(name, [bug, run] { return run(bug); });
  };
  const auto products = [](Bug bug) { return product(bug, false); };
  add("FragmentsExchanged", Bug::kFragmentsExchanged, products);
  add("StagedIndexHalved", Bug::kStagedIndexHalved, products);
  add("NoBarrierAfterPartials", Bug::kNoBarrierAfterPartials, products);
  add("NoBarrierAtLoopEnd", Bug::kNoBarrierAtLoopEnd, products);
  add("NoBarrierAfterStaging", Bug::kNoBarrierAfterStaging, products);
  add("NoCopyWait", Bug::kNoCopyWait, products);
  add("NoDependencyWait", Bug::kNoDependencyWait, products);
  add("WritesARowTooMany", Bug::kWritesARowTooMany, products);
  add("ReadsTheNeighbourSlot", Bug::kReadsTheNeighbourSlot, products);
  add("LaneSkipsMma", Bug::kLaneSkipsMma, products);
  add("BarrierInOneWarp", Bug::kBarrierInOneWarp, products);
  const auto warps = [](Bug bug) { return mechanism(warp_kernel(bug)); };
  add("NoSyncwarp", Bug::kNoSyncwarp, warps);
  add("ShuffleNamesAnExitedLane", Bug::kShuffleNamesAnExitedLane, warps);
  add("ShuffleReadsOutsideItsMask", Bug::kShuffleReadsOutsideItsMask, warps);
  add("MasksDiffer", Bug::kMasksDiffer, warps);
  add("ExitsBeforeACollective", Bug::kExitsBeforeACollective, warps);
  const auto last_blocks = [](Bug bug) {
    return mechanism(last_block_kernel(bug), Input::kDefined, 6);
  };
  add("PlainCounter", Bug::kPlainCounter, last_blocks);
  add("NoFence", Bug::kNoFence, last_blocks);
  add("FenceBeforeTheBarrier", Bug::kFenceBeforeTheBarrier, last_blocks);
  const auto memories = [](Bug bug) { return mechanism(memory_kernel(bug)); };
  add("PastStaticShared", Bug::kPastStaticShared, memories);
  add("PastDynamicShared", Bug::kPastDynamicShared, memories);
  add("StackOverflow", Bug::kStackOverflow, memories);
  add("MisalignedStream", Bug::kMisalignedStream, memories);
  add("MisalignedMatrix", Bug::kMisalignedMatrix, memories);
  add("NarrowedMisalignedLoad", Bug::kNarrowedMisalignedLoad, memories);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const auto all = planted();
  if (argc < 2) {
    for (const auto& [name, unused] : all) std::printf("%s\n", name.c_str());
    return 0;
  }
  const auto found = all.find(argv[1]);
  if (found == all.end()) {
    std::fprintf(stderr, "sluice_planted: got %s, expected a name of the list\n", argv[1]);
    return 2;
  }
  try {
    std::printf("planted %s: %s\n", argv[1], found->second().c_str());
  } catch (const Failed& failed) {
    std::printf("planted %s: %s\n", argv[1], failed.text.c_str());
  }
  return 0;
}
