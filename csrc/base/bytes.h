#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace sluice {

inline constexpr std::size_t kKiB = std::size_t{1} << 10;
inline constexpr std::size_t kMiB = std::size_t{1} << 20;

/// What O_DIRECT asks of offsets, lengths and addresses.
inline constexpr std::size_t kDirectAlignment = 4096;
/// What kernels and torch's GEMM may assume of a slot's address (law 1).
inline constexpr std::size_t kSlotAlignment = 64;

/// `value` rounded up (down) to a multiple of `alignment`, a power of two. No overflow check: use
/// `checked_add` first on numbers that come from a file.
[[nodiscard]] constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) & ~(alignment - 1);
}
[[nodiscard]] constexpr std::uint64_t align_down(std::uint64_t value, std::uint64_t alignment) {
  return value & ~(alignment - 1);
}

/// Sum and product of numbers that a file supplied; empty on overflow.
[[nodiscard]] constexpr std::optional<std::uint64_t> checked_add(std::uint64_t a, std::uint64_t b) {
  std::uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}
[[nodiscard]] constexpr std::optional<std::uint64_t> checked_mul(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

}  // namespace sluice
