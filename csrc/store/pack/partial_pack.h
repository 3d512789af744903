#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "store/file.h"
#include "store/pack/journal.h"

namespace sluice {

/// A pack that is not finished: `<path>.partial`, locked while this lives, and `<path>.journal`,
/// which says how much of it is safe. Knows blobs, not experts. Pinned: it holds a lock.
///
/// Errors: IoError and ConfigError as PackWriter says. After a failed write or sync nothing but
/// destruction is left: the kernel may call lost pages clean, so only a new object, which reads
/// back what it builds on, may go on.
class PartialPack {
 public:
  struct Plan {
    std::string path;
    std::string header;
    std::vector<std::size_t> blob_bytes;  ///< of each blob, multiples of 4096
    std::uint64_t sync_bytes = 0;         ///< written and not yet journalled, at most
  };

  /// Takes the lock, resumes what an earlier run left (not if `fresh`), reserves the disk.
  PartialPack(Plan plan, bool fresh);
  PartialPack(const PartialPack&) = delete;
  PartialPack& operator=(const PartialPack&) = delete;

  /// Header, blobs and checksums.
  [[nodiscard]] std::uint64_t file_bytes() const { return file_bytes_; }
  /// Blobs that are there.
  [[nodiscard]] std::size_t num_blobs() const { return checksums_.size(); }

  void append(std::span<const std::byte> blob);
  /// Syncs what is written and journals it.
  void checkpoint();
  /// Writes the checksums, syncs, renames to `path`.
  void finish();

 private:
  void resume(bool fresh);
  [[nodiscard]] std::size_t count_whole_blobs(const Journal& old) const;
  void reserve_disk() const;
  void begin_journal();

  Plan plan_;
  std::string partial_path_;
  std::string journal_path_;
  std::uint64_t file_bytes_ = 0;
  FileDescriptor file_;
  FileDescriptor journal_;
  std::uint64_t journal_bytes_ = 0;
  std::vector<std::uint32_t> checksums_;  ///< of the blobs that are written
  std::size_t num_journalled_ = 0;        ///< of those, how many are synced and journalled
  std::uint64_t offset_ = 0;              ///< behind the last blob
  std::uint64_t synced_offset_ = 0;
};

}  // namespace sluice
