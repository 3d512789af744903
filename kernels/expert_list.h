#pragma once

#include <concepts>
#include <cstdint>

#include "kernels/expert_weights.h"

// Which experts a launch computes, and which rows are theirs. Both forms of the list give the same
// bits: a kernel computes an expert from its weights and its rows alone.

namespace sluice {

/// Most experts that a launch takes by value: 16 tokens of 8 experts each, all different.
inline constexpr std::int32_t kMaxListedExperts = 128;

struct ExpertEntry {
  ExpertWeights weights;
  std::int32_t expert = 0;  // its number in the layer: selects its rows
};

/// Experts by value: they travel in the kernel's parameters, so that no copy runs ahead of the
/// launch and a slot may change hands as soon as the launch is behind.
struct ExpertEntries {
  ExpertEntry entries[kMaxListedExperts];
  std::int32_t count = 0;
};

/// All experts of a layer, in device memory at a fixed address: what a captured graph reads again
/// at each replay. Entry e is expert e; one without `w13` is absent and is skipped.
struct ExpertTable {
  const ExpertWeights* experts = nullptr;  // [count], on the device
  std::int32_t count = 0;
};

/// A launcher's list, in either form.
template <class T>
concept ExpertList = std::same_as<T, ExpertEntries> || std::same_as<T, ExpertTable>;

/// The rows of a call by expert, as `launch_route` writes them. Device pointers.
struct RoutedRows {
  const std::int32_t* offsets =
      nullptr;  // [E + 1]: expert e has positions offsets[e] … offsets[e + 1]
  const std::int32_t* rows = nullptr;  // [T · K]: entry t · K + k of each position
  std::int32_t num_experts = 0;        // E
  std::int32_t top_k = 0;              // K
};

}  // namespace sluice
