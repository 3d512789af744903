#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace sluice {

/// Position of a MoE layer among the layers that sluice serves (dense layers are not counted).
enum class LayerIdx : std::int32_t {};
/// Position of an expert within its layer.
enum class ExpertIdx : std::int32_t {};
/// Position of a slot within the slab of its size class.
enum class SlotIdx : std::int32_t {};

/// The plain number of an id, for indexing and printing.
template <class Id>
[[nodiscard]] constexpr std::int32_t to_int(Id id) noexcept {
  return static_cast<std::int32_t>(id);
}

/// One routed expert of one MoE layer.
struct ExpertKey {
  LayerIdx layer{};
  ExpertIdx expert{};
  auto operator<=>(const ExpertKey&) const = default;
};

[[nodiscard]] constexpr ExpertKey make_key(std::int32_t layer, std::int32_t expert) noexcept {
  return {LayerIdx{layer}, ExpertIdx{expert}};
}

/// As messages name it: "layer 1 expert 5".
[[nodiscard]] inline std::string describe(ExpertKey key) {
  return "layer " + std::to_string(to_int(key.layer)) + " expert " +
         std::to_string(to_int(key.expert));
}

}  // namespace sluice

template <>
struct std::hash<sluice::ExpertKey> {
  std::size_t operator()(const sluice::ExpertKey& key) const noexcept {
    return (static_cast<std::size_t>(static_cast<std::uint32_t>(key.layer)) << 32) |
           static_cast<std::uint32_t>(key.expert);
  }
};
