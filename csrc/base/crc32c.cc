#include "base/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace sluice {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78u;  // reflected

// kTables[k][b]: the effect of byte b followed by k zero bytes (slicing by eight).
constexpr auto kTables = [] {
  std::array<std::array<std::uint32_t, 256>, 8> tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? kPolynomial : 0u);
    tables[0][b] = crc;
  }
  for (std::uint32_t b = 0; b < 256; ++b) {
    for (std::size_t k = 1; k < 8; ++k) {
      tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xffu];
    }
  }
  return tables;
}();

// A linear map over GF(2)^32: the image of each basis vector.
using Operator = std::array<std::uint32_t, 32>;

constexpr std::uint32_t apply(const Operator& op, std::uint32_t vector) {
  std::uint32_t sum = 0;
  for (std::size_t i = 0; vector != 0; ++i, vector >>= 1) {
    if ((vector & 1u) != 0) sum ^= op[i];
  }
  return sum;
}

constexpr Operator squared(const Operator& op) {
  Operator out{};
  for (std::size_t i = 0; i < 32; ++i) out[i] = apply(op, op[i]);
  return out;
}

// kZeros[k]: advancing a value over 2^k zero bytes.
constexpr auto kZeros = [] {
  std::array<Operator, 64> powers{};
  Operator bit{};
  bit[0] = kPolynomial;
  for (std::size_t i = 1; i < 32; ++i) bit[i] = 1u << (i - 1);
  powers[0] = squared(squared(squared(bit)));
  for (std::size_t k = 1; k < 64; ++k) powers[k] = squared(powers[k - 1]);
  return powers;
}();

constexpr std::uint32_t advance_over_zeros(std::uint32_t crc, std::uint64_t bytes) {
  for (std::size_t k = 0; bytes != 0; ++k, bytes >>= 1) {
    if ((bytes & 1u) != 0) crc = apply(kZeros[k], crc);
  }
  return crc;
}

// The crc32 instruction has three cycles of latency and one of throughput: three streams fill it.
constexpr std::size_t kStreamBytes = 4096;

// Advancing over one stream (two streams), a byte of the value at a time.
constexpr auto make_shift(std::uint64_t bytes) {
  std::array<std::array<std::uint32_t, 256>, 4> shift{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    for (std::size_t k = 0; k < 4; ++k) shift[k][b] = advance_over_zeros(b << (8 * k), bytes);
  }
  return shift;
}

}  // namespace

namespace detail {

std::uint32_t crc32c_tables(std::span<const std::byte> bytes, std::uint32_t crc) {
  crc = ~crc;
  const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
  std::size_t left = bytes.size();
  for (; left >= 8; left -= 8, p += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p, 8);
    word ^= crc;
    crc = 0;
    for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][(word >> (8 * k)) & 0xffu];
  }
  for (; left > 0; --left, ++p) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xffu];
  return ~crc;
}

#if defined(__x86_64__)

bool has_sse42() { return __builtin_cpu_supports("sse4.2") != 0; }

__attribute__((target("sse4.2"))) std::uint32_t crc32c_sse42(std::span<const std::byte> bytes,
                                                             std::uint32_t crc) {
  static const auto one_stream = make_shift(kStreamBytes);
  static const auto two_streams = make_shift(2 * kStreamBytes);
  const auto shifted = [](const auto& shift, std::uint64_t value) {
    return shift[0][value & 0xff] ^ shift[1][(value >> 8) & 0xff] ^ shift[2][(value >> 16) & 0xff] ^
           shift[3][(value >> 24) & 0xff];
  };
  const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
  std::size_t left = bytes.size();
  std::uint64_t a = static_cast<std::uint32_t>(~crc);
  for (; left >= 3 * kStreamBytes; left -= 3 * kStreamBytes, p += 3 * kStreamBytes) {
    std::uint64_t b = 0;
    std::uint64_t c = 0;
    for (std::size_t i = 0; i < kStreamBytes; i += 8) {
      std::uint64_t x = 0;
      std::uint64_t y = 0;
      std::uint64_t z = 0;
      std::memcpy(&x, p + i, 8);
      std::memcpy(&y, p + i + kStreamBytes, 8);
      std::memcpy(&z, p + i + 2 * kStreamBytes, 8);
      a = _mm_crc32_u64(a, x);
      b = _mm_crc32_u64(b, y);
      c = _mm_crc32_u64(c, z);
    }
    a = shifted(two_streams, a) ^ shifted(one_stream, b) ^ c;
  }
  for (; left >= 8; left -= 8, p += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, p, 8);
    a = _mm_crc32_u64(a, word);
  }
  for (; left > 0; --left, ++p) a = _mm_crc32_u8(static_cast<std::uint32_t>(a), *p);
  return ~static_cast<std::uint32_t>(a);
}

#else

bool has_sse42() { return false; }
std::uint32_t crc32c_sse42(std::span<const std::byte> bytes, std::uint32_t crc) {
  return crc32c_tables(bytes, crc);
}

#endif

}  // namespace detail

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t crc) {
  static const bool fast = detail::has_sse42();
  return fast ? detail::crc32c_sse42(bytes, crc) : detail::crc32c_tables(bytes, crc);
}

std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b, std::uint64_t bytes_b) {
  return advance_over_zeros(crc_a, bytes_b) ^ crc_b;
}

}  // namespace sluice
