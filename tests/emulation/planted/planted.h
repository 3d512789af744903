#pragma once

// Kernels that are right, and the same with one bug each. planted_test.cc says which build and
// which order must find which: the acceptance test of the emulation.

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(SLUICE_EMULATE)  // nvcc compiles the same kernels for compute-sanitizer (tests/gpu)
#include "tests/emulation/simt.h"
#endif

namespace simt::planted {

enum class Bug {
  kNone,
  // product.cu
  kFragmentsExchanged,
  kStagedIndexHalved,
  kNoBarrierAfterPartials,
  kNoBarrierAtLoopEnd,
  kNoBarrierAfterStaging,
  kNoCopyWait,
  kNoDependencyWait,
  kReadsPastTheRow,
  kWritesARowTooMany,
  kLaneSkipsMma,
  kBarrierInOneWarp,
  kReadsTheNeighbourSlot,
  // warp.cu
  kNoSyncwarp,
  kShuffleNamesAnExitedLane,
  kShuffleReadsOutsideItsMask,
  kMasksDiffer,
  kExitsBeforeACollective,
  // last_block.cu
  kPlainCounter,
  kNoFence,
  kFenceBeforeTheBarrier,
  // races.cu
  kAnotherWarpHasRead,
  kAnotherLaneHasRead,
  kPlainReadBesideAtomics,
  kNoBarrierBeforeRefill,
  kWaitsForTooFew,
  // memory.cu
  kPastStaticShared,
  kPastDynamicShared,
  kStaticSharedTooLarge,
  kStackOverflow,
  kNarrowedMisalignedLoad,
  kMisalignedStream,
  kMisalignedMatrix,
};

template <Bug kBug>
using Is = std::integral_constant<Bug, kBug>;

/// `kernel_with(Is<kBug>{})` of the one among `kBugs` that `bug` is; null: of none.
template <Bug... kBugs, class KernelWith>
[[nodiscard]] auto one_of(Bug bug, KernelWith kernel_with) {
  decltype(kernel_with(Is<Bug::kNone>{})) found = nullptr;
  (void)((bug == kBugs ? (found = kernel_with(Is<kBugs>{}), true) : false) || ...);
  return found;
}

// ---- y [T, R] = x [T, C] · w [R, C]^T: tensor cores, staging, split columns, a persistent grid
// ----

struct ProductArgs {
  const __nv_bfloat16* x;  // [T, C], of the previous grid
  const __nv_bfloat16* w;  // [R, C]
  float* y;                // [T, R]
  int tokens;              // at most 8
  int rows;                // a multiple of 16
  int columns;             // a multiple of 32
};
inline constexpr int kProductThreads = 128;
using ProductKernel = void (*)(ProductArgs);
[[nodiscard]] ProductKernel product_kernel(Bug bug);
/// Of the dynamic shared memory of `product_kernel`.
[[nodiscard]] constexpr std::size_t product_shared_bytes(int tokens, int columns) {
  return static_cast<std::size_t>(tokens) * static_cast<std::size_t>(columns + 8) * 2;
}

// ---- one mechanism each; every right one writes out[i] = 3 i + 1 for 64 threads ----

struct Buffers {
  int* out;
  const int* in;  // in[i] = i
  unsigned* counter = nullptr;
  int* scratch = nullptr;
};
using Kernel = void (*)(Buffers);
/// Values cross the lanes of a warp. One block of 64.
[[nodiscard]] Kernel warp_kernel(Bug bug);
/// The last of six blocks adds up what all have written to `scratch`.
[[nodiscard]] Kernel last_block_kernel(Bug bug);
/// Many threads and one word of shared memory. One block of 64.
[[nodiscard]] Kernel race_kernel(Bug bug);
/// A double buffer of cp.async. One block of 64.
[[nodiscard]] Kernel stages_kernel(Bug bug);
/// Right: halves of warps that synchronise apart. One block of 64.
[[nodiscard]] Kernel half_warps_kernel();
/// Two blocks, one of which writes (the same values) to what the other reads.
[[nodiscard]] Kernel write_after_foreign_read_kernel();
/// Shared memory (256 bytes dynamic), stack and alignment. One block of 64.
[[nodiscard]] Kernel memory_kernel(Bug bug);
/// Reads `in` and nothing else: the caller plants where that points.
[[nodiscard]] Kernel reading_kernel();
/// Writes `scratch` and nothing else.
[[nodiscard]] Kernel writing_kernel();
/// Waits until `*counter` is 1, which the caller may never make true.
[[nodiscard]] Kernel waiting_kernel();
/// Two blocks that exchange values through `scratch` without anything between them.
[[nodiscard]] Kernel unordered_blocks_kernel();

}  // namespace simt::planted
