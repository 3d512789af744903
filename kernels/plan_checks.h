#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

#include "base/error.h"
#include "kernels/expert_weights.h"
#include "kernels/gpu_traits.h"

// What the plans of the CUDA kernels over experts have in common. Internal to kernels/.

namespace sluice {

/// Blocks per multiprocessor that the kernels' registers allow (launch bounds: 256 threads, 2).
inline constexpr int kBlocksPerMultiprocessor = 2;

[[nodiscard]] constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

/// Errors: ConfigError naming the width, or the two types.
inline void check_expert_problem(const char* kernel, const ExpertProblem& problem) {
  const auto check_width = [&](const char* name, std::int64_t width) {
    require<ConfigError>(
        width > 0 && width % 8 == 0 && 2 * width <= std::numeric_limits<std::int32_t>::max(), [&] {
          return std::string(kernel) + ": got a " + name + " width of " + std::to_string(width) +
                 ", expected a positive multiple of 8; run this model on the CPU";
        });
  };
  check_width("hidden", problem.hidden);
  check_width("intermediate", problem.intermediate);
  require<ConfigError>(problem.activations == problem.weights || problem.activations == DType::kF32,
                       [&] {
                         return std::string(kernel) + ": got activations " +
                                std::string(dtype_name(problem.activations)) + " over weights " +
                                std::string(dtype_name(problem.weights)) +
                                ", expected the weights' type or F32; cast the hidden states";
                       });
}

/// Errors: ConfigError for the generic gate.
inline void check_gate(const char* kernel, const ExpertProblem& problem) {
  require<ConfigError>(problem.gate.kind != GateKind::kGeneric, [&] {
    return std::string(kernel) +
           ": got the generic gate, expected one with a kernel; use launch_tile_gate_up_raw";
  });
}

/// Bytes of the list of busy experts in shared memory (kernels/active_experts.cuh).
[[nodiscard]] inline std::size_t active_list_bytes(int num_listed) {
  return static_cast<std::size_t>(2 * num_listed + 1) * sizeof(std::int32_t);
}

/// Blocks of a persistent grid over at most `num_items` items.
[[nodiscard]] inline int persistent_blocks(std::int64_t num_items, const GpuTraits& gpu) {
  const std::int64_t resident =
      std::int64_t{kBlocksPerMultiprocessor} * std::max(1, gpu.num_multiprocessors);
  return static_cast<int>(std::clamp<std::int64_t>(num_items, 1, resident));
}

/// Errors: ConfigError when a block would need more shared memory than the GPU has.
inline void check_shared(const char* kernel, std::size_t bytes, int num_listed,
                         const GpuTraits& gpu) {
  require<ConfigError>(bytes <= gpu.shared_bytes_per_block, [&] {
    return std::string(kernel) + ": got a need of " + std::to_string(bytes) +
           " bytes of shared memory per block for a list of " + std::to_string(num_listed) +
           " experts, expected at most this GPU's " + std::to_string(gpu.shared_bytes_per_block) +
           "; pass fewer experts per launch";
  });
}

}  // namespace sluice
