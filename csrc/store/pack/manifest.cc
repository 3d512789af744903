#include <string>

#include "base/error.h"
#include "base/json.h"
#include "store/pack/pack.h"
#include "store/pack/pack_format.h"

namespace sluice {
namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw CheckpointError("pack manifest: " + what);
}

const Json& member(const Json& object, const char* key) {
  const Json* found = object.find(key);
  if (found == nullptr) refuse(std::string("got no \"") + key + "\", expected one");
  return *found;
}

std::string text(const Json& object, const char* key) {
  const std::string* value = member(object, key).as_string();
  if (value == nullptr) refuse(std::string("\"") + key + "\": got no string, expected one");
  return *value;
}

bool flag(const Json& object, const char* key) {
  const bool* value = member(object, key).as_bool();
  if (value == nullptr) refuse(std::string("\"") + key + "\": got neither true nor false");
  return *value;
}

std::int64_t number(const Json& object, const char* key, std::int64_t limit) {
  const Json& found = member(object, key);
  const std::uint64_t* value = found.as_uint64();
  if (value == nullptr || *value < 1 || *value > static_cast<std::uint64_t>(limit)) {
    refuse(std::string("\"") + key + "\": got " + found.dump().substr(0, 64) +
           ", expected an integer from 1 to " + std::to_string(limit));
  }
  return static_cast<std::int64_t>(*value);
}

void check_members(const Json& object, std::size_t expected, const char* where) {
  const Json::Object* members = object.as_object();
  if (members == nullptr) refuse(std::string(where) + ": got no object, expected one");
  if (members->size() != expected) {
    refuse(std::string(where) + ": got " + std::to_string(members->size()) +
           " members, expected the " + std::to_string(expected) + " of version 1");
  }
}

Json layer_json(const StoredLayer& layer) {
  const ExpertLayout& layout = layer.layout;
  return Json::object({{"name", layer.name},
                       {"experts", std::int64_t{layer.num_experts}},
                       {"format", "plain"},
                       {"dtype", std::string(dtype_name(layout.dtype))},
                       {"hidden", layout.hidden},
                       {"intermediate", layout.intermediate},
                       {"gated", layout.gated},
                       {"bias", layout.has_bias},
                       {"expert_bytes", std::uint64_t{layout.bytes()}}});
}

StoredLayer read_layer(const Json& json) {
  check_members(json, 9, "layer");
  StoredLayer layer;
  layer.name = text(json, "name");
  layer.num_experts = static_cast<std::int32_t>(number(json, "experts", kMaxExperts));
  if (const std::string format = text(json, "format"); format != "plain") {
    refuse("\"format\": got \"" + format + "\", expected \"plain\"; upgrade sluice to read it");
  }
  layer.layout.dtype = parse_dtype(text(json, "dtype"));
  layer.layout.hidden = number(json, "hidden", kMaxWidth);
  layer.layout.intermediate = number(json, "intermediate", kMaxWidth);
  layer.layout.gated = flag(json, "gated");
  layer.layout.has_bias = flag(json, "bias");
  const Json& stated = member(json, "expert_bytes");
  const std::uint64_t expected = layer.layout.bytes();
  if (stated.as_uint64() == nullptr || *stated.as_uint64() != expected) {
    refuse("layer \"" + layer.name + "\": got expert_bytes " + stated.dump().substr(0, 64) +
           ", expected " + std::to_string(expected) + " from its sizes; write the pack again");
  }
  return layer;
}

}  // namespace

std::string PackManifest::to_json() const {
  Json::Array layer_array;
  for (const StoredLayer& layer : layers) layer_array.push_back(layer_json(layer));
  return Json::object({{"version", std::int64_t{1}},
                       {"model_id", model_id},
                       {"revision", revision},
                       {"config_sha256", config_sha256},
                       {"source_fingerprint", source_fingerprint},
                       {"layers", std::move(layer_array)}})
      .dump();
}

PackManifest PackManifest::from_json(std::string_view json) {
  const Json document = Json::parse(json);
  const Json* version = document.find("version");
  if (version == nullptr || version->as_uint64() == nullptr || *version->as_uint64() != 1) {
    refuse("got version " + (version == nullptr ? "none" : version->dump().substr(0, 64)) +
           ", expected 1; upgrade sluice, or write the pack again");
  }
  check_members(document, 6, "manifest");
  PackManifest manifest;
  manifest.model_id = text(document, "model_id");
  manifest.revision = text(document, "revision");
  manifest.config_sha256 = text(document, "config_sha256");
  manifest.source_fingerprint = text(document, "source_fingerprint");
  const Json::Array* layers = member(document, "layers").as_array();
  if (layers == nullptr || layers->empty()) {
    refuse("\"layers\": got none, expected at least one");
  }
  for (const Json& layer : *layers) manifest.layers.push_back(read_layer(layer));
  (void)total_blob_bytes(manifest.layers);
  return manifest;
}

}  // namespace sluice
