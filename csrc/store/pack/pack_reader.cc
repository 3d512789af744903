#include <unistd.h>

#include <array>
#include <cstdio>
#include <string_view>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"
#include "store/file.h"
#include "store/io_scratch.h"
#include "store/pack/pack.h"
#include "store/pack/pack_format.h"
#include "store/safetensors.h"

namespace sluice {
namespace {

// A pack that has been proven: where its blobs are, and what they should add up to.
struct Pack {
  PackManifest manifest;
  std::uint64_t data_offset = 0;
  std::vector<std::uint32_t> checksums;
};

std::string_view find_metadata(const SafetensorsHeader& header, const std::string& key,
                               const std::string& path) {
  const auto found = header.metadata.find(key);
  require<CheckpointError>(found != header.metadata.end(), [&] {
    return path + ": pack: got no \"" + key +
           "\" in its metadata, expected a pack; make one with `sluice pack`";
  });
  return found->second;
}

void check_finished(const std::string& path) {
  static constexpr std::string_view kPartial = ".partial";
  require<CheckpointError>(!path.ends_with(kPartial), [&] {
    return path +
           ": pack: got an unfinished one, expected a finished one; run `sluice pack` again "
           "to resume it";
  });
  const std::string partial = path + std::string(kPartial);
  if (::access(path.c_str(), F_OK) != 0 && ::access(partial.c_str(), F_OK) == 0) {
    throw CheckpointError(path + ": pack: got only " + partial +
                          ", which is unfinished; run `sluice pack` again to resume it");
  }
}

void check_blob(const TensorInfo& tensor, const std::string& name, std::uint64_t bytes,
                std::uint64_t offset, const std::string& path) {
  const bool fits = tensor.name == name && tensor.dtype == "U8" && tensor.shape.size() == 1 &&
                    tensor.bytes == bytes && tensor.offset == offset;
  require<CheckpointError>(fits, [&] {
    return path + ": pack: got tensor \"" + tensor.name + "\" " + tensor.dtype + " of " +
           std::to_string(tensor.bytes) + " bytes at " + std::to_string(tensor.offset) +
           ", expected \"" + name + "\" U8 of " + std::to_string(bytes) + " at " +
           std::to_string(offset) + "; header and manifest disagree: write the pack again";
  });
}

void check_tensors(const Pack& pack, const SafetensorsHeader& header, const std::string& path) {
  const auto experts = static_cast<std::size_t>(total_experts(pack.manifest.layers));
  require<CheckpointError>(header.tensors.size() == experts + 1, [&] {
    return path + ": pack: got " + std::to_string(header.tensors.size()) + " tensors, expected " +
           std::to_string(experts) +
           " experts and their checksums; an expert is missing or there twice";
  });
  require<CheckpointError>(header.header_bytes % kDirectAlignment == 0, [&] {
    return path + ": pack: got a header of " + std::to_string(header.header_bytes) +
           " bytes, expected a multiple of 4096; write the pack again";
  });
  std::size_t i = 0;
  std::uint64_t offset = header.header_bytes;
  for (std::size_t l = 0; l < pack.manifest.layers.size(); ++l) {
    const std::uint64_t bytes = blob_bytes(pack.manifest.layers[l].layout);
    for (std::int32_t e = 0; e < pack.manifest.layers[l].num_experts; ++e, ++i, offset += bytes) {
      check_blob(header.tensors[i], blob_name(l, e), bytes, offset, path);
    }
  }
  const TensorInfo& last = header.tensors[i];
  const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(experts), 1};
  require<CheckpointError>(
      last.name == kPackChecksums && last.dtype == "U32" && last.shape == shape, [&] {
        return path + ": pack: got \"" + last.name + "\" " + last.dtype +
               " as the last tensor, expected \"" + kPackChecksums + "\" U32 [" +
               std::to_string(experts) + ", 1]; write the pack again";
      });
}

Pack prove(const ReadFile& file) {
  const std::string& path = file.path();
  Pack pack;
  try {
    const SafetensorsHeader header =
        parse_safetensors_header(read_safetensors_header_text(file), file.bytes());
    const std::string_view format = find_metadata(header, "format", path);
    require<CheckpointError>(format == kPackFormat, [&] {
      return path + ": pack: got format \"" + std::string(format) + "\", expected \"" +
             kPackFormat + "\"; upgrade sluice, or write the pack again";
    });
    pack.manifest = PackManifest::from_json(find_metadata(header, "sluice", path));
    check_tensors(pack, header, path);
    pack.data_offset = header.header_bytes;
    const TensorInfo& last = header.tensors.back();
    std::vector<std::byte> raw(last.bytes);
    file.read_exact(last.offset, raw.size(), raw.data());
    for (std::size_t i = 0; i + 4 <= raw.size(); i += 4) {
      std::uint32_t crc = 0;
      for (std::size_t b = 0; b < 4; ++b)
        crc |= std::to_integer<std::uint32_t>(raw[i + b]) << (8 * b);
      pack.checksums.push_back(crc);
    }
  } catch (const CheckpointError& error) {
    const std::string_view what = error.what();
    if (what.starts_with(path)) throw;
    throw CheckpointError(path + ": " + std::string(what));
  }
  return pack;
}

}  // namespace

std::shared_ptr<const ExpertStore> open_pack(const std::string& path, ExpertStore::Options options,
                                             PackManifest* manifest) {
  check_finished(path);
  ExpertStoreBuilder builder(options);
  // Opened once: what is proven is what is read, also when a new pack takes the name meanwhile.
  ReadFile opened(path, options.direct);
  Pack pack = prove(opened);
  const FileIdx file = builder.add_file(std::move(opened));
  builder.set_direct_slots(true);
  builder.set_description("pack " + path);
  std::uint64_t offset = pack.data_offset;
  std::size_t expert = 0;
  for (const StoredLayer& layer : pack.manifest.layers) {
    const LayerIdx idx = builder.add_layer(layer);
    const std::size_t bytes = blob_bytes(layer.layout);
    for (std::int32_t e = 0; e < layer.num_experts; ++e, ++expert, offset += bytes) {
      const ExpertKey key{idx, ExpertIdx{e}};
      Piece piece;
      piece.file = file;
      piece.offset = offset;
      piece.bytes = bytes;
      builder.add_piece(key, piece);
      builder.set_checksum(key, pack.checksums[expert]);
    }
  }
  if (manifest != nullptr) *manifest = std::move(pack.manifest);
  return builder.build();
}

void verify_pack(const std::string& path,
                 const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  PackManifest manifest;
  const auto store = open_pack(
      path,
      ExpertStore::Options{
          .chunk_bytes = 4 * kMiB, .verify = Verify::kFirst, .direct = true, .read_rate = 0},
      &manifest);
  const std::uint64_t total = total_blob_bytes(manifest.layers);
  std::uint64_t done = 0;
  IoScratch scratch(store->largest_read_bytes());
  for (std::int32_t l = 0; l < store->num_layers(); ++l) {
    AlignedBuffer slot(store->slot_bytes(LayerIdx{l}));
    for (std::int32_t e = 0; e < store->layer(LayerIdx{l}).num_experts; ++e) {
      const ExpertKey key = make_key(l, e);
      for (std::int32_t c = 0; c < store->num_chunks(key); ++c) {
        store->read(key, c, slot.data(), scratch);
      }
      done += slot.bytes();
      if (progress) progress(done, total);
    }
  }
}

}  // namespace sluice
