#include "engine/grouping.h"

#include <bit>

#include "kernels/convert.h"

namespace sluice {
namespace {

// By the bits: a caller that takes subnormals for zero would have fewer rows than a GPU finds.
bool is_zero(float weight) { return std::bit_cast<std::uint32_t>(weight) << 1 == 0; }

}  // namespace

void Grouping::assign(const ForwardArgs& args, std::int32_t num_experts) {
  const std::int64_t entries = args.num_tokens * args.top_k;
  weights_.resize(static_cast<std::size_t>(entries));
  valid_.resize(static_cast<std::size_t>(entries));
  counts_.assign(static_cast<std::size_t>(num_experts), 0);
  groups_.clear();
  groups_.reserve(static_cast<std::size_t>(num_experts));
  widen(args.weights_dtype, args.weights, weights_.data(), entries);

  for (std::int64_t row = 0; row < entries; ++row) {
    const std::int64_t id = args.expert_ids[row];
    const bool valid =
        id >= 0 && id < num_experts && !is_zero(weights_[static_cast<std::size_t>(row)]);
    valid_[static_cast<std::size_t>(row)] = valid ? 1 : 0;
    if (valid) ++counts_[static_cast<std::size_t>(id)];
  }
  // From here on a count is the position of its expert's next row.
  std::int64_t begin = 0;
  for (std::int32_t expert = 0; expert < num_experts; ++expert) {
    std::int64_t& count = counts_[static_cast<std::size_t>(expert)];
    if (count > 0) groups_.push_back({.expert = expert, .begin = begin, .count = count});
    const std::int64_t next = begin + count;
    count = begin;
    begin = next;
  }
  rows_.resize(static_cast<std::size_t>(begin));
  for (std::int64_t row = 0; row < entries; ++row) {
    if (valid_[static_cast<std::size_t>(row)] == 0) continue;
    auto& next = counts_[static_cast<std::size_t>(args.expert_ids[row])];
    rows_[static_cast<std::size_t>(next++)] = row;
  }
}

}  // namespace sluice
