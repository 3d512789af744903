// Which devices there are, what they say of themselves, and errors.
#include "tests/emulation/fake_cuda/runtime.h"

namespace fake {
namespace {

struct ErrorText {
  cudaError_t code;
  const char* name;
  const char* text;
};

// Those that this runtime returns or tests inject; texts as CUDA has them.
#define SLUICE_ERROR(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    SLUICE_ERROR(cudaSuccess, "no error"),
    SLUICE_ERROR(cudaErrorInvalidValue, "invalid argument"),
    SLUICE_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    SLUICE_ERROR(cudaErrorInitializationError, "initialization error"),
    SLUICE_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    SLUICE_ERROR(cudaErrorInsufficientDriver,
                 "CUDA driver version is insufficient for CUDA runtime version"),
    SLUICE_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    SLUICE_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    SLUICE_ERROR(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    SLUICE_ERROR(cudaErrorNoKernelImageForDevice,
                 "no kernel image is available for execution on the device"),
    SLUICE_ERROR(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    SLUICE_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    SLUICE_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    SLUICE_ERROR(cudaErrorNotReady, "device not ready"),
    SLUICE_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    SLUICE_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    SLUICE_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    SLUICE_ERROR(cudaErrorHostMemoryAlreadyRegistered,
                 "part or all of the requested memory range is already mapped"),
    SLUICE_ERROR(cudaErrorHostMemoryNotRegistered,
                 "pointer does not correspond to a registered memory region"),
    SLUICE_ERROR(cudaErrorHardwareStackError, "hardware stack error"),
    SLUICE_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    SLUICE_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    SLUICE_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    SLUICE_ERROR(cudaErrorNotSupported, "operation not supported"),
    SLUICE_ERROR(cudaErrorStreamCaptureUnsupported,
                 "operation not permitted when stream is capturing"),
    SLUICE_ERROR(cudaErrorStreamCaptureInvalidated,
                 "operation failed due to a previous error during capture"),
    SLUICE_ERROR(cudaErrorStreamCaptureIsolation,
                 "dependency created on uncaptured work in another stream"),
    SLUICE_ERROR(cudaErrorStreamCaptureImplicit,
                 "operation would make the legacy stream depend on a capturing blocking stream"),
    SLUICE_ERROR(cudaErrorCapturedEvent,
                 "operation not permitted on an event last recorded in a capturing stream"),
    SLUICE_ERROR(cudaErrorStreamCaptureWrongThread,
                 "attempt to terminate a thread-local capture sequence from another thread"),
    SLUICE_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef SLUICE_ERROR

const ErrorText& find_error(cudaError_t code) {
  static constexpr ErrorText kUnrecognized = {cudaErrorUnknown, "unrecognized error code",
                                              "unrecognized error code"};
  for (const ErrorText& error : kErrors) {
    if (error.code == code) return error;
  }
  return kUnrecognized;
}

// False: not emulated.
bool find_attribute(const DeviceModel& model, cudaDeviceAttr attribute, int* value) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = model.compute_major;
      return true;
    case cudaDevAttrComputeCapabilityMinor:
      *value = model.compute_minor;
      return true;
    case cudaDevAttrMultiProcessorCount:
      *value = model.num_multiprocessors;
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return true;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(model.shared_bytes_per_block_optin);
      return true;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(model.shared_bytes_per_multiprocessor);
      return true;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(model.l2_bytes);
      return true;
    case cudaDevAttrWarpSize:
      *value = 32;
      return true;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return true;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return true;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = 65'536;
      return true;
    case cudaDevAttrAsyncEngineCount:
      *value = 3;
      return true;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
      *value = 1;
      return true;
    case cudaDevAttrPciDomainId:
    case cudaDevAttrPciBusId:
    case cudaDevAttrPciDeviceId:
    case cudaDevAttrIntegrated:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrHostRegisterReadOnlySupported:
    case cudaDevAttrComputeMode:
      *value = 0;
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace fake

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  return call(Api::kGetDeviceCount, nullptr, [&](Session& session) {
    *count = session.runtime.options.num_devices;
    return *count > 0 ? cudaSuccess : session.fail(cudaErrorNoDevice, "got no device");
  });
}

cudaError_t cudaSetDevice(int ordinal) {
  return call(Api::kSetDevice, nullptr, [&](Session& session) {
    if (ordinal < 0 || ordinal >= session.runtime.options.num_devices) {
      return session.fail(cudaErrorInvalidDevice,
                          "got device " + std::to_string(ordinal) + ", expected one of " +
                              std::to_string(session.runtime.options.num_devices));
    }
    session.thread.device = ordinal;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDevice(int* ordinal) {
  return call(Api::kGetDevice, nullptr, [&](Session& session) {
    *ordinal = session.thread.device;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return call(Api::kDeviceGetAttribute, nullptr, [&](Session& session) {
    if (device < 0 || device >= session.runtime.options.num_devices) {
      return session.fail(cudaErrorInvalidDevice, "got device " + std::to_string(device));
    }
    if (fake::find_attribute(session.runtime.options.model, attribute, value)) return cudaSuccess;
    return session.fail(cudaErrorInvalidValue,
                        "got attribute " + std::to_string(static_cast<int>(attribute)) +
                            ", which is not emulated; add it to tests/emulation/fake_cuda");
  });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return call(Api::kRuntimeGetVersion, nullptr, [&](Session& /*session*/) {
    *version = CUDART_VERSION;
    return cudaSuccess;
  });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return call(Api::kDriverGetVersion, nullptr, [&](Session& /*session*/) {
    *version = CUDART_VERSION;
    return cudaSuccess;
  });
}

cudaError_t cudaPeekAtLastError() {
  Session session(Api::kPeekAtLastError, nullptr);
  return session.thread.last_error;
}

cudaError_t cudaGetLastError() {
  Session session(Api::kGetLastError, nullptr);
  const cudaError_t last = session.thread.last_error;
  // A lost device stays lost; everything else is told once.
  session.thread.last_error =
      session.runtime.devices.empty() ? cudaSuccess : session.device().fault;
  return last;
}

const char* cudaGetErrorName(cudaError_t error) { return fake::find_error(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return fake::find_error(error).text; }

}  // extern "C"
