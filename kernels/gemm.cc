#include "kernels/gemm.h"

namespace sluice {
namespace {

template <class T>
void multiply(const GemmCall& call) {
  const T* a = static_cast<const T*>(call.a);
  const T* b = static_cast<const T*>(call.b);
  T* c = static_cast<T*>(call.c);
  for (std::int64_t m = 0; m < call.m; ++m) {
    for (std::int64_t n = 0; n < call.n; ++n) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < call.k; ++k) {
        sum += to_float(a[m * call.k + k]) * to_float(b[n * call.k + k]);
      }
      c[m * call.ldc + n] = from_float<T>(sum);
    }
  }
}

}  // namespace

int reference_gemm(void* /*context*/, const GemmCall& call) {
  dispatch_dtype(call.dtype, [&](auto tag) { multiply<typename decltype(tag)::type>(call); });
  return 0;
}

}  // namespace sluice
