#include "bindings/bindings.h"
#include "bindings/devices.h"
#include "bindings/registry.h"

// Exported by name: everything else is hidden, pybind11's entry point is not.
PYBIND11_MODULE(_core, m) {
  namespace b = sluice::bindings;
  m.doc() = "The torch-free core: sessions, stores, packs, kernels on raw pointers.";
  b::bind_errors(m);
  b::bind_devices(m);
  b::bind_store(m);
  b::bind_pack(m);
  b::bind_session(m);
  b::bind_scorers(m);
  b::bind_simulate(m);
  b::bind_torch(m);
  b::bind_kernels(m);
  b::bind_device_bandwidth(m);
  b::bind_cuda_kernels(m);
}
