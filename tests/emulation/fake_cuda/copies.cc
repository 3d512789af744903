// Copies and fills, chunk by chunk.
#include <algorithm>
#include <array>
#include <cstring>

#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"
#include "tests/emulation/registry.h"

namespace fake {
namespace {

// One end of a copy, looked up at the call and again at every step: memory may have been freed,
// and given to somebody else, in between.
struct End {
  char* data = nullptr;
  std::uint64_t serial = 0;  ///< of its allocation; 0: pageable memory of the host

  [[nodiscard]] bool alive(const Memory& memory) const {
    if (serial == 0) return true;
    const Allocation* const found = memory.find(data);
    return found != nullptr && found->serial == serial;
  }
};

class Copy final : public Work {
 public:
  Copy(End target, End source, std::size_t bytes, std::string target_name)
      : target_(target), source_(source), bytes_(bytes), target_name_(std::move(target_name)) {}

  /// Reads a pageable source now, as CUDA does: it may change once the call has returned.
  void stage() {
    staged_.assign(source_.data, source_.data + bytes_);
    source_.data = staged_.data();
  }

  Progress step(Session& session, CUstream_st& stream) override {
    Runtime& runtime = session.runtime;
    for (const End* const end : std::array<const End*, 2>{&target_, &source_}) {
      if (end->alive(runtime.memory)) continue;
      session.lose(runtime.devices.at(stream.device), cudaErrorIllegalAddress,
                   name() + " on " + stream.name() + (end == &source_ ? " reads " : " writes ") +
                       simt::describe(end->data));
      return Progress::kFailed;
    }
    if (!begun_) {
      begin(runtime);
      return Progress::kMore;
    }
    const std::size_t at = chunks_.back();
    chunks_.pop_back();
    const std::size_t bytes = std::min(runtime.options.chunk_bytes, bytes_ - at);
    std::memcpy(target_.data + at, source_.data + at, bytes);
    if (target_.serial != 0) {
      simt::copy_definedness(target_.data + at, source_.data + at, bytes);
    }
    return chunks_.empty() ? Progress::kDone : Progress::kMore;
  }

  [[nodiscard]] std::unique_ptr<Work> clone() const override {
    return std::make_unique<Copy>(target_, source_, bytes_, target_name_);
  }
  [[nodiscard]] std::string name() const override {
    return "copy of " + std::to_string(bytes_) + " bytes to " + target_name_;
  }
  [[nodiscard]] bool uses(const Allocation& allocation) const override {
    return target_.serial == allocation.serial || source_.serial == allocation.serial;
  }

 private:
  // Until a chunk has landed its bytes are nobody's, and chunks land in any order: whoever reads
  // early, or counts on the first bytes being first, gets a NaN.
  void begin(Runtime& runtime) {
    begun_ = true;
    if (target_.serial != 0) {
      simt::poison(target_.data, bytes_);
    } else {
      std::memset(target_.data, 0xFF, bytes_);
    }
    for (std::size_t at = 0; at < bytes_; at += runtime.options.chunk_bytes) chunks_.push_back(at);
    std::shuffle(chunks_.begin(), chunks_.end(), runtime.rng);
  }

  const End target_;
  End source_;
  const std::size_t bytes_;
  const std::string target_name_;
  std::vector<char> staged_;
  std::vector<std::size_t> chunks_;  // offsets that have not landed
  bool begun_ = false;
};

class Fill final : public Work {
 public:
  Fill(End target, int value, std::size_t bytes, std::string target_name)
      : target_(target), value_(value), bytes_(bytes), target_name_(std::move(target_name)) {}

  Progress step(Session& session, CUstream_st& stream) override {
    if (!target_.alive(session.runtime.memory)) {
      session.lose(session.runtime.devices.at(stream.device), cudaErrorIllegalAddress,
                   name() + " on " + stream.name() + " writes " + simt::describe(target_.data));
      return Progress::kFailed;
    }
    std::memset(target_.data, value_, bytes_);
    simt::mark_defined(target_.data, bytes_);
    return Progress::kDone;
  }
  [[nodiscard]] std::unique_ptr<Work> clone() const override {
    return std::make_unique<Fill>(target_, value_, bytes_, target_name_);
  }
  [[nodiscard]] std::string name() const override {
    return "fill of " + std::to_string(bytes_) + " bytes of " + target_name_;
  }
  [[nodiscard]] bool uses(const Allocation& allocation) const override {
    return target_.serial == allocation.serial;
  }

 private:
  const End target_;
  const int value_;
  const std::size_t bytes_;
  const std::string target_name_;
};

// Looks up one end of a copy. Errors: a range that leaves its allocation, one that was freed, and
// memory of another device than the stream's.
cudaError_t find_end(Session& session, const CUstream_st& stream, const void* data,
                     std::size_t bytes, const char* role, End* end, const Allocation** allocation) {
  Memory& memory = session.runtime.memory;
  *allocation = memory.find(data);
  end->data = static_cast<char*>(const_cast<void*>(data));
  const std::string asked = std::string("got a ") + role + " of " + std::to_string(bytes) +
                            " bytes at " + simt::describe(data);
  if (*allocation == nullptr) {
    const simt::Region* const near = simt::find_nearest_region(data);
    if (near != nullptr && near->freed && end->data >= near->base &&
        end->data < near->base + near->bytes) {
      return session.fail(cudaErrorInvalidValue, asked + ", expected memory that is alive");
    }
    if (const Allocation* const behind = memory.find_overlap(data, bytes)) {
      return session.fail(cudaErrorInvalidValue,
                          asked + ", expected one that does not run into " + behind->name);
    }
    return cudaSuccess;
  }
  end->serial = (*allocation)->serial;
  const std::size_t left =
      (*allocation)->bytes - static_cast<std::size_t>(end->data - (*allocation)->base);
  if (bytes > left) {
    return session.fail(cudaErrorInvalidValue,
                        asked + ", expected at most " + std::to_string(left));
  }
  if (!(*allocation)->on_host() && (*allocation)->device != stream.device) {
    session.report(asked + " on " + stream.name() + ", expected memory of that device");
    return session.fail(cudaErrorInvalidValue,
                        asked + " on " + stream.name() + ", expected memory of that device");
  }
  return cudaSuccess;
}

// Whether the direction that the caller names is the one that the addresses have.
bool is_direction(cudaMemcpyKind kind, bool to_device, bool from_device) {
  switch (kind) {
    case cudaMemcpyHostToDevice:
      return to_device && !from_device;
    case cudaMemcpyDeviceToHost:
      return !to_device && from_device;
    case cudaMemcpyDeviceToDevice:
      return to_device && from_device;
    case cudaMemcpyHostToHost:
      return !to_device && !from_device;
    case cudaMemcpyDefault:
      return true;
  }
  return false;
}

const char* place(const Allocation* allocation) {
  if (allocation == nullptr) return "pageable";
  return allocation->on_host() ? "pinned" : "device";
}

cudaError_t copy(Session& session, void* to, const void* from, std::size_t bytes,
                 cudaMemcpyKind kind, cudaStream_t handle) {
  cudaError_t error = cudaSuccess;
  CUstream_st* const stream = session.stream(handle, &error);
  if (stream == nullptr || bytes == 0) return error;
  End target;
  End source;
  const Allocation* target_allocation = nullptr;
  const Allocation* source_allocation = nullptr;
  error = find_end(session, *stream, to, bytes, "target", &target, &target_allocation);
  if (error != cudaSuccess) return error;
  error = find_end(session, *stream, from, bytes, "source", &source, &source_allocation);
  if (error != cudaSuccess) return error;
  const bool to_device = target_allocation != nullptr && !target_allocation->on_host();
  const bool from_device = source_allocation != nullptr && !source_allocation->on_host();
  if (!is_direction(kind, to_device, from_device)) {
    return session.fail(cudaErrorInvalidValue,
                        "got direction " + std::to_string(static_cast<int>(kind)) + " from " +
                            place(source_allocation) + " to " + place(target_allocation) +
                            " memory, expected the one of the addresses");
  }
  const bool pageable = source.serial == 0 || target.serial == 0;
  if (pageable && stream->capture != nullptr) {
    return refuse_captured(session, *stream, "a copy with pageable memory");
  }
  const std::string target_name =
      target_allocation != nullptr ? target_allocation->name : "pageable memory";
  auto work = std::make_unique<Copy>(target, source, bytes, target_name);
  if (source.serial == 0) work->stage();
  Stats& counts = session.runtime.counts;
  ++counts.copies;
  counts.copied_bytes += bytes;
  if (pageable) ++counts.pageable_copies;

  const std::shared_ptr<Record> record = work->record;
  error = session.push(*stream, std::move(work));
  // Into pageable memory, and from host to host, the call returns behind the copy.
  if (error == cudaSuccess && (target.serial == 0 || (!to_device && !from_device))) {
    session.note_host_wait();
    session.drive({record});
    error = session.runtime.devices.at(stream->device).fault;
  }
  return error;
}

}  // namespace
}  // namespace fake

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return call(Api::kMemcpyAsync, stream, [&](Session& session) {
    return fake::copy(session, target, source, bytes, kind, stream);
  });
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t handle) {
  return call(Api::kMemsetAsync, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr || bytes == 0) return error;
    fake::End end;
    const fake::Allocation* allocation = nullptr;
    error = fake::find_end(session, *stream, target, bytes, "target", &end, &allocation);
    if (error != cudaSuccess) return error;
    if (allocation == nullptr) {
      return session.fail(cudaErrorInvalidValue, "got pageable memory at " + fake::hex(target) +
                                                     ", expected device or pinned memory");
    }
    return session.push(*stream, std::make_unique<fake::Fill>(end, value, bytes, allocation->name));
  });
}

}  // extern "C"
