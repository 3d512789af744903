#include "store/fault_disk.h"

#include <fcntl.h>

#include <algorithm>

namespace sluice::testing {

ssize_t FaultDisk::pread(int fd, void* target, std::size_t bytes, off_t offset) {
  FaultDisk& self = *self_;
  if (self.before_read) self.before_read();
  if (take(self.interrupted_calls)) return fail(EINTR);
  ++self.reads;
  if (due(self.read_fails_in)) return fail(self.error);
  if (self.refuses_direct && (::fcntl(fd, F_GETFL) & O_DIRECT) != 0) return fail(EINVAL);
  if (take(self.short_reads)) bytes = std::min(bytes, self.short_read_bytes.load());
  if (bytes % 512 == 0 || (::fcntl(fd, F_GETFL) & O_DIRECT) == 0) {
    return self.saved_.pread(fd, target, bytes, offset);
  }
  // O_DIRECT itself refuses odd lengths: read the block, give a part of it.
  const ssize_t got = self.saved_.pread(fd, target, (bytes + 4095) / 4096 * 4096, offset);
  return std::min(got, static_cast<ssize_t>(bytes));
}

ssize_t FaultDisk::pwrite(int fd, const void* source, std::size_t bytes, off_t offset) {
  FaultDisk& self = *self_;
  if (take(self.interrupted_calls)) return fail(EINTR);
  if (due(self.write_fails_in)) return fail(self.error);
  if (take(self.short_writes)) bytes = std::max<std::size_t>(1, bytes / 2);
  const ssize_t put = self.saved_.pwrite(fd, source, bytes, offset);
  if (self.after_write != nullptr) self.after_write();
  return put;
}

int FaultDisk::fdatasync(int fd) {
  FaultDisk& self = *self_;
  if (take(self.interrupted_calls)) return fail(EINTR);
  ++self.syncs;
  if (due(self.sync_fails_in)) return fail(self.error);
  const int result = self.saved_.fdatasync(fd);
  if (self.after_write != nullptr) self.after_write();
  return result;
}

int FaultDisk::flock(int fd, int operation) {
  if (self_->before_lock) self_->before_lock();
  return self_->saved_.flock(fd, operation);
}

std::uint64_t FaultDisk::free_bytes(int fd) {
  return std::min(self_->free.load(), self_->saved_.free_bytes(fd));
}

}  // namespace sluice::testing
