#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace sluice {

/// A text's newest tokens, whose future is not over: their routes, and how soon each expert was
/// used again so far. Each token that is pushed is the future of those before it.
class PendingTokens {
 public:
  /// Room for `window` tokens and the one that ends the oldest one's future.
  PendingTokens(std::size_t window, std::size_t num_layers, std::size_t num_experts,
                std::size_t top_k);

  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] bool is_full() const { return size_ == capacity_; }
  /// Shapes: `[S, K]`, −1 for none.
  [[nodiscard]] std::span<const std::int16_t> oldest_routes() const {
    return {routes_.data() + first_ * wide_, wide_};
  }
  /// Shapes: `[S, E]`, tokens until the next use; 0: none so far.
  [[nodiscard]] std::span<const std::uint8_t> oldest_next_uses() const {
    return {next_uses_.data() + first_ * far_, far_};
  }
  /// Not where it is full.
  void push(std::span<const std::int16_t> routes);
  void pop();

 private:
  std::size_t capacity_;
  std::size_t top_k_;
  std::size_t num_experts_;
  std::size_t wide_;  // S · K
  std::size_t far_;   // S · E
  std::size_t first_ = 0;
  std::size_t size_ = 0;
  std::vector<std::int16_t> routes_;
  std::vector<std::uint8_t> next_uses_;
};

}  // namespace sluice
