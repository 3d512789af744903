#include "store/pack/partial_pack.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "base/sha256.h"
#include "store/file_calls.h"
#include "store/io_scratch.h"

namespace sluice {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

bool same_file(int fd, const std::string& path) {
  struct stat opened{};
  struct stat named{};
  return ::fstat(fd, &opened) == 0 && ::stat(path.c_str(), &named) == 0 &&
         opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
}

// Opens `partial` and takes its lock. A writer that finished between our open and our lock has
// renamed the file away: then what we hold is its pack, and we open again.
FileDescriptor lock_partial(const std::string& partial, const std::string& journal) {
  for (;;) {
    FileDescriptor file(::open(partial.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    if (!file) throw IoError("open for writing", partial, 0, errno);
    if (file_calls().flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
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

std::uint64_t size_of(const FileDescriptor& file, const std::string& path, std::uint64_t* held) {
  struct stat info{};
  if (::fstat(file.get(), &info) != 0) throw IoError("stat", path, 0, errno);
  if (held != nullptr) *held = static_cast<std::uint64_t>(info.st_blocks) * 512;
  return static_cast<std::uint64_t>(info.st_size);
}

}  // namespace

PartialPack::PartialPack(Plan plan, bool fresh)
    : plan_(std::move(plan)),
      partial_path_(plan_.path + ".partial"),
      journal_path_(plan_.path + ".journal") {
  file_bytes_ = plan_.header.size() + plan_.blob_bytes.size() * sizeof(std::uint32_t);
  for (const std::size_t bytes : plan_.blob_bytes) file_bytes_ += bytes;
  file_ = lock_partial(partial_path_, journal_path_);
  try {
    resume(fresh);
    reserve_disk();
    write_exact(file_.get(), partial_path_, 0, bytes_of(plan_.header));
    sync_data(file_.get(), partial_path_);
    begin_journal();
  } catch (...) {
    // Nothing of worth yet: leave no trace. What an earlier run wrote stays.
    if (size_of(file_, partial_path_, nullptr) == 0) (void)::unlink(partial_path_.c_str());
    throw;
  }
}

void PartialPack::resume(bool fresh) {
  offset_ = plan_.header.size();
  if (!fresh && size_of(file_, partial_path_, nullptr) > 0) {
    const Journal old = Journal::parse(read_journal(journal_path_));
    const bool ours = old.header_sha256 == sha256_hex(plan_.header);
    require<ConfigError>(ours || old.header_sha256.empty(), [&] {
      return plan_.path + ": pack writer: got a journal of another model, revision or layout in " +
             journal_path_ + ", expected this one's; delete it and " + partial_path_ +
             ", or pass fresh";
    });
    if (ours) {
      const std::size_t count = count_whole_blobs(old);
      checksums_.assign(old.checksums.begin(),
                        old.checksums.begin() + static_cast<std::ptrdiff_t>(count));
      for (std::size_t i = 0; i < count; ++i) offset_ += plan_.blob_bytes[i];
    }
  }
  num_journalled_ = checksums_.size();
  synced_offset_ = offset_;
}

// How many journalled blobs are whole: the last one is read again, and where it differs the one
// before it.
std::size_t PartialPack::count_whole_blobs(const Journal& old) const {
  std::string header(plan_.header.size(), '\0');
  const std::size_t got = read_up_to(file_.get(), partial_path_, 0, header.size(),
                                     reinterpret_cast<std::byte*>(header.data()));
  if (got != header.size() || header != plan_.header) return 0;
  std::size_t count = std::min(old.checksums.size(), plan_.blob_bytes.size());
  std::uint64_t end = plan_.header.size();
  for (std::size_t i = 0; i < count; ++i) end += plan_.blob_bytes[i];
  for (; count > 0; --count) {
    const std::size_t bytes = plan_.blob_bytes[count - 1];
    end -= bytes;
    const AlignedBuffer blob(bytes);
    const std::size_t held = read_up_to(file_.get(), partial_path_, end, bytes, blob.data());
    if (held == bytes && crc32c(std::span(blob.data(), bytes)) == old.checksums[count - 1]) break;
  }
  return count;
}

// Refuses a disk that is too small, then reserves the blocks where the file system can.
void PartialPack::reserve_disk() const {
  std::uint64_t held = 0;
  (void)size_of(file_, partial_path_, &held);
  const std::uint64_t needed = file_bytes_ > held ? file_bytes_ - held : 0;
  const std::uint64_t free = file_calls().free_bytes(file_.get());
  if (needed > free) {
    throw IoError("pack: got " + std::to_string(free) + " free bytes on the disk, expected " +
                      std::to_string(needed) + "; make room or choose another folder",
                  partial_path_, 0, ENOSPC);
  }
  if (::fallocate(file_.get(), FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(file_bytes_)) != 0 &&
      errno == ENOSPC) {
    throw IoError("pack: reserving " + std::to_string(file_bytes_) +
                      " bytes; make room or choose another folder",
                  partial_path_, 0, ENOSPC);
  }
}

// Begins this run's journal by renaming, so that a crash leaves the old one or the new one.
void PartialPack::begin_journal() {
  const Journal now{.header_sha256 = sha256_hex(plan_.header), .pid = ::getpid(), .checksums = {}};
  std::string text = now.first_line();
  for (std::size_t i = 0; i < checksums_.size(); ++i) text += Journal::line(i, checksums_[i]);
  const std::string fresh = journal_path_ + ".new";
  journal_ = FileDescriptor(::open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!journal_) throw IoError("open for writing", fresh, 0, errno);
  write_exact(journal_.get(), fresh, 0, bytes_of(text));
  sync_data(journal_.get(), fresh);
  rename_file(fresh, journal_path_);
  journal_bytes_ = text.size();
}

void PartialPack::append(std::span<const std::byte> blob) {
  write_exact(file_.get(), partial_path_, offset_, blob);
  checksums_.push_back(crc32c(blob));
  offset_ += blob.size();
  if (offset_ - synced_offset_ >= plan_.sync_bytes) checkpoint();
}

void PartialPack::checkpoint() {
  if (num_journalled_ == checksums_.size()) return;
  sync_data(file_.get(), partial_path_);
  (void)::posix_fadvise(file_.get(), static_cast<off_t>(synced_offset_),
                        static_cast<off_t>(offset_ - synced_offset_), POSIX_FADV_DONTNEED);
  std::string lines;
  for (std::size_t i = num_journalled_; i < checksums_.size(); ++i) {
    lines += Journal::line(i, checksums_[i]);
  }
  write_exact(journal_.get(), journal_path_, journal_bytes_, bytes_of(lines));
  sync_data(journal_.get(), journal_path_);
  journal_bytes_ += lines.size();
  num_journalled_ = checksums_.size();
  synced_offset_ = offset_;
}

void PartialPack::finish() {
  std::vector<std::byte> tail;
  for (const std::uint32_t crc : checksums_) {
    for (int byte = 0; byte < 4; ++byte) tail.push_back(static_cast<std::byte>(crc >> (8 * byte)));
  }
  write_exact(file_.get(), partial_path_, offset_, tail);
  if (::ftruncate(file_.get(), static_cast<off_t>(file_bytes_)) != 0) {
    throw IoError("truncate", partial_path_, file_bytes_, errno);
  }
  sync_data(file_.get(), partial_path_);
  rename_file(partial_path_, plan_.path);
  sync_folder(plan_.path);
  (void)::unlink(journal_path_.c_str());  // one left behind is ignored: its .partial is gone
  file_ = FileDescriptor();
  journal_ = FileDescriptor();
}

}  // namespace sluice
