#include "store/pack/pack_format.h"

#include <algorithm>
#include <cstring>

#include "base/bytes.h"
#include "base/error.h"
#include "base/json.h"

namespace sluice {

std::size_t blob_bytes(const ExpertLayout& layout) {
  return align_up(layout.bytes(), kDirectAlignment);
}

std::uint64_t total_blob_bytes(std::span<const StoredLayer> layers) {
  std::optional<std::uint64_t> total = 0;
  for (const StoredLayer& layer : layers) {
    const auto bytes =
        checked_mul(blob_bytes(layer.layout), static_cast<std::uint64_t>(layer.num_experts));
    if (total && bytes) total = checked_add(*total, *bytes);
    if (!bytes) total.reset();
  }
  require<CheckpointError>(total.has_value() && *total <= INT64_MAX / 2, [] {
    return std::string("pack manifest: got layers of more than 2^62 bytes, expected fewer");
  });
  return *total;
}

std::int64_t total_experts(std::span<const StoredLayer> layers) {
  std::int64_t total = 0;
  for (const StoredLayer& layer : layers) total += layer.num_experts;
  return total;
}

std::string blob_name(std::size_t layer, std::int32_t expert) {
  return "layers." + std::to_string(layer) + ".experts." + std::to_string(expert);
}

std::string pack_header(const PackManifest& manifest) {
  Json::Object tensors;
  std::uint64_t at = 0;
  const auto add = [&](std::string name, const char* dtype, Json::Array shape,
                       std::uint64_t bytes) {
    tensors.emplace_back(std::move(name),
                         Json::object({{"dtype", dtype},
                                       {"shape", std::move(shape)},
                                       {"data_offsets", Json::Array{at, at + bytes}}}));
    at += bytes;
  };
  for (std::size_t l = 0; l < manifest.layers.size(); ++l) {
    const std::uint64_t bytes = blob_bytes(manifest.layers[l].layout);
    for (std::int32_t e = 0; e < manifest.layers[l].num_experts; ++e) {
      add(blob_name(l, e), "U8", {bytes}, bytes);
    }
  }
  const std::int64_t experts = total_experts(manifest.layers);
  add(kPackChecksums, "U32", {experts, std::int64_t{1}},
      static_cast<std::uint64_t>(experts) * sizeof(std::uint32_t));
  tensors.emplace_back("__metadata__",
                       Json::object({{"format", kPackFormat}, {"sluice", manifest.to_json()}}));

  const std::string json = Json::object(std::move(tensors)).dump();
  const std::uint64_t total = align_up(8 + json.size(), kDirectAlignment);
  std::string header(total, ' ');
  for (std::size_t i = 0; i < 8; ++i) {
    header[i] = static_cast<char>(((total - 8) >> (8 * i)) & 0xff);
  }
  header.replace(8, json.size(), json);
  return header;
}

void clear_gaps(const ExpertLayout& layout, std::span<std::byte> blob) {
  const auto clear = [&](std::size_t begin, std::size_t end) {
    std::memset(blob.data() + begin, 0, end - begin);
  };
  clear(layout.w13_bytes(), layout.w2_offset());
  const std::size_t w2_end = layout.w2_offset() + layout.w2_bytes();
  if (layout.has_bias) {
    clear(w2_end, layout.b13_offset());
    clear(layout.b13_offset() + static_cast<std::size_t>(layout.w13_rows()) * sizeof(float),
          layout.b2_offset());
  }
  clear(layout.bytes(), blob.size());
}

}  // namespace sluice
