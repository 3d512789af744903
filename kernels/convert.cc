#include "kernels/convert.h"

#include <cstring>

#include "kernels/float_env.h"
#include "kernels/tiers.h"

namespace sluice {

void widen(const ElementwiseKernels& kernels, DType dtype, const void* in, float* out,
           std::int64_t count) {
  if (count <= 0) return;
  if (dtype == DType::kF32) {
    std::memmove(out, in, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    (dtype == DType::kBF16 ? kernels.widen_bf16 : kernels.widen_f16)(in, out, count);
  }
}

void narrow(const ElementwiseKernels& kernels, DType dtype, const float* in, void* out,
            std::int64_t count) {
  if (count <= 0) return;
  if (dtype == DType::kF32) {
    std::memmove(out, in, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    (dtype == DType::kBF16 ? kernels.narrow_bf16 : kernels.narrow_f16)(in, out, count);
  }
}

void widen(DType dtype, const void* in, float* out, std::int64_t count) {
  const DefaultFloatEnv env;
  widen(elementwise_kernels(cpu_isa()), dtype, in, out, count);
}

void narrow(DType dtype, const float* in, void* out, std::int64_t count) {
  const DefaultFloatEnv env;
  narrow(elementwise_kernels(cpu_isa()), dtype, in, out, count);
}

}  // namespace sluice
