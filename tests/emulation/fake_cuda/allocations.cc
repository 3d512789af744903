// The calls that give memory and take it back.
#include "tests/emulation/fake_cuda/runtime.h"
#include "tests/emulation/registry.h"

namespace fake {
namespace {

using Kind = Allocation::Kind;

cudaError_t allocate(Session& session, Kind kind, void** result, std::size_t bytes) {
  if (bytes == 0) {
    *result = nullptr;
    return cudaSuccess;
  }
  std::string why;
  const cudaError_t error =
      session.runtime.memory.allocate(kind, session.thread.device, bytes, result, &why);
  return error == cudaSuccess ? error : session.fail(error, why);
}

// Pinned memory that goes away under a copy: CUDA lets it pass, and the copy engine reads whatever
// lies there then.
void report_users(Session& session, const Allocation& allocation) {
  for (const auto& stream : session.runtime.streams) {
    for (const auto& work : stream->queue) {
      if (!work->uses(allocation)) continue;
      session.report("got " + allocation.name + " while a " + work->name() + " is queued on " +
                     stream->name() + ", expected memory that no queued work uses; wait first");
    }
  }
}

cudaError_t give_back_host(Session& session, Kind kind, void* base, cudaError_t unknown) {
  const Allocation* const allocation = session.runtime.memory.at(base, kind);
  if (allocation == nullptr) {
    return session.fail(unknown, "got " + simt::describe(base) + ", expected the start of a live " +
                                     (kind == Kind::kPinned ? "allocation" : "registered range"));
  }
  report_users(session, *allocation);
  session.runtime.memory.release(*allocation);
  return cudaSuccess;
}

}  // namespace
}  // namespace fake

using fake::Allocation;
using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaMalloc(void** result, size_t bytes) {
  return call(Api::kMalloc, nullptr, [&](Session& session) {
    return fake::allocate(session, Allocation::Kind::kDevice, result, bytes);
  });
}

cudaError_t cudaFree(void* base) {
  return call(Api::kFree, nullptr, [&](Session& session) {
    if (base == nullptr) return cudaSuccess;
    const Allocation* allocation = session.runtime.memory.at(base, Allocation::Kind::kDevice);
    if (allocation == nullptr) {
      return session.fail(cudaErrorInvalidValue, "got " + simt::describe(base) +
                                                     ", expected the start of a live allocation");
    }
    session.note_host_wait();
    const int device = allocation->device;
    session.drive(session.tails(device));
    // Looked up again: the lock was free in between, and two threads may free the same.
    allocation = session.runtime.memory.at(base, Allocation::Kind::kDevice);
    if (allocation == nullptr) {
      return session.fail(cudaErrorInvalidValue, "got memory that another thread freed meanwhile");
    }
    session.runtime.memory.release(*allocation);
    return session.runtime.devices.at(device).fault;
  });
}

cudaError_t cudaHostAlloc(void** result, size_t bytes, unsigned flags) {
  return call(Api::kHostAlloc, nullptr, [&](Session& session) {
    if ((flags & ~unsigned{cudaHostAllocPortable | cudaHostAllocMapped}) != 0) {
      return session.fail(cudaErrorInvalidValue,
                          "got flags " + std::to_string(flags) + ", expected portable or mapped");
    }
    return fake::allocate(session, Allocation::Kind::kPinned, result, bytes);
  });
}

cudaError_t cudaFreeHost(void* base) {
  return call(Api::kFreeHost, nullptr, [&](Session& session) {
    if (base == nullptr) return cudaSuccess;
    return fake::give_back_host(session, Allocation::Kind::kPinned, base, cudaErrorInvalidValue);
  });
}

cudaError_t cudaHostRegister(void* base, size_t bytes, unsigned flags) {
  return call(Api::kHostRegister, nullptr, [&](Session& session) {
    if ((flags & ~unsigned{cudaHostRegisterPortable | cudaHostRegisterMapped}) != 0) {
      return session.fail(cudaErrorNotSupported,
                          "got flags " + std::to_string(flags) + ", expected portable or mapped");
    }
    std::string why;
    const cudaError_t error =
        session.runtime.memory.register_range(session.thread.device, base, bytes, &why);
    return error == cudaSuccess ? error : session.fail(error, why);
  });
}

cudaError_t cudaHostUnregister(void* base) {
  return call(Api::kHostUnregister, nullptr, [&](Session& session) {
    return fake::give_back_host(session, Allocation::Kind::kRegistered, base,
                                cudaErrorHostMemoryNotRegistered);
  });
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return call(Api::kMemGetInfo, nullptr, [&](Session& session) {
    *total_bytes = session.runtime.options.device_bytes;
    *free_bytes = *total_bytes - session.runtime.memory.used_bytes(session.thread.device);
    return cudaSuccess;
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return call(Api::kPointerGetAttributes, nullptr, [&](Session& session) {
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = cudaInvalidDeviceId;
    if (const Allocation* const found = session.runtime.memory.find(pointer)) {
      attributes->type = found->on_host() ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
      attributes->device = found->device;
      attributes->devicePointer = const_cast<void*>(pointer);
      attributes->hostPointer = found->on_host() ? const_cast<void*>(pointer) : nullptr;
    }
    return cudaSuccess;
  });
}

}  // extern "C"
