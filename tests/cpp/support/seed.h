#pragma once

#include <cstdint>
#include <cstdlib>

namespace sluice::testing {

/// The seed of a random test: SLUICE_TEST_SEED, or the same one every time. Tests print it.
[[nodiscard]] inline std::uint64_t test_seed() {
  const char* const given = std::getenv("SLUICE_TEST_SEED");
  return given == nullptr ? 20260101 : std::strtoull(given, nullptr, 10);
}

}  // namespace sluice::testing
