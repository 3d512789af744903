#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "store/expert_store.h"
#include "store/io_scratch.h"
#include "store/pack/pack.h"
#include "store/temp_folder.h"

namespace sluice::testing {

/// The canonical sections of one expert, with zeros between: what a slot should hold.
inline std::vector<std::byte> canonical_expert(const ExpertLayout& layout, std::uint64_t seed) {
  std::vector<std::byte> out(layout.bytes());
  const auto put = [&](std::size_t offset, std::size_t bytes, std::uint64_t salt) {
    const std::vector<std::byte> section = pattern(bytes, seed * 4 + salt);
    std::memcpy(out.data() + offset, section.data(), bytes);
  };
  put(0, layout.w13_bytes(), 0);
  put(layout.w2_offset(), layout.w2_bytes(), 1);
  if (layout.has_bias) {
    put(layout.b13_offset(), static_cast<std::size_t>(layout.w13_rows()) * 4, 2);
    put(layout.b2_offset(), static_cast<std::size_t>(layout.hidden) * 4, 3);
  }
  return out;
}

inline std::vector<std::byte> read_expert(const ExpertStore& store, ExpertKey key) {
  std::vector<std::byte> out(store.layer(key.layer).layout.bytes());
  store.read_expert(key, out);
  return out;
}

inline PackManifest small_manifest() {
  PackManifest manifest;
  manifest.model_id = "tests/small";
  manifest.revision = "main";
  manifest.config_sha256 = std::string(64, 'c');
  manifest.source_fingerprint = std::string(64, 'f');
  manifest.layers = {
      {.name = "model.layers.0.mlp.experts",
       .num_experts = 3,
       .layout = {.dtype = DType::kBF16,
                  .hidden = 48,
                  .intermediate = 33,
                  .gated = true,
                  .has_bias = true}},
      {.name = "model.layers.1.mlp.experts",
       .num_experts = 2,
       .layout = {.dtype = DType::kF32,
                  .hidden = 40,
                  .intermediate = 24,
                  .gated = false,
                  .has_bias = false}},
  };
  return manifest;
}

inline std::uint64_t seed_of(std::size_t layer, std::int32_t expert) {
  return layer * 1000 + static_cast<std::uint64_t>(expert) + 1;
}

/// Writes a whole pack of pseudo-random experts.
inline void write_pack(const std::string& path, const PackManifest& manifest) {
  PackWriter writer(path, manifest);
  std::int64_t next = 0;
  for (std::size_t l = 0; l < manifest.layers.size(); ++l) {
    for (std::int32_t e = 0; e < manifest.layers[l].num_experts; ++e, ++next) {
      if (next < writer.resumed_experts()) continue;
      writer.append(canonical_expert(manifest.layers[l].layout, seed_of(l, e)));
    }
  }
  writer.finish();
}

}  // namespace sluice::testing
