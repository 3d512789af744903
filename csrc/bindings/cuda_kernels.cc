#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "device/device.h"
#include "kernels/bandwidth_gpu.h"
#include "kernels/combine_gpu.h"
#include "kernels/expert_gemv.h"
#include "kernels/expert_tiles.h"
#include "kernels/route.h"

// One kernel, copy or event at a time: tests hold kernels against references with it, and baselines
// of benchmarks put other policies around the same arithmetic. Addresses are integers, streams are
// handles as torch prints them; nothing is waited for but in `synchronize`.

namespace sluice::bindings {
namespace {

using SharedDevice = std::shared_ptr<Device>;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

/// Memory that goes back with the object, and keeps its device.
class Memory {
 public:
  Memory(SharedDevice device, DeviceBuffer buffer)
      : device_(std::move(device)), buffer_(std::move(buffer)) {}
  [[nodiscard]] std::uint64_t address() const {
    return reinterpret_cast<std::uintptr_t>(buffer_.data());
  }
  [[nodiscard]] std::size_t nbytes() const { return buffer_.bytes(); }

 private:
  SharedDevice device_;  // outlives the buffer
  DeviceBuffer buffer_;
};

template <class T>
T* at(std::uint64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

/// A call's rows by expert, as `route` leaves them.
using Routed = std::tuple<std::uint64_t, std::uint64_t, std::int32_t, std::int32_t>;
RoutedRows routed_rows(const Routed& routed) {
  const auto& [offsets, rows, num_experts, top_k] = routed;
  return {.offsets = at<const std::int32_t>(offsets),
          .rows = at<const std::int32_t>(rows),
          .num_experts = num_experts,
          .top_k = top_k};
}

/// A list of experts whose products can be launched again and again: as cheap from Python as a
/// launch allows.
class Experts {
 public:
  using Sections =
      std::tuple<std::int32_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

  Experts(const ExpertProblem& problem, const GpuTraits& gpu, const std::vector<Sections>& experts)
      : problem_(problem), gpu_(gpu) {
    require<ConfigError>(experts.size() <= kMaxListedExperts, [&] {
      return "experts: got " + std::to_string(experts.size()) + ", expected at most " +
             std::to_string(kMaxListedExperts) + "; pass a table";
    });
    for (const auto& [expert, w13, w2, b13, b2] : experts) {
      entries_.entries[entries_.count++] = {.weights = {.w13 = at<const void>(w13),
                                                        .w2 = at<const void>(w2),
                                                        .b13 = at<const float>(b13),
                                                        .b2 = at<const float>(b2)},
                                            .expert = expert};
    }
  }
  Experts(const ExpertProblem& problem, const GpuTraits& gpu, std::uint64_t table,
          std::int32_t count)
      : problem_(problem),
        gpu_(gpu),
        table_{.experts = at<const ExpertWeights>(table), .count = count} {}

  void gate_up(std::int64_t num_entries, const Routed& routed, std::uint64_t hidden,
               std::uint64_t h, std::int32_t tiles_from, std::uint64_t stream, bool early) const {
    with_list([&](const auto& list) {
      if (tiles_from == 0) {
        launch_expert_gate_up(
            problem_, plan_expert_gate_up(problem_, list.count, num_entries, gpu_), list,
            {.routed = routed_rows(routed), .hidden = at<const void>(hidden), .h = at<void>(h)},
            StreamHandle{stream}, early);
      } else {
        launch_tile_gate_up(problem_, plan_tile_gate_up(problem_, list.count, num_entries, gpu_),
                            list,
                            {.routed = routed_rows(routed),
                             .min_tokens = tiles_from,
                             .hidden = at<const void>(hidden),
                             .out = at<void>(h)},
                            StreamHandle{stream}, early);
      }
    });
  }
  void down(std::int64_t num_entries, const Routed& routed, std::uint64_t h, std::uint64_t scratch,
            std::int32_t tiles_from, std::uint64_t stream, bool early) const {
    with_list([&](const auto& list) {
      if (tiles_from == 0) {
        launch_expert_down(
            problem_, plan_expert_down(problem_, list.count, num_entries, gpu_), list,
            {.routed = routed_rows(routed), .h = at<const void>(h), .scratch = at<float>(scratch)},
            StreamHandle{stream}, early);
      } else {
        launch_tile_down(problem_, plan_tile_down(problem_, list.count, num_entries, gpu_), list,
                         {.routed = routed_rows(routed),
                          .min_tokens = tiles_from,
                          .h = at<const void>(h),
                          .out = at<void>(scratch)},
                         StreamHandle{stream}, early);
      }
    });
  }

 private:
  template <class Fn>
  void with_list(Fn fn) const {
    table_.experts != nullptr ? fn(table_) : fn(entries_);
  }

  ExpertProblem problem_;
  GpuTraits gpu_;
  ExpertEntries entries_;
  ExpertTable table_;
};

class Gpu {
 public:
  Gpu(int ordinal, int num_multiprocessors, std::size_t shared_bytes)
      : device_(make_cuda_device(ordinal)) {
    const DeviceTraits traits = device_->traits();
    gpu_ = {
        .num_multiprocessors =
            num_multiprocessors > 0 ? num_multiprocessors : traits.num_multiprocessors,
        .shared_bytes_per_block = shared_bytes > 0 ? shared_bytes : traits.shared_bytes_per_block};
  }

  [[nodiscard]] Memory allocate(std::size_t nbytes) const {
    return {device_, device_->allocate_slab(nbytes)};
  }
  [[nodiscard]] Memory allocate_pinned(std::size_t nbytes) const {
    return {device_, device_->allocate_pinned(nbytes)};
  }
  [[nodiscard]] std::uint64_t copy_stream() const {
    return static_cast<std::uint64_t>(device_->copy_stream());
  }
  void copy(std::uint64_t target, std::uint64_t source, std::size_t nbytes,
            std::uint64_t stream) const {
    device_->copy_async(at<std::byte>(target), at<const std::byte>(source), nbytes,
                        StreamHandle{stream});
  }
  void read(std::uint64_t target, std::uint64_t source, std::size_t nbytes,
            std::uint64_t stream) const {
    device_->read_async(at<std::byte>(target), at<const std::byte>(source), nbytes,
                        StreamHandle{stream});
  }
  [[nodiscard]] std::uint64_t record(std::uint64_t stream) const {
    return static_cast<std::uint64_t>(device_->record(StreamHandle{stream}));
  }
  void wait(std::uint64_t stream, std::uint64_t event) const {
    device_->wait(StreamHandle{stream}, EventHandle{event});
  }
  void synchronize(std::uint64_t event) const { device_->synchronize(EventHandle{event}); }
  void release(std::uint64_t event) const { device_->release(EventHandle{event}); }

  [[nodiscard]] Experts experts(const ExpertProblem& problem,
                                const std::vector<Experts::Sections>& list) const {
    return {problem, gpu_, list};
  }
  [[nodiscard]] Experts table(const ExpertProblem& problem, std::uint64_t table,
                              std::int32_t count) const {
    return {problem, gpu_, table, count};
  }
  [[nodiscard]] int read_blocks() const { return read_bandwidth_blocks(gpu_); }
  void read_bandwidth(std::uint64_t data, std::size_t nbytes, std::uint64_t sums,
                      std::uint64_t stream) const {
    launch_read_bandwidth(at<const void>(data), nbytes, at<std::uint32_t>(sums), gpu_,
                          StreamHandle{stream});
  }

 private:
  SharedDevice device_;
  GpuTraits gpu_;
};

ExpertProblem problem_of(const std::string& weights_dtype, const std::string& activations,
                         std::int64_t hidden, std::int64_t intermediate, const py::dict& gate) {
  return {.weights = parse_dtype(weights_dtype),
          .activations = parse_dtype(activations),
          .hidden = hidden,
          .intermediate = intermediate,
          .gate = gate_from_dict(gate)};
}

void route(std::int64_t num_tokens, std::int64_t top_k, std::int32_t num_experts,
           const std::string& weights_dtype, std::uint64_t ids, std::uint64_t weights,
           std::uint64_t offsets, std::uint64_t rows, std::uint64_t stream, bool early) {
  const RouteProblem problem{.num_tokens = num_tokens,
                             .top_k = top_k,
                             .num_experts = num_experts,
                             .weights = parse_dtype(weights_dtype)};
  launch_route(problem, plan_route(problem),
               {.ids = at<const std::int64_t>(ids),
                .weights = at<const void>(weights),
                .offsets = at<std::int32_t>(offsets),
                .rows = at<std::int32_t>(rows)},
               StreamHandle{stream}, early);
}

void combine_rows(std::int64_t num_tokens, std::int64_t top_k, std::int64_t hidden,
                  std::int32_t num_experts, const std::string& weights_dtype,
                  const std::string& out_dtype, std::uint64_t ids, std::uint64_t weights,
                  std::uint64_t scratch, std::uint64_t out, std::uint64_t stream, bool early) {
  launch_combine({.num_tokens = num_tokens,
                  .top_k = top_k,
                  .hidden = hidden,
                  .num_experts = num_experts,
                  .weights = parse_dtype(weights_dtype),
                  .out = parse_dtype(out_dtype)},
                 {.ids = at<const std::int64_t>(ids),
                  .weights = at<const void>(weights),
                  .scratch = at<const float>(scratch),
                  .out = at<void>(out)},
                 StreamHandle{stream}, early);
}

void bind_memory(py::module_& m) {
  py::class_<Memory>(m, "Memory")
      .def_property_readonly("address", &Memory::address)
      .def_property_readonly("nbytes", &Memory::nbytes);
  py::class_<Experts>(m, "Experts")
      .def("gate_up", &Experts::gate_up, py::arg("num_entries"), py::arg("routed"),
           py::arg("hidden"), py::arg("h"), py::kw_only(), py::arg("tiles_from") = 0,
           py::arg("stream") = 0, py::arg("early") = false, WithoutGil(),
           "`routed`: (offsets, rows, num_experts, top_k). `tiles_from` 0: the decode pair, which "
           "takes experts of up to 16 rows; else the tile kernels, from that many rows on.")
      .def("down", &Experts::down, py::arg("num_entries"), py::arg("routed"), py::arg("h"),
           py::arg("scratch"), py::kw_only(), py::arg("tiles_from") = 0, py::arg("stream") = 0,
           py::arg("early") = false, WithoutGil());
}

}  // namespace

void bind_cuda_kernels(py::module_& m) {
  py::module_ cuda = m.def_submodule("_cuda", "The CUDA tier one call at a time.");
  bind_memory(cuda);
  py::class_<Gpu>(cuda, "Gpu")
      .def(py::init<int, int, std::size_t>(), py::arg("ordinal") = 0, py::kw_only(),
           py::arg("num_multiprocessors") = 0, py::arg("shared_bytes") = 0,
           "The last two: what plans are told instead of the device's own.")
      .def("allocate", &Gpu::allocate, py::arg("nbytes"))
      .def("allocate_pinned", &Gpu::allocate_pinned, py::arg("nbytes"))
      .def_property_readonly("copy_stream", &Gpu::copy_stream)
      .def("copy", &Gpu::copy, py::arg("target"), py::arg("source"), py::arg("nbytes"),
           py::arg("stream"), WithoutGil(), "From pinned memory.")
      .def("read", &Gpu::read, py::arg("target"), py::arg("source"), py::arg("nbytes"),
           py::arg("stream"), WithoutGil(), "Into pinned memory.")
      .def("record", &Gpu::record, py::arg("stream"), WithoutGil())
      .def("wait", &Gpu::wait, py::arg("stream"), py::arg("event"), WithoutGil())
      .def("synchronize", &Gpu::synchronize, py::arg("event"), WithoutGil())
      .def("release", &Gpu::release, py::arg("event"))
      .def(
          "experts",
          [](const Gpu& gpu, const std::vector<Experts::Sections>& experts,
             const std::string& weights_dtype, const std::string& activations, std::int64_t hidden,
             std::int64_t intermediate, const py::dict& gate) {
            return gpu.experts(problem_of(weights_dtype, activations, hidden, intermediate, gate),
                               experts);
          },
          py::arg("experts"), py::kw_only(), py::arg("weights_dtype"), py::arg("activations"),
          py::arg("hidden"), py::arg("intermediate"), py::arg("gate"),
          "By value: (expert, w13, w2, b13, b2) each, 0 where there is no bias.")
      .def(
          "table",
          [](const Gpu& gpu, std::uint64_t address, std::int32_t count,
             const std::string& weights_dtype, const std::string& activations, std::int64_t hidden,
             std::int64_t intermediate, const py::dict& gate) {
            return gpu.table(problem_of(weights_dtype, activations, hidden, intermediate, gate),
                             address, count);
          },
          py::arg("address"), py::arg("count"), py::kw_only(), py::arg("weights_dtype"),
          py::arg("activations"), py::arg("hidden"), py::arg("intermediate"), py::arg("gate"),
          "In device memory: `count` times four addresses w13, w2, b13, b2; w13 0: absent.")
      .def("read_blocks", &Gpu::read_blocks, "Words that `read_bandwidth` writes.")
      .def("read_bandwidth", &Gpu::read_bandwidth, py::arg("data"), py::arg("nbytes"),
           py::arg("sums"), py::arg("stream") = 0, WithoutGil());
  cuda.def("route", &route, py::arg("num_tokens"), py::arg("top_k"), py::arg("num_experts"),
           py::arg("weights_dtype"), py::arg("ids"), py::arg("weights"), py::arg("offsets"),
           py::arg("rows"), py::arg("stream") = 0, py::arg("early") = false, WithoutGil());
  cuda.def("combine", &combine_rows, py::arg("num_tokens"), py::arg("top_k"), py::arg("hidden"),
           py::arg("num_experts"), py::arg("weights_dtype"), py::arg("out_dtype"), py::arg("ids"),
           py::arg("weights"), py::arg("scratch"), py::arg("out"), py::arg("stream") = 0,
           py::arg("early") = false, WithoutGil());
  cuda.def(
      "launch_nothing", [](std::uint64_t stream) { launch_nothing(StreamHandle{stream}); },
      py::arg("stream") = 0, WithoutGil());
  cuda.attr("gemv_tokens") = kGemvTokens;
}

}  // namespace sluice::bindings
