#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/sha256.h"
#include "store/file.h"
#include "store/file_calls.h"
#include "store/io_scratch.h"
#include "store/journal.h"
#include "store/pack.h"
#include "store/pack_format.h"

namespace sluice {
namespace {

constexpr std::uint64_t kSyncBytes = 256 * kMiB;  // kernels.md section 2

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

bool same_file(int fd, const std::string& path) {
  struct stat open_file{};
  struct stat named{};
  return ::fstat(fd, &open_file) == 0 && ::stat(path.c_str(), &named) == 0 &&
         open_file.st_ino == named.st_ino && open_file.st_dev == named.st_dev;
}

// Opens `partial` and takes its lock. A writer that finished between our open and our lock has
// renamed the file away: then what we hold is its pack, and we open again.
FileDescriptor lock_partial(const std::string& partial, const std::string& journal) {
  for (;;) {
    FileDescriptor file(::open(partial.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    if (!file) throw IoError("open for writing", partial, 0, errno);
    if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      if (error == EINTR) continue;
      if (error != EWOULDBLOCK) throw IoError("lock", partial, 0, error);
      const std::int64_t pid = Journal::parse(read_journal(journal)).pid;
      throw IoError("lock: process " + (pid > 0 ? std::to_string(pid) : std::string("(unknown)")) +
                        " writes the same pack; wait for it, or stop it and run this again",
                    partial, 0, error);
    }
    if (same_file(file.get(), partial)) return file;
  }
}

void sync_data(int fd, const std::string& path) {
  while (file_calls().fdatasync(fd) != 0) {
    if (errno != EINTR) throw IoError("sync", path, 0, errno);
  }
}

// A rename is safe once the folder that holds the name is.
void sync_folder(const std::string& path) {
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  const std::string name = folder.empty() ? "." : folder.string();
  const FileDescriptor file(::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!file || ::fsync(file.get()) != 0) throw IoError("sync of the folder", name, 0, errno);
}

void rename_file(const std::string& from, const std::string& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) throw IoError("rename to " + to, from, 0, errno);
}

}  // namespace

struct PackWriter::Impl {
  std::string path;
  std::string partial;
  std::string journal_path;
  PackManifest manifest;
  std::string header;
  std::uint64_t file_bytes = 0;
  std::int64_t num_experts = 0;

  FileDescriptor file;
  FileDescriptor journal;
  std::uint64_t journal_bytes = 0;
  std::vector<std::uint32_t> checksums;  ///< of the blobs that are written
  std::size_t num_journalled = 0;        ///< of those, how many are synced and journalled
  std::int64_t resumed = 0;
  std::size_t layer = 0;  ///< of the next expert
  std::int32_t expert = 0;
  std::uint64_t offset = 0;
  std::uint64_t synced_offset = 0;
  AlignedBuffer blob;
  bool failed = false;
  bool finished = false;

  void begin(bool fresh);
  std::size_t count_resumable(const Journal& old);
  void reserve_disk() const;
  void write_journal(const Journal& old);
  void skip(std::size_t experts);
  void append(std::span<const std::byte> bytes);
  void checkpoint();
  void finish();

  // After a failed sync the kernel may call lost pages clean, so this writer never goes on; a new
  // one resumes from what is journalled.
  template <class Fn>
  void guarded(Fn&& fn) {
    require<InternalError>(!failed && !finished, [&] {
      return path + ": pack writer: got a call after it " + (failed ? "failed" : "finished") +
             ", expected none; make a new writer to resume";
    });
    failed = true;
    fn();
    failed = false;
  }
};

void PackWriter::Impl::begin(bool fresh) {
  file = lock_partial(partial, journal_path);
  Journal now{.header_sha256 = sha256_hex(header), .pid = ::getpid(), .checksums = {}};
  if (!fresh) {
    const Journal old = Journal::parse(read_journal(journal_path));
    struct stat info{};
    const bool begun = ::fstat(file.get(), &info) == 0 && info.st_size > 0;
    require<ConfigError>(
        !begun || old.header_sha256.empty() || old.header_sha256 == now.header_sha256, [&] {
          return path + ": pack writer: got a journal of another model, revision or layout in " +
                 journal_path + ", expected this one's; delete it and " + partial +
                 ", or pass fresh";
        });
    if (begun && old.header_sha256 == now.header_sha256) {
      now.checksums.assign(
          old.checksums.begin(),
          old.checksums.begin() + static_cast<std::ptrdiff_t>(count_resumable(old)));
    }
  }
  reserve_disk();
  write_exact(file.get(), partial, 0, bytes_of(header));
  sync_data(file.get(), partial);
  write_journal(now);
  skip(now.checksums.size());
  checksums = std::move(now.checksums);
  num_journalled = checksums.size();
  resumed = static_cast<std::int64_t>(checksums.size());
}

// How many journalled blobs an earlier run left whole: the last one is read again, and where it
// differs the one before it.
std::size_t PackWriter::Impl::count_resumable(const Journal& old) {
  std::string there(header.size(), '\0');
  const auto got =
      read_up_to(file.get(), partial, 0, there.size(), reinterpret_cast<std::byte*>(there.data()));
  if (got != header.size() || there != header) return 0;
  auto count = std::min(old.checksums.size(), static_cast<std::size_t>(num_experts));
  std::vector<std::pair<std::uint64_t, std::size_t>> places;  // offset, bytes
  std::uint64_t at = header.size();
  for (const StoredLayer& stored : manifest.layers) {
    for (std::int32_t e = 0; e < stored.num_experts && places.size() < count; ++e) {
      places.emplace_back(at, blob_bytes(stored.layout));
      at += places.back().second;
    }
  }
  for (; count > 0; --count) {
    const auto [begin, bytes] = places[count - 1];
    const auto held = read_up_to(file.get(), partial, begin, bytes, blob.data());
    if (held == bytes && crc32c(std::span(blob.data(), bytes)) == old.checksums[count - 1]) break;
  }
  return count;
}

// Refuses a disk that is too small, then reserves the blocks where the file system can.
void PackWriter::Impl::reserve_disk() const {
  struct stat info{};
  if (::fstat(file.get(), &info) != 0) throw IoError("stat", partial, 0, errno);
  const std::uint64_t held = static_cast<std::uint64_t>(info.st_blocks) * 512;
  const std::uint64_t needed = file_bytes > held ? file_bytes - held : 0;
  const std::uint64_t free = file_calls().free_bytes(file.get());
  if (needed > free) {
    throw IoError("pack: got " + std::to_string(free) + " free bytes on the disk, expected " +
                      std::to_string(needed) + "; make room or choose another folder",
                  partial, 0, ENOSPC);
  }
  if (::fallocate(file.get(), 0, 0, static_cast<off_t>(file_bytes)) != 0 && errno == ENOSPC) {
    throw IoError("pack: reserving " + std::to_string(file_bytes) +
                      " bytes; make room or choose another folder",
                  partial, 0, ENOSPC);
  }
}

// Begins the journal of this run by renaming, so that a crash leaves the old one or the new one.
void PackWriter::Impl::write_journal(const Journal& now) {
  std::string text = now.first_line();
  for (std::size_t i = 0; i < now.checksums.size(); ++i) text += Journal::line(i, now.checksums[i]);
  const std::string fresh = journal_path + ".new";
  journal = FileDescriptor(::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!journal) throw IoError("open for writing", fresh, 0, errno);
  write_exact(journal.get(), fresh, 0, bytes_of(text));
  sync_data(journal.get(), fresh);
  rename_file(fresh, journal_path);
  journal_bytes = text.size();
}

void PackWriter::Impl::skip(std::size_t experts) {
  offset = header.size();
  for (std::size_t i = 0; i < experts; ++i) {
    offset += blob_bytes(manifest.layers[layer].layout);
    if (++expert == manifest.layers[layer].num_experts) {
      expert = 0;
      ++layer;
    }
  }
  synced_offset = offset;
}

void PackWriter::Impl::append(std::span<const std::byte> bytes) {
  require<InternalError>(layer < manifest.layers.size(), [&] {
    return path + ": pack writer: got an expert more, expected " + std::to_string(num_experts);
  });
  const ExpertLayout& layout = manifest.layers[layer].layout;
  require<InternalError>(bytes.size() == layout.bytes(), [&] {
    return path + ": pack writer: got an expert of " + std::to_string(bytes.size()) +
           " bytes, expected " + std::to_string(layout.bytes());
  });
  const std::span<std::byte> padded(blob.data(), blob_bytes(layout));
  std::memcpy(padded.data(), bytes.data(), bytes.size());
  clear_gaps(layout, padded);
  write_exact(file.get(), partial, offset, padded);
  checksums.push_back(crc32c(padded));
  offset += padded.size();
  if (++expert == manifest.layers[layer].num_experts) {
    expert = 0;
    ++layer;
  }
  if (offset - synced_offset >= kSyncBytes) checkpoint();
}

void PackWriter::Impl::checkpoint() {
  if (num_journalled == checksums.size()) return;
  sync_data(file.get(), partial);
  (void)::posix_fadvise(file.get(), static_cast<off_t>(synced_offset),
                        static_cast<off_t>(offset - synced_offset), POSIX_FADV_DONTNEED);
  std::string lines;
  for (std::size_t i = num_journalled; i < checksums.size(); ++i) {
    lines += Journal::line(i, checksums[i]);
  }
  write_exact(journal.get(), journal_path, journal_bytes, bytes_of(lines));
  sync_data(journal.get(), journal_path);
  journal_bytes += lines.size();
  num_journalled = checksums.size();
  synced_offset = offset;
}

void PackWriter::Impl::finish() {
  require<InternalError>(layer == manifest.layers.size(), [&] {
    return path + ": pack writer: got " + std::to_string(checksums.size()) + " experts, expected " +
           std::to_string(num_experts);
  });
  std::vector<std::byte> tail;
  for (const std::uint32_t crc : checksums) {
    for (int b = 0; b < 4; ++b) tail.push_back(static_cast<std::byte>(crc >> (8 * b)));
  }
  write_exact(file.get(), partial, offset, tail);
  if (::ftruncate(file.get(), static_cast<off_t>(file_bytes)) != 0) {
    throw IoError("truncate", partial, file_bytes, errno);
  }
  sync_data(file.get(), partial);
  rename_file(partial, path);
  sync_folder(path);
  (void)::unlink(journal_path.c_str());  // one left behind is ignored: its .partial is gone
}

PackWriter::PackWriter(std::string path, PackManifest manifest, bool fresh)
    : impl_(std::make_unique<Impl>()) {
  manifest = PackManifest::from_json(manifest.to_json());  // what no reader would take is refused
  impl_->path = std::move(path);
  impl_->partial = impl_->path + ".partial";
  impl_->journal_path = impl_->path + ".journal";
  impl_->header = pack_header(manifest);
  impl_->num_experts = total_experts(manifest.layers);
  impl_->file_bytes = impl_->header.size() + total_blob_bytes(manifest.layers) +
                      static_cast<std::uint64_t>(impl_->num_experts) * sizeof(std::uint32_t);
  std::size_t largest = 0;
  for (const StoredLayer& layer : manifest.layers) {
    largest = std::max(largest, blob_bytes(layer.layout));
  }
  impl_->blob = AlignedBuffer(largest);
  impl_->manifest = std::move(manifest);
  impl_->begin(fresh);
}

PackWriter::~PackWriter() {
  if (impl_->finished || impl_->failed) return;
  try {
    impl_->checkpoint();
  } catch (const std::exception&) {
    // What is not journalled is written again by the resume.
  }
}

std::int64_t PackWriter::resumed_experts() const { return impl_->resumed; }
std::int64_t PackWriter::num_experts() const { return impl_->num_experts; }
std::uint64_t PackWriter::file_bytes() const { return impl_->file_bytes; }

void PackWriter::append(std::span<const std::byte> expert) {
  impl_->guarded([&] { impl_->append(expert); });
}

void PackWriter::finish() {
  impl_->guarded([&] { impl_->finish(); });
  impl_->finished = true;
  impl_->file = FileDescriptor();
  impl_->journal = FileDescriptor();
}

}  // namespace sluice
