#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace sluice {

/// Element types of plain weights and of activations.
enum class DType : std::uint8_t { kF32, kBF16, kF16 };

/// Storage of the two half types: bits only, so that no translation unit needs hardware support.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

[[nodiscard]] constexpr std::size_t element_bytes(DType dtype) noexcept {
  return dtype == DType::kF32 ? 4 : 2;
}

/// Where element `index` of an array of `dtype` lies.
[[nodiscard]] inline const std::byte* element_at(const void* base, std::int64_t index,
                                                 DType dtype) noexcept {
  return static_cast<const std::byte*>(base) +
         static_cast<std::size_t>(index) * element_bytes(dtype);
}
[[nodiscard]] inline std::byte* element_at(void* base, std::int64_t index, DType dtype) noexcept {
  return static_cast<std::byte*>(base) + static_cast<std::size_t>(index) * element_bytes(dtype);
}

/// "F32", "BF16", "F16": the spelling of safetensors headers and of the pack manifest.
[[nodiscard]] std::string_view dtype_name(DType dtype) noexcept;
/// Errors: CheckpointError on any other name.
[[nodiscard]] DType parse_dtype(std::string_view name);

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls `fn(TypeTag<T>{})` with the storage type of `dtype`.
template <class Fn>
decltype(auto) dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return std::forward<Fn>(fn)(TypeTag<float>{});
    case DType::kBF16:
      return std::forward<Fn>(fn)(TypeTag<BFloat16>{});
    case DType::kF16:
      return std::forward<Fn>(fn)(TypeTag<Float16>{});
  }
  throw InternalError("dtype: got a value outside of the enum");
}

/// Scalar conversions, exact when widening, round to nearest even when narrowing. The vector tiers
/// in kernels/ give the same bits.
[[nodiscard]] inline float to_float(float value) noexcept { return value; }
[[nodiscard]] inline float to_float(BFloat16 value) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
[[nodiscard]] float to_float(Float16 value) noexcept;

template <class T>
[[nodiscard]] T from_float(float value) noexcept;
template <>
[[nodiscard]] inline float from_float<float>(float value) noexcept {
  return value;
}
template <>
[[nodiscard]] BFloat16 from_float<BFloat16>(float value) noexcept;
template <>
[[nodiscard]] Float16 from_float<Float16>(float value) noexcept;

}  // namespace sluice
