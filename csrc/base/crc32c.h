#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace sluice {

/// CRC-32C (Castagnoli, reflected, as in iSCSI): "123456789" gives e3069283. `crc` is the value of
/// the bytes before, so that a buffer may come in parts. SSE4.2 where the CPU has it, else tables.
[[nodiscard]] std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t crc = 0);

/// The value of A‖B from the values of A and of B, without reading either.
/// Source: M. Adler, zlib's crc32_combine (advancing over zeros by squaring a GF(2) operator).
[[nodiscard]] std::uint32_t crc32c_combine(std::uint32_t crc_a, std::uint32_t crc_b,
                                           std::uint64_t bytes_b);

namespace detail {
/// The two implementations by name, for tests. `crc32c_sse42` only where `has_sse42()`.
[[nodiscard]] bool has_sse42();
[[nodiscard]] std::uint32_t crc32c_sse42(std::span<const std::byte> bytes, std::uint32_t crc);
[[nodiscard]] std::uint32_t crc32c_tables(std::span<const std::byte> bytes, std::uint32_t crc);
}  // namespace detail

}  // namespace sluice
