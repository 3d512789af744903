#include "predict/pending_tokens.h"

#include <algorithm>

namespace sluice {

PendingTokens::PendingTokens(std::size_t window, std::size_t num_layers, std::size_t num_experts,
                             std::size_t top_k)
    : capacity_(window + 1),
      top_k_(top_k),
      num_experts_(num_experts),
      wide_(num_layers * top_k),
      far_(num_layers * num_experts),
      routes_(capacity_ * wide_),
      next_uses_(capacity_ * far_) {}

void PendingTokens::push(std::span<const std::int16_t> routes) {
  for (std::size_t i = 0; i < size_; ++i) {
    std::uint8_t* const found = next_uses_.data() + (first_ + i) % capacity_ * far_;
    for (std::size_t j = 0; j < wide_; ++j) {
      if (routes[j] < 0) continue;
      std::uint8_t& next = found[j / top_k_ * num_experts_ + static_cast<std::size_t>(routes[j])];
      if (next == 0) next = static_cast<std::uint8_t>(size_ - i);
    }
  }
  const std::size_t place = (first_ + size_) % capacity_;
  std::copy(routes.begin(), routes.end(),
            routes_.begin() + static_cast<std::ptrdiff_t>(place * wide_));
  std::fill_n(next_uses_.begin() + static_cast<std::ptrdiff_t>(place * far_), far_,
              std::uint8_t{0});
  ++size_;
}

void PendingTokens::pop() {
  first_ = (first_ + 1) % capacity_;
  --size_;
}

}  // namespace sluice
