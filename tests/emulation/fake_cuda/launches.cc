// Kernels and host functions.
#include "kernels/launch.h"

#include <algorithm>
#include <sstream>

#include "tests/emulation/fake_cuda/graph.h"
#include "tests/emulation/fake_cuda/runtime.h"
#include "tests/emulation/simt.h"

namespace fake {
namespace {

struct Launch {
  std::string name;
  dim3 grid;
  dim3 block;
  std::size_t shared_bytes = 0;
  bool overlap_previous = false;
  void (*body)(const void* arguments) = nullptr;
  std::shared_ptr<const void> arguments;
  std::size_t argument_bytes = 0;
};

class Kernel final : public Work {
 public:
  explicit Kernel(Launch launch) : launch_(std::move(launch)) {}

  Progress step(Session& session, CUstream_st& stream) override {
    if (finished_early_) return Progress::kDone;
    simt::Grid& grid = begun_grid(stream);
    grid.set_dependency_done(true);
    return take_step(session, stream, grid);
  }

  bool step_early(Session& session, CUstream_st& stream) override {
    if (!launch_.overlap_previous || stopped_early_) return false;
    Runtime& runtime = session.runtime;
    // By chance under kRandom, always under the other policies.
    if (grid_ == nullptr && runtime.options.policy == Policy::kRandom && runtime.rng() % 2 == 0) {
      stopped_early_ = true;
      return false;
    }
    if (grid_ == nullptr) ++runtime.counts.early_prologues;
    simt::Grid& grid = begun_grid(stream);
    grid.set_dependency_done(false);
    const Progress progress = take_step(session, stream, grid);
    finished_early_ = progress == Progress::kDone;
    // Blocked, spinning, finished or failed: nothing more before the grid ahead has ended.
    if (progress != Progress::kFailed) stopped_early_ = progress != Progress::kMore;
    return true;
  }

  [[nodiscard]] std::unique_ptr<Work> clone() const override {
    return std::make_unique<Kernel>(launch_);
  }
  [[nodiscard]] std::string name() const override { return "kernel " + launch_.name; }
  [[nodiscard]] bool is_grid() const override { return true; }

 private:
  simt::Grid& begun_grid(const CUstream_st& stream) {
    if (grid_ == nullptr) {
      grid_ = std::make_unique<simt::Grid>(launch_.name.c_str(), launch_.grid, launch_.block,
                                           launch_.shared_bytes, launch_.body, launch_.arguments,
                                           launch_.argument_bytes);
      grid_->set_device(stream.device);
    }
    return *grid_;
  }

  Progress take_step(Session& session, CUstream_st& stream, simt::Grid& grid) {
    switch (grid.step()) {
      case simt::Grid::Step::kProgress:
        return Progress::kMore;
      case simt::Grid::Step::kDone:
        return Progress::kDone;
      case simt::Grid::Step::kBlockedOnDependency:
        return Progress::kBlocked;
      case simt::Grid::Step::kSpinning:
        return Progress::kSpinning;
      case simt::Grid::Step::kFailed:
        break;
    }
    // What a GPU says of nearly everything a kernel does wrong. The text says more.
    session.lose(session.runtime.devices.at(stream.device), cudaErrorIllegalAddress,
                 grid.error() + " [on " + stream.name() + "]");
    return Progress::kFailed;
  }

  const Launch launch_;
  std::unique_ptr<simt::Grid> grid_;
  bool stopped_early_ = false;
  bool finished_early_ = false;
};

class HostCall final : public Work {
 public:
  HostCall(cudaHostFn_t function, void* data) : function_(function), data_(data) {}

  // Without the lock: other threads go on, and the function may wait for them.
  Progress step(Session& session, CUstream_st& stream) override {
    const cudaHostFn_t function = function_;
    void* const data = data_;
    stream.running_host_function = true;
    if (session.runtime.num_drivers == 1) session.runtime.memory.close();
    session.lock.unlock();
    session.thread.in_host_function = true;
    function(data);
    session.thread.in_host_function = false;
    session.lock.lock();
    stream.running_host_function = false;
    // The device may have been lost meanwhile, and this with its queue: touch no member.
    return stream.queue.empty() ? Progress::kFailed : Progress::kDone;
  }
  [[nodiscard]] std::unique_ptr<Work> clone() const override {
    return std::make_unique<HostCall>(function_, data_);
  }
  [[nodiscard]] std::string name() const override { return "host function"; }

 private:
  const cudaHostFn_t function_;
  void* const data_;
};

std::string text(dim3 size) {
  std::ostringstream text;
  text << "(" << size.x << ", " << size.y << ", " << size.z << ")";
  return text.str();
}

// The limits of every device since sm_30 (CUDA C++ programming guide, "technical specifications").
bool legal(dim3 grid, dim3 block) {
  constexpr unsigned kMaxGridX = 0x7FFFFFFF;
  constexpr unsigned kMaxGridYZ = 65'535;
  const bool some =
      grid.x > 0 && grid.y > 0 && grid.z > 0 && block.x > 0 && block.y > 0 && block.z > 0;
  return some && grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ &&
         block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         std::uint64_t{block.x} * block.y * block.z <= 1024;
}

cudaError_t enqueue(Session& session, const sluice::LaunchShape& shape, const void* kernel,
                    Launch launch) {
  cudaError_t error = cudaSuccess;
  CUstream_st* const stream = session.stream(shape.stream, &error);
  if (stream == nullptr) return error;
  const std::string who = "kernel " + launch.name + ": ";
  Runtime& runtime = session.runtime;
  if (stream->device != session.thread.device) {
    return session.fail(cudaErrorInvalidResourceHandle,
                        who + "got " + stream->name() + ", expected one of the current device " +
                            std::to_string(session.thread.device));
  }
  if (!legal(shape.grid, shape.block)) {
    return session.fail(cudaErrorInvalidConfiguration,
                        who + "got grid " + text(shape.grid) + " of blocks " + text(shape.block) +
                            ", expected 1 to 1024 threads and a grid that is not empty");
  }
  const auto opted = runtime.shared_bytes_of.find({kernel, stream->device});
  // Unasked it is 48 KiB less the kernel's static bytes. Those are not known here: none.
  const std::size_t granted =
      opted == runtime.shared_bytes_of.end()
          ? 0
          : std::min(runtime.options.model.shared_bytes_per_block_optin, opted->second);
  if (shape.shared_bytes > granted) {
    return session.fail(cudaErrorInvalidValue,
                        who + "got " + std::to_string(shape.shared_bytes) +
                            " bytes of dynamic shared memory, expected at most " +
                            std::to_string(granted));
  }
  const DeviceModel& model = runtime.options.model;
  const int device_version = 10 * model.compute_major + model.compute_minor;
  const int code_version = model.code_version == 0 ? device_version : model.code_version;
  if (shape.overlap_previous && std::min(device_version, code_version) < 90) {
    return session.fail(cudaErrorNotSupported, who + "got a dependent launch of code for sm_" +
                                                   std::to_string(code_version) + " on sm_" +
                                                   std::to_string(device_version) +
                                                   ", expected sm_90 or newer of both");
  }
  ++runtime.counts.launches;
  return session.push(*stream, std::make_unique<Kernel>(std::move(launch)));
}

}  // namespace
}  // namespace fake

namespace sluice::launch_detail {

cudaError_t enqueue(const char* name, const LaunchShape& shape, const void* kernel,
                    void (*body)(const void* arguments), std::shared_ptr<const void> arguments,
                    std::size_t argument_bytes) {
  return fake::call(fake::Api::kLaunchKernel, shape.stream, [&](fake::Session& session) {
    return fake::enqueue(session, shape, kernel,
                         {.name = name,
                          .grid = shape.grid,
                          .block = shape.block,
                          .shared_bytes = shape.shared_bytes,
                          .overlap_previous = shape.overlap_previous,
                          .body = body,
                          .arguments = std::move(arguments),
                          .argument_bytes = argument_bytes});
  });
}

}  // namespace sluice::launch_detail

using fake::Api;
using fake::call;
using fake::Session;

extern "C" {

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return call(Api::kLaunchHostFunc, handle, [&](Session& session) {
    cudaError_t error = cudaSuccess;
    CUstream_st* const stream = session.stream(handle, &error);
    if (stream == nullptr) return error;
    return session.push(*stream, std::make_unique<fake::HostCall>(function, data));
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*function*/) {
  return call(Api::kFuncGetAttributes, nullptr, [&](Session& session) {
    const fake::DeviceModel& model = session.runtime.options.model;
    const int device_version = 10 * model.compute_major + model.compute_minor;
    *attributes = {};
    attributes->binaryVersion = device_version;
    attributes->ptxVersion = model.code_version == 0 ? device_version : model.code_version;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return call(Api::kFuncSetAttribute, nullptr, [&](Session& session) {
    const std::size_t most = session.runtime.options.model.shared_bytes_per_block_optin;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
      return session.fail(cudaErrorNotSupported,
                          "got attribute " + std::to_string(attribute) + ", which is not emulated");
    }
    if (value < 0 || static_cast<std::size_t>(value) > most) {
      return session.fail(cudaErrorInvalidValue,
                          "got " + std::to_string(value) +
                              " bytes of dynamic shared memory, expected at most " +
                              std::to_string(most));
    }
    session.runtime.shared_bytes_of[{function, session.thread.device}] =
        static_cast<std::size_t>(value);
    return cudaSuccess;
  });
}

}  // extern "C"
