#include "kernels/expert_decode.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <string>

#include "base/error.h"
#include "kernels/float_env.h"
#include "kernels/tiers.h"

namespace sluice {
namespace {

// Weight bytes of one item: large against the ramp of its prefetches, small against an expert.
constexpr std::int64_t kTileBytes = 256 * 1024;
// Packed vectors start on lines: a load that crosses one costs two.
constexpr std::int64_t kScratchAlignment = 64;
// Most channels (rows of w2) of one item; bounds the stack.
constexpr std::int64_t kMaxTile = 64;
// Weight bytes of a whole call below which one thread works alone: it reads 1 MiB of cached weights
// in about 40 us (kernel_bench, 192 x 64 experts), no more than a parked worker takes to wake.
constexpr std::int64_t kSerialBytes = 1024 * 1024;

/// How a phase is cut: every work has `tiles` items of `tile` outputs, whole steps each, so that an
/// item packs its results alone.
struct PhasePlan {
  std::int64_t outputs = 0;
  std::int64_t tile = 0;
  std::int64_t tiles = 0;
};

PhasePlan plan_phase(std::int64_t outputs, std::int64_t bytes_per_output) {
  const std::int64_t fit = kTileBytes / std::max<std::int64_t>(1, bytes_per_output);
  const std::int64_t tile = std::clamp<std::int64_t>(fit / kStep * kStep, kStep, kMaxTile);
  return {.outputs = outputs, .tile = tile, .tiles = (outputs + tile - 1) / tile};
}

struct Call {
  const ExpertDecodeProblem& problem;
  std::span<const ExpertWork> works;
  const ElementwiseKernels& elementwise;
  DotRowsFn dot_rows;
  float* x;  // packed inputs [total tokens, packed H]
  float* h;  // packed results of the gate [total tokens, packed I]

  /// Item: outputs [begin, begin + count) of `work`, whose first token is `token` of the call.
  template <class Item>
  void run(const PhasePlan& plan, ParallelFor* parallel, Item item) const {
    auto range = [&](std::int64_t begin, std::int64_t end) {
      const DefaultFloatEnv env;
      std::int64_t work = begin / plan.tiles;
      std::int64_t token = 0;
      for (std::int64_t w = 0; w < work; ++w)
        token += works[static_cast<std::size_t>(w)].num_tokens;
      for (std::int64_t i = begin; i < end; ++i) {
        if (i / plan.tiles != work) {
          token += works[static_cast<std::size_t>(work)].num_tokens;
          ++work;
        }
        const std::int64_t first = (i % plan.tiles) * plan.tile;
        item(works[static_cast<std::size_t>(work)], token, first,
             std::min(plan.tile, plan.outputs - first));
      }
    };
    const std::int64_t items = static_cast<std::int64_t>(works.size()) * plan.tiles;
    if (parallel == nullptr) {
      if (items > 0) range(0, items);
    } else {
      parallel->run(items, 1, RangeFn(range));
    }
  }

  [[nodiscard]] const std::byte* row(const void* matrix, std::int64_t index,
                                     std::int64_t columns) const {
    return element_at(matrix, index * columns, problem.weights);
  }

  void pack_inputs() const {
    float* packed = x;
    for (const ExpertWork& work : works) {
      for (std::int64_t t = 0; t < work.num_tokens; ++t) {
        pack_columns(problem.weights, work.inputs[t], problem.hidden, packed);
        packed += packed_columns(problem.hidden);
      }
    }
  }

  /// h[t, channels] = gate(w13 · x[t] + b13), rounded to the activations' type.
  void gate_up(const ExpertWork& work, std::int64_t token, std::int64_t channel,
               std::int64_t count) const {
    const GateSpec& gate = problem.gate;
    const bool gated = is_gated(gate.kind);
    const std::int64_t hidden = problem.hidden;
    float products[kFewTokens][2 * kMaxTile];  // g, then u; or alternating
    float* out[kFewTokens];
    const float* in[kFewTokens];
    for (std::int64_t t = 0; t < work.num_tokens; ++t) {
      in[t] = x + (token + t) * packed_columns(hidden);
    }
    const auto dot = [&](std::int64_t first_row, std::int64_t num_rows, std::int64_t at) {
      for (std::int64_t t = 0; t < work.num_tokens; ++t) out[t] = products[t] + at;
      const float* b13 = work.weights.b13;
      dot_rows({.rows = row(work.weights.w13, first_row, hidden),
                .num_rows = num_rows,
                .columns = hidden,
                .x = in,
                .out = out,
                .num_tokens = work.num_tokens,
                .bias = b13 == nullptr ? nullptr : b13 + first_row});
    };
    if (gated && gate.interleaved) {
      dot(2 * channel, 2 * count, 0);
    } else {
      dot(channel, count, 0);
      if (gated) dot(problem.intermediate + channel, count, count);
    }
    for (std::int64_t t = 0; t < work.num_tokens; ++t) {
      float values[kMaxTile];
      apply_gate_row(elementwise, gate, products[t], values, count);
      if (problem.activations != DType::kF32) {
        std::uint16_t rounded[kMaxTile];
        narrow(elementwise, problem.activations, values, rounded, count);
        widen(elementwise, problem.activations, rounded, values, count);
      }
      pack_columns(problem.weights, values, count,
                   h + (token + t) * packed_columns(problem.intermediate) + channel);
    }
  }

  /// outputs[t, rows] = w2 · h[t] + b2.
  void down(const ExpertWork& work, std::int64_t token, std::int64_t first_row,
            std::int64_t count) const {
    const float* in[kFewTokens];
    float* out[kFewTokens];
    for (std::int64_t t = 0; t < work.num_tokens; ++t) {
      in[t] = h + (token + t) * packed_columns(problem.intermediate);
      out[t] = work.outputs[t] + first_row;
    }
    const float* b2 = work.weights.b2;
    dot_rows({.rows = row(work.weights.w2, first_row, problem.intermediate),
              .num_rows = count,
              .columns = problem.intermediate,
              .x = in,
              .out = out,
              .num_tokens = work.num_tokens,
              .bias = b2 == nullptr ? nullptr : b2 + first_row});
  }
};

void check(const ExpertDecodeProblem& problem, std::span<const ExpertWork> works) {
  require<InternalError>(problem.gate.kind != GateKind::kGeneric, [] {
    return std::string("expert_decode: got the generic gate, expected one with a kernel");
  });
  for (const ExpertWork& work : works) {
    require<InternalError>(work.num_tokens >= 1 && work.num_tokens <= kFewTokens, [&] {
      return "expert_decode: got " + std::to_string(work.num_tokens) +
             " tokens of one expert, expected 1 to " + std::to_string(kFewTokens);
    });
  }
}

}  // namespace

void pack_columns(DType dtype, const float* in, std::int64_t columns, float* out) {
  for (std::int64_t begin = 0; begin < columns; begin += kStep) {
    float step[kStep] = {};
    std::copy_n(in + begin, std::min(kStep, columns - begin), step);
    if (dtype == DType::kBF16) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        out[begin + lane] = step[step_column(DType::kBF16, 0, lane)];
        out[begin + kLanes + lane] = step[step_column(DType::kBF16, 1, lane)];
      }
    } else {
      std::copy_n(step, kStep, out + begin);
    }
  }
}

std::int64_t expert_decode_scratch(const ExpertDecodeProblem& problem, std::int64_t total_tokens) {
  return kScratchAlignment / static_cast<std::int64_t>(sizeof(float)) +
         total_tokens * (packed_columns(problem.hidden) + packed_columns(problem.intermediate));
}

void expert_decode(CpuIsa isa, const ExpertDecodeProblem& problem,
                   std::span<const ExpertWork> works, float* scratch, ParallelFor& parallel) {
  check(problem, works);
  void* aligned = scratch;
  std::size_t space = std::numeric_limits<std::size_t>::max();
  scratch = static_cast<float*>(std::align(kScratchAlignment, 1, aligned, space));
  std::int64_t total_tokens = 0;
  for (const ExpertWork& work : works) total_tokens += work.num_tokens;
  const Call call{.problem = problem,
                  .works = works,
                  .elementwise = elementwise_kernels(isa),
                  .dot_rows = dot_kernels(isa).of(problem.weights),
                  .x = scratch,
                  .h = scratch + total_tokens * packed_columns(problem.hidden)};
  const auto element = static_cast<std::int64_t>(element_bytes(problem.weights));
  const std::int64_t matrices = is_gated(problem.gate.kind) ? 2 : 1;
  const std::int64_t expert_bytes =
      (matrices + 1) * problem.hidden * problem.intermediate * element;
  const bool small = static_cast<std::int64_t>(works.size()) * expert_bytes <= kSerialBytes;
  ParallelFor* threads = small || parallel.num_threads() == 1 ? nullptr : &parallel;

  call.pack_inputs();
  call.run(plan_phase(problem.intermediate, matrices * problem.hidden * element), threads,
           [&](const ExpertWork& work, std::int64_t token, std::int64_t first, std::int64_t count) {
             call.gate_up(work, token, first, count);
           });
  call.run(plan_phase(problem.hidden, problem.intermediate * element), threads,
           [&](const ExpertWork& work, std::int64_t token, std::int64_t first, std::int64_t count) {
             call.down(work, token, first, count);
           });
}

void expert_decode(const ExpertDecodeProblem& problem, std::span<const ExpertWork> works,
                   float* scratch, ParallelFor& parallel) {
  expert_decode(cpu_isa(), problem, works, scratch, parallel);
}

}  // namespace sluice
