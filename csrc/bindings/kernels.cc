#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/log_ring.h"
#include "bindings/bindings.h"
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
  py::list supported;
  for (const CpuIsa isa : kCpuIsas) {
    if (cpu_supports(isa)) supported.append(cpu_isa_name(isa));
  }
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string(__VERSION__);
#else
  info["compiler"] = std::string("GCC ") + __VERSION__;
#endif
  info["cpu_isa"] = cpu_isa_name(cpu_isa());
  info["isa_supported"] = supported;
  info["cuda"] = false;
  return info;
}

std::vector<std::string> gate_names() {
  std::vector<std::string> names;
  for (int kind = 0; kind <= static_cast<int>(GateKind::kGeneric); ++kind) {
    names.emplace_back(gate_name(static_cast<GateKind>(kind)));
  }
  return names;
}

void decode_expert(const std::string& isa, const std::string& weights_dtype,
                   const std::string& activations, std::int64_t hidden, std::int64_t intermediate,
                   const py::dict& gate, std::uint64_t w13, std::uint64_t w2, std::uint64_t b13,
                   std::uint64_t b2, std::uint64_t inputs, std::uint64_t outputs,
                   std::int32_t num_tokens) {
  require<ConfigError>(num_tokens >= 1 && num_tokens <= kFewTokens, [&] {
    return "num_tokens: got " + std::to_string(num_tokens) + ", expected 1 to " +
           std::to_string(kFewTokens);
  });
  const ExpertDecodeProblem problem{.weights = parse_dtype(weights_dtype),
                                    .activations = parse_dtype(activations),
                                    .hidden = hidden,
                                    .intermediate = intermediate,
                                    .gate = {.kind = parse_gate(field<std::string>(gate, "kind")),
                                             .interleaved = field<bool>(gate, "interleaved"),
                                             .alpha = field<float>(gate, "alpha"),
                                             .limit = field<float>(gate, "limit")}};
  require<ConfigError>(problem.gate.kind != GateKind::kGeneric,
                       [] { return "gate: got generic, expected a kind that has a kernel"; });
  const CpuIsa tier = isa.empty() ? cpu_isa() : parse_cpu_isa("isa", isa);
  const auto* in = reinterpret_cast<const float*>(address_of(inputs, 1));
  auto* out = reinterpret_cast<float*>(address_of(outputs, 1));
  std::array<const float*, kFewTokens> input_rows{};
  std::array<float*, kFewTokens> output_rows{};
  for (std::int32_t token = 0; token < num_tokens; ++token) {
    input_rows[static_cast<std::size_t>(token)] = in + token * hidden;
    output_rows[static_cast<std::size_t>(token)] = out + token * hidden;
  }
  const ExpertWork work{.weights = {.w13 = address_of(w13, 1),
                                    .w2 = address_of(w2, 1),
                                    .b13 = reinterpret_cast<const float*>(b13),
                                    .b2 = reinterpret_cast<const float*>(b2)},
                        .inputs = input_rows.data(),
                        .outputs = output_rows.data(),
                        .num_tokens = num_tokens};
  const py::gil_scoped_release no_gil;
  std::vector<float> scratch(static_cast<std::size_t>(expert_decode_scratch(problem, num_tokens)));
  expert_decode(tier, problem, {&work, 1}, scratch.data(), *make_parallel());
}

/// (steady-clock seconds, logging's level, text), oldest first.
py::list drained_log() {
  py::list out;
  for (const LogRecord& record : log_ring().drain()) {
    out.append(py::make_tuple(static_cast<double>(record.time) * 1e-9,
                              static_cast<int>(record.level), record.text));
  }
  return out;
}

double memory_rate(std::uint64_t address, std::uint64_t nbytes, int repeats) {
  return read_bandwidth(address_of(address, nbytes), nbytes, repeats, *make_parallel());
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
  m.def("build_info", &build_info, "compiler, cpu_isa, isa_supported (list), cuda (bool).");
  m.def("drain_log", &drained_log, "Takes the core's log: (time_s, level, text), oldest first.");
  m.def("policy_names", &policy_names);
  m.def("gate_names", &gate_names);
  m.def("expert_decode", &decode_expert, py::arg("isa"), py::arg("weights_dtype"),
        py::arg("activations"), py::arg("hidden"), py::arg("intermediate"), py::arg("gate"),
        py::arg("w13"), py::arg("w2"), py::arg("b13"), py::arg("b2"), py::arg("inputs"),
        py::arg("outputs"), py::arg("num_tokens"),
        "One expert of the few-token kernel on raw pointers, for tests and micro-benchmarks.");
  m.def("read_bandwidth", &memory_rate, py::arg("address"), py::arg("nbytes"), py::arg("repeats"),
        WithoutGil(), "Bytes/s of the read loop over memory, all threads.");
  m.def("disk_bandwidth", &disk_rate, py::arg("path"), py::arg("offset"), py::arg("nbytes"),
        py::arg("chunk_bytes"), py::arg("threads"), WithoutGil(),
        "Bytes/s of O_DIRECT reads of a file range, `threads` deep.");
  m.def("disk_bandwidth_extents", &disk_rate_of, py::arg("path"), py::arg("extents"),
        py::arg("chunk_bytes"), py::arg("threads"), WithoutGil(),
        "The same over many ranges (offset, nbytes), in their order.");
}

}  // namespace sluice::bindings
