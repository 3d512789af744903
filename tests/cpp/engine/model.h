#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/expert_layout.h"
#include "base/parallel.h"
#include "engine/engine.h"
#include "kernels/convert.h"
#include "kernels/expert_decode.h"
#include "store/expert_store.h"
#include "store/io_scratch.h"

namespace sluice::testing {

/// The shape of a small model, and what its layers compute.
struct ModelShape {
  std::int32_t num_layers = 2;
  std::int32_t num_experts = 8;
  std::int64_t hidden = 32;
  std::int64_t intermediate = 24;
  DType dtype = DType::kF32;
  bool gated = true;
  bool has_bias = false;
  GateSpec gate{};
  bool generic_gate = false;   // a callback between the GEMMs
  bool post_callback = false;  // and one behind them
  /// Bytes by which experts miss 64-byte alignment: 4 keeps them from being used in place.
  std::size_t misalignment = 4;
  std::size_t chunk_bytes = 4096;
  std::string file{};  // where the experts are written and read from; empty: memory
};

inline std::vector<std::byte> random_values(DType dtype, std::int64_t count, std::mt19937_64& rng,
                                            float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> wide(static_cast<std::size_t>(count));
  for (float& value : wide) value = normal(rng);
  std::vector<std::byte> values(static_cast<std::size_t>(count) * element_bytes(dtype));
  narrow(dtype, wide.data(), values.data(), count);
  return values;
}

/// out[m, i] = in[m, i] · in[m, I + i] + 0.25: a gate that no kernel has.
inline int multiply_gate(LayerIdx /*layer*/, DType dtype, std::int64_t rows,
                         std::int64_t in_columns, std::int64_t out_columns, const void* in,
                         void* out) {
  std::vector<float> wide(static_cast<std::size_t>(rows * in_columns));
  std::vector<float> result(static_cast<std::size_t>(rows * out_columns));
  widen(dtype, in, wide.data(), rows * in_columns);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < out_columns; ++i) {
      const auto first = static_cast<std::size_t>(r * in_columns + i);
      const std::size_t second = first + static_cast<std::size_t>(in_columns - out_columns);
      result[static_cast<std::size_t>(r * out_columns + i)] = wide[first] * wide[second] + 0.25f;
    }
  }
  narrow(dtype, result.data(), out, rows * out_columns);
  return 0;
}

/// Experts with random weights, in memory, canonical; the store reads them piece by piece.
class Model {
 public:
  Model(const ModelShape& shape, std::uint64_t seed) : shape_(shape) {
    layout_ = {.dtype = shape.dtype,
               .hidden = shape.hidden,
               .intermediate = shape.intermediate,
               .gated = shape.gated,
               .has_bias = shape.has_bias};
    std::mt19937_64 rng(seed);
    const std::size_t stride = align_up(layout_.bytes(), 64) + 64;
    memory_ = AlignedBuffer(stride * static_cast<std::size_t>(shape.num_layers) *
                            static_cast<std::size_t>(shape.num_experts));
    std::memset(memory_.data(), 0, memory_.bytes());
    ExpertStoreBuilder builder({.chunk_bytes = shape.chunk_bytes});
    const bool in_file = !shape.file.empty();
    if (in_file) {
      // Written before the store opens it; the pieces follow in the same order.
      std::mt19937_64 same(seed);
      std::byte* place = memory_.data() + shape.misalignment;
      for (std::int32_t i = 0; i < shape.num_layers * shape.num_experts; ++i, place += stride)
        fill(place, same);
      std::ofstream out(shape.file, std::ios::binary);
      out.write(reinterpret_cast<const char*>(memory_.data()),
                static_cast<std::streamsize>(memory_.bytes()));
      out.close();
      file_ = builder.add_file(shape.file);
    }
    std::byte* next = memory_.data() + shape.misalignment;
    for (std::int32_t l = 0; l < shape.num_layers; ++l) {
      builder.add_layer({.name = "layers." + std::to_string(l) + ".experts",
                         .num_experts = shape.num_experts,
                         .layout = layout_});
      for (std::int32_t e = 0; e < shape.num_experts; ++e, next += stride) {
        fill(next, rng);
        experts_.push_back(next);
        add_pieces(builder, make_key(l, e), next);
      }
    }
    store_ = builder.build();
    for (std::int32_t l = 0; l < shape.num_layers; ++l) specs_.push_back(spec());
  }

  [[nodiscard]] const ModelShape& shape() const { return shape_; }
  [[nodiscard]] const ExpertLayout& layout() const { return layout_; }
  [[nodiscard]] std::shared_ptr<const ExpertStore> store() const { return store_; }
  [[nodiscard]] const std::vector<LayerSpec>& specs() const { return specs_; }
  [[nodiscard]] const std::byte* expert(ExpertKey key) const {
    return experts_[static_cast<std::size_t>(to_int(key.layer) * shape_.num_experts +
                                             to_int(key.expert))];
  }
  /// Whether a slot holds this expert's sections.
  [[nodiscard]] bool holds(ExpertKey key, const std::byte* slot) const {
    const std::byte* const truth = expert(key);
    const auto same = [&](std::size_t offset, std::size_t bytes) {
      return std::memcmp(truth + offset, slot + offset, bytes) == 0;
    };
    if (!same(0, layout_.w13_bytes()) || !same(layout_.w2_offset(), layout_.w2_bytes()))
      return false;
    return !layout_.has_bias || (same(layout_.b13_offset(), bias_bytes(layout_.w13_rows())) &&
                                 same(layout_.b2_offset(), bias_bytes(layout_.hidden)));
  }
  [[nodiscard]] std::uint64_t slots(std::int64_t count) const {
    return static_cast<std::uint64_t>(count) * store_->slot_bytes(LayerIdx{0});
  }

 private:
  static std::size_t bias_bytes(std::int64_t rows) {
    return static_cast<std::size_t>(rows) * sizeof(float);
  }
  void fill(std::byte* expert, std::mt19937_64& rng) const {
    const auto put = [&](std::size_t offset, DType dtype, std::int64_t count, float scale) {
      const auto values = random_values(dtype, count, rng, scale);
      std::memcpy(expert + offset, values.data(), values.size());
    };
    const float scale = 1.0f / std::sqrt(static_cast<float>(layout_.hidden));
    put(0, layout_.dtype, layout_.w13_rows() * layout_.hidden, scale);
    put(layout_.w2_offset(), layout_.dtype, layout_.hidden * layout_.intermediate, scale);
    if (!layout_.has_bias) return;
    put(layout_.b13_offset(), DType::kF32, layout_.w13_rows(), 0.1f);
    put(layout_.b2_offset(), DType::kF32, layout_.hidden, 0.1f);
  }
  void add_pieces(ExpertStoreBuilder& builder, ExpertKey key, const std::byte* expert) const {
    const auto add = [&](std::size_t offset, std::size_t bytes) {
      const std::uint64_t start = file_ == FileIdx::kMemory
                                      ? reinterpret_cast<std::uintptr_t>(expert)
                                      : static_cast<std::uint64_t>(expert - memory_.data());
      builder.add_piece(
          key, {.file = file_, .offset = start + offset, .bytes = bytes, .target_offset = offset});
    };
    add(0, layout_.w13_bytes());
    add(layout_.w2_offset(), layout_.w2_bytes());
    if (!layout_.has_bias) return;
    add(layout_.b13_offset(), bias_bytes(layout_.w13_rows()));
    add(layout_.b2_offset(), bias_bytes(layout_.hidden));
  }
  [[nodiscard]] LayerSpec spec() const {
    LayerSpec spec{.gate = shape_.gate, .gate_callback = {}, .post_expert_callback = {}};
    if (shape_.generic_gate) {
      spec.gate.kind = GateKind::kGeneric;
      spec.gate_callback = multiply_gate;
    }
    if (shape_.post_callback) {
      spec.post_expert_callback = [](LayerIdx, DType dtype, std::int64_t rows,
                                     std::int64_t in_columns, std::int64_t, const void* in,
                                     void* out) {
        std::vector<float> wide(static_cast<std::size_t>(rows * in_columns));
        widen(dtype, in, wide.data(), rows * in_columns);
        for (float& value : wide) value = 0.75f * value + 0.125f;
        narrow(dtype, wide.data(), out, rows * in_columns);
        return 0;
      };
    }
    return spec;
  }

  ModelShape shape_;
  ExpertLayout layout_;
  FileIdx file_ = FileIdx::kMemory;
  AlignedBuffer memory_;
  std::vector<std::byte*> experts_;
  std::shared_ptr<const ExpertStore> store_;
  std::vector<LayerSpec> specs_;
};

/// One layer's inputs, with the memory behind them.
struct Call {
  LayerIdx layer{};
  std::int64_t num_tokens = 0;
  std::int64_t top_k = 0;
  DType activations = DType::kF32;
  DType weights_dtype = DType::kF32;
  std::vector<std::byte> hidden;
  std::vector<std::int64_t> ids;
  std::vector<std::byte> weights;

  [[nodiscard]] ForwardArgs args(void* out) const {
    return {.layer = layer,
            .num_tokens = num_tokens,
            .top_k = top_k,
            .activations = activations,
            .weights_dtype = weights_dtype,
            .hidden = hidden.data(),
            .expert_ids = ids.data(),
            .weights = weights.data(),
            .out = out};
  }
};

struct CallShape {
  std::int64_t num_tokens = 1;
  std::int64_t top_k = 2;
  DType activations = DType::kF32;
  DType weights_dtype = DType::kF32;
  bool odd_entries = false;  // sentinels, negative ids, duplicates, weights of zero
};

inline Call make_call(const ModelShape& model, std::int32_t layer, const CallShape& shape,
                      std::mt19937_64& rng) {
  Call call{.layer = LayerIdx{layer},
            .num_tokens = shape.num_tokens,
            .top_k = shape.top_k,
            .activations = shape.activations,
            .weights_dtype = shape.weights_dtype,
            .hidden = random_values(shape.activations, shape.num_tokens * model.hidden, rng, 1.0f),
            .ids = {},
            .weights = {}};
  const std::int64_t entries = shape.num_tokens * shape.top_k;
  std::vector<float> weights;
  std::uniform_real_distribution<float> weight(0.05f, 0.95f);
  std::uniform_int_distribution<std::int64_t> expert(0, model.num_experts - 1);
  for (std::int64_t i = 0; i < entries; ++i) {
    // Distinct within a token where that is possible, as routers choose.
    std::int64_t id = expert(rng);
    const auto first = static_cast<std::ptrdiff_t>(i - i % shape.top_k);
    while (shape.top_k <= model.num_experts &&
           std::find(call.ids.begin() + first, call.ids.end(), id) != call.ids.end()) {
      id = expert(rng);
    }
    float value = weight(rng);
    if (shape.odd_entries) {
      const std::uint64_t kind = rng() % 8;
      if (kind == 0) id = model.num_experts + static_cast<std::int64_t>(rng() % 3);
      if (kind == 1) id = -1;
      if (kind == 2 && i % shape.top_k > 0) id = call.ids.back();
      if (kind == 3) value = 0.0f;
    }
    call.ids.push_back(id);
    weights.push_back(value);
  }
  call.weights.resize(static_cast<std::size_t>(entries) * element_bytes(shape.weights_dtype));
  narrow(shape.weights_dtype, weights.data(), call.weights.data(), entries);
  return call;
}

}  // namespace sluice::testing
