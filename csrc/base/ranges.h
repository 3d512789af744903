#pragma once

#include <cstdint>

namespace sluice {

/// Where ranges of time are shown by name while they run: a profiler's (device/nvtx.h), a test's.
/// Observes, and changes nothing.
///
/// Thread safety: all members.
class Ranges {
 public:
  virtual ~Ranges() = default;
  /// Begins a range of the calling thread, inside of those that it has begun.
  virtual void push(const char* name) noexcept = 0;
  /// Ends the newest one of the calling thread.
  virtual void pop() noexcept = 0;
  /// Begins one that may overlap others and end on any thread.
  [[nodiscard]] virtual std::uint64_t start(const char* name) noexcept = 0;
  virtual void end(std::uint64_t range) noexcept = 0;
};

}  // namespace sluice
