#include "bindings/bindings.h"

namespace sluice::bindings {

void bind_cuda_kernels(py::module_& /*m*/) {}

}  // namespace sluice::bindings
