#pragma once

#include <cstdint>

namespace sluice {

/// A queue of device work. 0 is the caller's default queue; on a host device all are the same.
enum class StreamHandle : std::uint64_t {};

}  // namespace sluice
