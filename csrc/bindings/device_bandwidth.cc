#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <charconv>
#include <string>
#include <string_view>

#include "base/parallel.h"
#include "bindings/bindings.h"
#include "bindings/device_rates.h"
#include "bindings/torch_bridge.h"

namespace sluice::bindings {
namespace {

// Of the CUDA runtime's devices, which are the same on a build for the emulation of the tests.
int parse_ordinal(const std::string& device) {
  constexpr std::string_view kCuda = "cuda:";
  int ordinal = -1;
  const std::string_view name = device;
  if (name.starts_with(kCuda)) {
    const char* const end = name.data() + name.size();
    const auto [parsed, code] = std::from_chars(name.data() + kCuda.size(), end, ordinal);
    if (code != std::errc() || parsed != end) ordinal = -1;
  }
  require<ConfigError>(
      ordinal >= 0, [&] { return "measure_device: got \"" + device + "\", expected \"cuda:N\""; });
  return ordinal;
}

py::dict to_dict(const CopyTime& copy) {
  py::dict fields;
  fields["direction"] = copy.way == CopyWay::kToHost ? "to host" : "to device";
  fields["memory"] = copy.way == CopyWay::kFromPages ? "pageable" : "pinned";
  fields["depth"] = copy.depth;
  fields["bytes"] = copy.bytes;
  fields["seconds"] = copy.seconds;
  return fields;
}

py::dict measure(const std::string& device, const std::vector<std::size_t>& copy_bytes,
                 std::size_t copy_total_bytes, const std::vector<int>& depths,
                 std::size_t read_bytes, std::size_t host_bytes, std::size_t pin_bytes,
                 int repeats) {
  const DeviceProbe probe{.copy_bytes = copy_bytes,
                          .copy_total_bytes = copy_total_bytes,
                          .depths = depths,
                          .read_bytes = read_bytes,
                          .host_bytes = host_bytes,
                          .pin_bytes = pin_bytes,
                          .repeats = repeats};
  const int ordinal = parse_ordinal(device);
  DeviceRates rates;
  {
    const py::gil_scoped_release no_gil;
    const auto opened = make_cuda_device(ordinal);
    const auto parallel = make_thread_pool(affinity_threads());
    rates = measure_device(*opened, *parallel, probe);
  }
  py::dict found;
  py::list copies;
  for (const CopyTime& copy : rates.copies) copies.append(to_dict(copy));
  found["device"] = device;
  found["copies"] = copies;
  found["memory_bytes_per_s"] = rates.memory_bytes_per_s;
  found["read_bytes"] = rates.read_bytes;
  found["launch_s"] = rates.launch_s;
  found["round_trip_s"] = rates.round_trip_s;
  found["pin_bytes_per_s"] = rates.pin_bytes_per_s;
  found["staging_bytes_per_s"] = rates.staging_bytes_per_s;
  found["host_bytes_per_s"] = rates.host_bytes_per_s;
  found["host_beside_copies_bytes_per_s"] = rates.host_beside_copies_bytes_per_s;
  found["link_beside_reads_bytes_per_s"] = rates.link_beside_reads_bytes_per_s;
  return found;
}

py::dict facts_of(int ordinal) {
  const CudaDeviceFacts facts = cuda_device_facts(ordinal);
  py::dict fields;
  fields["pci_address"] = facts.pci_address;
  fields["compute_capability"] = facts.compute_capability;
  fields["num_multiprocessors"] = facts.num_multiprocessors;
  fields["driver_cuda_version"] = facts.driver_cuda_version;
  return fields;
}

}  // namespace

void bind_device_bandwidth(py::module_& m) {
  m.def("cuda_device_facts", &facts_of, py::arg("ordinal"),
        "What the CUDA runtime tells of a device without a context on it.");
  m.def("measure_device", &measure, py::arg("device"), py::kw_only(), py::arg("copy_bytes"),
        py::arg("copy_total_bytes"), py::arg("depths"), py::arg("read_bytes"),
        py::arg("host_bytes"), py::arg("pin_bytes"), py::arg("repeats"),
        "What the link, the memory and the launches of \"cuda:N\" take.");
}

}  // namespace sluice::bindings
