#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>

#include "base/ids.h"
#include "device/device.h"
#include "store/expert_store.h"

namespace sluice {

/// Threads that read chunks of a store into slots, each with its own bounce buffer. Owns and joins
/// them; never touches Python.
///
/// Thread safety: all members.
class ReaderPool {
 public:
  /// Runs on the reading thread when the chunk's bytes are in the slot, or with the error.
  /// `bytes_read`: what the chunk cost (`ExpertStore::read`), also when it failed.
  using Done =
      std::function<void(std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read)>;

  /// What a reader does before it writes where a copy may still read; may block. Null: nothing.
  using Await = std::function<void(EventHandle last_use)>;

  ReaderPool(std::shared_ptr<const ExpertStore> store, int num_threads, Done done,
             Await await = nullptr);
  ~ReaderPool();
  ReaderPool(const ReaderPool&) = delete;
  ReaderPool& operator=(const ReaderPool&) = delete;

  /// Queues one chunk; chunks are taken in the order of their start.
  void start(std::uint64_t token, ExpertKey key, std::int32_t chunk, std::byte* slot,
             EventHandle last_use = {});
  /// Awaits the chunks that were started, then joins. Idempotent.
  void close();
  [[nodiscard]] int num_threads() const noexcept;
  /// Bounce buffers: num_threads × (largest read + 8 KiB).
  [[nodiscard]] std::uint64_t workspace_bytes() const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sluice
