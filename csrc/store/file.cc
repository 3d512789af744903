#include "store/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>

#include "base/bytes.h"
#include "base/error.h"
#include "store/file_calls.h"

namespace sluice {
namespace {

std::uint64_t free_bytes_of(int fd) {
  struct statvfs info{};
  if (::fstatvfs(fd, &info) != 0) return UINT64_MAX;  // unknown: the write itself will tell
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

ssize_t pread_uninterrupted(int fd, std::byte* target, std::size_t bytes, std::uint64_t offset) {
  for (;;) {
    const ssize_t got = file_calls().pread(fd, target, bytes, static_cast<off_t>(offset));
    if (got >= 0 || errno != EINTR) return got;
  }
}

// Whether the file system grants O_DIRECT at our alignment, where it can be asked.
bool direct_alignment_fits(int fd) {
#if defined(STATX_DIOALIGN)
  struct statx info{};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) != 0) {
    return info.stx_dio_offset_align > 0 && info.stx_dio_offset_align <= kDirectAlignment &&
           info.stx_dio_mem_align <= kDirectAlignment;
  }
#endif
  return fd >= 0;
}

std::string identity_of(const struct stat& info) {
  return std::to_string(info.st_dev) + ":" + std::to_string(info.st_ino) + ":" +
         std::to_string(info.st_size) + ":" + std::to_string(info.st_mtim.tv_sec) + "." +
         std::to_string(info.st_mtim.tv_nsec);
}

// `buffered` once more, by O_DIRECT; none where the path names another file by now.
FileDescriptor open_direct(const std::string& path, const struct stat& buffered) {
#if defined(O_DIRECT)
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
  struct stat info{};
  const bool same = file && ::fstat(file.get(), &info) == 0 && info.st_ino == buffered.st_ino &&
                    info.st_dev == buffered.st_dev;
  if (same && direct_alignment_fits(file.get())) return file;
#endif
  return FileDescriptor();
}

}  // namespace

FileCalls& file_calls() noexcept {
  static FileCalls calls{::pread, ::pwrite, ::fdatasync, ::flock, free_bytes_of};
  return calls;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

ReadFile::ReadFile(const std::string& path, bool direct) : path_(path), direct_wanted_(direct) {
  buffered_ = FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!buffered_) throw IoError("open for reading", path, 0, errno);
  struct stat info{};
  if (::fstat(buffered_.get(), &info) != 0) throw IoError("stat", path, 0, errno);
  if (!S_ISREG(info.st_mode)) {
    throw IoError("open for reading: got something else, expected a regular file", path, 0, 0);
  }
  bytes_ = static_cast<std::uint64_t>(info.st_size);
  identity_ = identity_of(info);
  if (direct) direct_ = open_direct(path, info);
}

void ReadFile::read_aligned(std::uint64_t offset, std::size_t bytes, std::size_t needed,
                            std::byte* target, Cost& cost) const {
  int fd = direct_ ? direct_.get() : buffered_.get();
  bool retried = false;
  std::size_t held = 0;
  for (;;) {
    const ssize_t got = pread_uninterrupted(fd, target + held, bytes - held, offset + held);
    if (got < 0) {
      if (errno == EINVAL && fd != buffered_.get()) {
        fd = buffered_.get();
        continue;
      }
      throw IoError("read of " + std::to_string(needed) + " bytes", path_, offset + held, errno);
    }
    cost.bytes += static_cast<std::uint64_t>(got);
    held += static_cast<std::size_t>(got);
    if (held >= needed) break;
    if (retried) {
      throw IoError("short read: got " + std::to_string(held) + " bytes, expected " +
                        std::to_string(needed) +
                        "; the file was cut or the disk fails: check it, then copy it again",
                    path_, offset, 0);
    }
    retried = true;
    ++cost.retries;
    held = align_down(held, kDirectAlignment);  // O_DIRECT goes on at a multiple only
  }
  if (direct_wanted_ && fd == buffered_.get()) {
    ++cost.buffered;
    (void)::posix_fadvise(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                          POSIX_FADV_DONTNEED);
  }
}

void ReadFile::read_exact(std::uint64_t offset, std::size_t bytes, std::byte* target) const {
  const std::size_t got = read_up_to(buffered_.get(), path_, offset, bytes, target);
  if (got < bytes) {
    throw IoError("short read: got " + std::to_string(got) + " bytes, expected " +
                      std::to_string(bytes) + "; the file was cut: copy it again",
                  path_, offset, 0);
  }
}

std::string file_identity(int fd, const std::string& path) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) throw IoError("stat", path, 0, errno);
  return identity_of(info);
}

void write_exact(int fd, const std::string& path, std::uint64_t offset,
                 std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t put =
        file_calls().pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      const int error = put < 0 ? errno : ENOSPC;
      throw IoError(
          error == ENOSPC || error == EDQUOT ? "write: make room, then run it again" : "write",
          path, offset, error);
    }
    offset += static_cast<std::uint64_t>(put);
    bytes = bytes.subspan(static_cast<std::size_t>(put));
  }
}

std::size_t read_up_to(int fd, const std::string& path, std::uint64_t offset, std::size_t bytes,
                       std::byte* target) {
  std::size_t held = 0;
  while (held < bytes) {
    const ssize_t got = pread_uninterrupted(fd, target + held, bytes - held, offset + held);
    if (got < 0) {
      throw IoError("read of " + std::to_string(bytes) + " bytes", path, offset + held, errno);
    }
    if (got == 0) break;
    held += static_cast<std::size_t>(got);
  }
  return held;
}

}  // namespace sluice
