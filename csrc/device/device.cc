#include "device/device.h"

#include <string>
#include <utility>

#include "base/error.h"

namespace sluice {

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : owner_(std::exchange(other.owner_, nullptr)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      kind_(other.kind_) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  DeviceBuffer taken(std::move(other));
  std::swap(owner_, taken.owner_);
  std::swap(data_, taken.data_);
  std::swap(bytes_, taken.bytes_);
  std::swap(kind_, taken.kind_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (owner_ != nullptr && data_ != nullptr) owner_->free_buffer(data_, bytes_, kind_);
}

DeviceBuffer Device::allocate_pinned(std::size_t bytes) {
  DeviceBuffer buffer = allocate_host(bytes);
  require<CapacityError>(bytes == 0 || pin(buffer), [&] {
    return "pinned memory: got a refusal for " + std::to_string(bytes) +
           " bytes, expected pages that the copy engine may read; raise the limit of locked memory "
           "(ulimit -l) or free some";
  });
  return buffer;
}

}  // namespace sluice
