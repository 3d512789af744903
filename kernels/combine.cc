#include "kernels/combine.h"

#include <algorithm>

#include "kernels/float_env.h"
#include "kernels/tiers.h"

namespace sluice {
namespace {

// Columns that one item sums, on the stack: 2 KiB stay in L1 for all k.
constexpr std::int64_t kTileColumns = 512;
// Elements below which a second thread costs more than it brings.
constexpr std::int64_t kSerialElements = 64 * 1024;

}  // namespace

void combine(const float* rows, const float* weights, const std::uint8_t* valid,
             std::int64_t num_tokens, std::int64_t top_k, std::int64_t hidden, DType out_dtype,
             void* out, ParallelFor& parallel) {
  if (num_tokens <= 0 || hidden <= 0) return;
  const ElementwiseKernels& kernels = elementwise_kernels(cpu_isa());
  const std::int64_t tiles = (hidden + kTileColumns - 1) / kTileColumns;

  auto range = [&](std::int64_t begin, std::int64_t end) {
    const DefaultFloatEnv env;
    float sum[kTileColumns];
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t token = item / tiles;
      const std::int64_t column = (item % tiles) * kTileColumns;
      const std::int64_t count = std::min(kTileColumns, hidden - column);
      std::fill_n(sum, count, 0.0f);
      for (std::int64_t k = 0; k < top_k; ++k) {
        const std::int64_t row = token * top_k + k;
        if (valid[row] == 0) continue;
        kernels.accumulate(weights[row], rows + row * hidden + column, sum, count);
      }
      narrow(kernels, out_dtype, sum, element_at(out, token * hidden + column, out_dtype), count);
    }
  };
  const std::int64_t items = num_tokens * tiles;
  if (num_tokens * top_k * hidden <= kSerialElements) {
    range(0, items);
  } else {
    parallel.run(items, 1, RangeFn(range));
  }
}

}  // namespace sluice
