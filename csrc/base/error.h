#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace sluice {

/// Anything sluice raises on purpose. Python sees the same names with a built-in second parent.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A setting that can never work; the user can mend it before starting.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// A malformed file, a missing tensor, a hash that differs.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// A file operation failed. Carries the path, the offset in bytes and the errno (0: none).
class IoError : public Error {
 public:
  explicit IoError(const std::string& what) : Error(what) {}
  IoError(const std::string& what, std::string path, std::uint64_t offset, int error_number);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }
  [[nodiscard]] int error_number() const noexcept { return error_number_; }

 private:
  std::string path_;
  std::uint64_t offset_ = 0;
  int error_number_ = 0;
};

/// The working set cannot fit into the memory that was granted.
class CapacityError : public Error {
 public:
  using Error::Error;
};

/// A call to an accelerator failed. For good: the context is unusable, and with it every session
/// there. Else the call alone was refused, and the device works on.
class DeviceError : public Error {
 public:
  explicit DeviceError(const std::string& what, bool for_good = true)
      : Error(what), for_good_(for_good) {}

  [[nodiscard]] bool is_for_good() const noexcept { return for_good_; }

 private:
  bool for_good_ = true;
};

/// An invariant broke: a bug of sluice.
class InternalError : public Error {
 public:
  using Error::Error;
};

/// The caller's interrupt check asked to stop (Ctrl-C). Never leaves the bindings under this name.
class Interrupted : public Error {
 public:
  using Error::Error;
};

/// Throws `E(describe() + place)` unless `ok`. A passing check costs a branch; `describe` says
/// "what failed: got X, expected Y; do Z".
template <class E, class Describe>
void require(bool ok, Describe&& describe, const char* file = __builtin_FILE(),
             int line = __builtin_LINE()) {
  if (ok) [[likely]]
    return;
  throw E(std::string(std::forward<Describe>(describe)()) + " [" + file + ":" +
          std::to_string(line) + "]");
}

}  // namespace sluice
