#include "base/error.h"

#include <cstring>

namespace sluice {

IoError::IoError(const std::string& what, std::string path, std::uint64_t offset, int error_number)
    : Error(what + ": " + path + " at offset " + std::to_string(offset) +
            (error_number == 0 ? std::string()
                               : std::string(": ") + std::strerror(error_number) + " (errno " +
                                     std::to_string(error_number) + ")")),
      path_(std::move(path)),
      offset_(offset),
      error_number_(error_number) {}

}  // namespace sluice
