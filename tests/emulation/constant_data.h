#pragma once

#include <cstddef>

namespace simt {

/// Whether these bytes are read-only data of the program or of a library that it has loaded: tables
/// that a kernel declares constexpr lie there.
[[nodiscard]] bool is_constant_data(const void* address, std::size_t bytes);

}  // namespace simt
