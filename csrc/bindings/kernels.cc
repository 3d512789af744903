#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "base/log_ring.h"
#include "base/mutex.h"
#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "bindings/errors.h"
#include "bindings/torch_bridge.h"
#include "cache/policy.h"
#include "kernels/bandwidth.h"
#include "kernels/cpu_isa.h"
#include "kernels/expert_decode.h"
#include "kernels/gate.h"
#include "store/bandwidth.h"

namespace sluice::bindings {
namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string(__VERSION__);
#else
  info["compiler"] = std::string("GCC ") + __VERSION__;
#endif
  info["cpu_isa"] = cpu_isa_name(cpu_isa());
  info["cuda"] = cuda_kind();
  return info;
}

std::vector<std::string> gate_names() {
  std::vector<std::string> names;
  for (int kind = 0; kind <= static_cast<int>(GateKind::kGeneric); ++kind) {
    names.emplace_back(gate_name(static_cast<GateKind>(kind)));
  }
  return names;
}

/// A pool that Python holds: kernels called one by one should not pay for making one each.
struct Parallel {
  std::unique_ptr<ParallelFor> pool;
  Mutex mu = {};  // one run at a time per pool
};

std::unique_ptr<Parallel> open_parallel(const std::string& kind) {
  require<ConfigError>(kind == "default" || kind == "own", [&] {
    return "kind: got '" + kind + "', expected default (torch's pool where _ops is bound) or own";
  });
  return std::make_unique<Parallel>(kind == "own" ? make_thread_pool(affinity_threads())
                                                  : make_parallel());
}

using ExpertAddresses = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

void decode_experts(Parallel& parallel, const std::string& isa, const std::string& weights_dtype,
                    const std::string& activations, std::int64_t hidden, std::int64_t intermediate,
                    const py::dict& gate, const std::vector<ExpertAddresses>& experts,
                    std::uint64_t inputs, std::uint64_t outputs, std::int32_t num_tokens) {
  require<ConfigError>(num_tokens >= 1 && num_tokens <= kFewTokens, [&] {
    return "num_tokens: got " + std::to_string(num_tokens) + ", expected 1 to " +
           std::to_string(kFewTokens);
  });
  const ExpertDecodeProblem problem{.weights = parse_dtype(weights_dtype),
                                    .activations = parse_dtype(activations),
                                    .hidden = hidden,
                                    .intermediate = intermediate,
                                    .gate = gate_from_dict(gate)};
  require<ConfigError>(problem.gate.kind != GateKind::kGeneric,
                       [] { return "gate: got generic, expected a kind that has a kernel"; });
  const CpuIsa tier = isa.empty() ? cpu_isa() : parse_cpu_isa("isa", isa);
  const auto* in = reinterpret_cast<const float*>(address_of(inputs, 1));
  auto* out = reinterpret_cast<float*>(address_of(outputs, 1));
  std::array<const float*, kFewTokens> input_rows{};
  for (std::int32_t token = 0; token < num_tokens; ++token) {
    input_rows[static_cast<std::size_t>(token)] = in + token * hidden;
  }
  std::vector<float*> output_rows(experts.size() * static_cast<std::size_t>(num_tokens));
  for (float*& each : output_rows) {
    each = out;
    out += hidden;
  }
  std::vector<ExpertWork> works;
  works.reserve(experts.size());
  for (const auto& [w13, w2, b13, b2] : experts) {
    works.push_back(
        {.weights = {.w13 = address_of(w13, 1),
                     .w2 = address_of(w2, 1),
                     .b13 = reinterpret_cast<const float*>(b13),
                     .b2 = reinterpret_cast<const float*>(b2)},
         .inputs = input_rows.data(),
         .outputs = output_rows.data() + works.size() * static_cast<std::size_t>(num_tokens),
         .num_tokens = num_tokens});
  }
  const auto total_tokens = static_cast<std::int64_t>(output_rows.size());
  const py::gil_scoped_release no_gil;
  std::vector<float> scratch(
      static_cast<std::size_t>(expert_decode_scratch(problem, total_tokens)));
  const MutexLock lock(parallel.mu);
  expert_decode(tier, problem, works, scratch.data(), *parallel.pool);
}

/// (steady-clock seconds, logging's level, text), oldest first.
py::list drained_log() {
  py::list out;
  for (const LogRecord& record : log_ring().drain()) {
    out.append(py::make_tuple(static_cast<double>(record.time) * 1e-9,
                              static_cast<int>(record.level), text_of(record.text)));
  }
  return out;
}

double memory_rate(Parallel& parallel, std::uint64_t address, std::uint64_t nbytes, int repeats) {
  const MutexLock lock(parallel.mu);
  return read_bandwidth(address_of(address, nbytes), nbytes, repeats, *parallel.pool);
}

double disk_rate(const std::string& path, std::uint64_t offset, std::uint64_t nbytes,
                 std::size_t chunk_bytes, int threads) {
  return disk_bandwidth(path, offset, nbytes, chunk_bytes, threads);
}

double disk_rate_of(const std::string& path,
                    const std::vector<std::pair<std::uint64_t, std::uint64_t>>& ranges,
                    std::size_t chunk_bytes, int threads) {
  std::vector<FileExtent> extents;
  extents.reserve(ranges.size());
  for (const auto& [offset, nbytes] : ranges) extents.push_back({offset, nbytes});
  return disk_bandwidth(path, extents, chunk_bytes, threads);
}

}  // namespace

void bind_kernels(py::module_& m) {
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  m.def("version", [] { return SLUICE_VERSION; });
  m.def("build_info", &build_info, "compiler, cpu_isa.");
  m.def("drain_log", &drained_log, "Takes the core's log: (time_s, level, text), oldest first.");
  m.def("policy_names", &policy_names);
  m.def(
      "check_policy",
      [](const std::string& name) { (void)make_policy(name, {.num_layers = 1, .max_experts = 1}); },
      py::arg("name"), "ConfigError unless a session can have this policy.");
  m.def("gate_names", &gate_names);
  py::class_<Parallel>(m, "Parallel", "Threads of kernels that are called one by one.")
      .def(py::init(&open_parallel), py::arg("kind") = "default")
      .def_property_readonly("num_threads",
                             [](const Parallel& self) { return self.pool->num_threads(); });
  m.def("expert_decode", &decode_experts, py::arg("parallel"), py::arg("isa"),
        py::arg("weights_dtype"), py::arg("activations"), py::arg("hidden"),
        py::arg("intermediate"), py::arg("gate"), py::arg("experts"), py::arg("inputs"),
        py::arg("outputs"), py::arg("num_tokens"),
        "One call of the few-token kernel on raw pointers.");
  m.def("read_bandwidth", &memory_rate, py::arg("parallel"), py::arg("address"), py::arg("nbytes"),
        py::arg("repeats"), WithoutGil(), "Bytes/s of the read loop over memory.");
  m.def("disk_bandwidth", &disk_rate, py::arg("path"), py::arg("offset"), py::arg("nbytes"),
        py::arg("chunk_bytes"), py::arg("threads"), WithoutGil(),
        "Bytes/s of O_DIRECT reads of a file range, `threads` deep.");
  m.def("disk_bandwidth_extents", &disk_rate_of, py::arg("path"), py::arg("extents"),
        py::arg("chunk_bytes"), py::arg("threads"), WithoutGil(),
        "The same over many ranges (offset, nbytes), in their order.");
}

}  // namespace sluice::bindings
