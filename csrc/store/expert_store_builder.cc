#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "base/error.h"
#include "store/coverage.h"
#include "store/expert_store.h"
#include "store/expert_store_impl.h"

namespace sluice {

struct ExpertStoreBuilder::Pending {
  explicit Pending(const ExpertStore::Options& options)
      : store(std::make_unique<ExpertStore::Impl>(options)) {}

  std::unique_ptr<ExpertStore::Impl> store;
  std::vector<std::vector<std::vector<Piece>>> pieces;  ///< [layer][expert]
  std::map<ExpertKey, std::uint32_t> checksums;
  bool direct_slots = false;
};

namespace {

constexpr std::size_t kMaxChunkBytes = 4 * kMiB;

std::optional<ExpertStore::InPlace> find_in_place(const ExpertLayout& layout,
                                                  std::span<const Piece> pieces) {
  const auto section = [&](std::size_t offset, std::size_t bytes) -> const std::byte* {
    for (const Piece& piece : pieces) {
      const bool whole = piece.file == FileIdx::kMemory && piece.target_offset == offset &&
                         piece.bytes == bytes && piece.transform == Piece::Transform::kCopy &&
                         piece.offset % kSlotAlignment == 0;
      if (whole) return reinterpret_cast<const std::byte*>(piece.offset);
    }
    return nullptr;
  };
  ExpertStore::InPlace found{.w13 = section(0, layout.w13_bytes()),
                             .w2 = section(layout.w2_offset(), layout.w2_bytes()),
                             .b13 = nullptr,
                             .b2 = nullptr};
  if (found.w13 == nullptr || found.w2 == nullptr) return std::nullopt;
  if (layout.has_bias) {
    found.b13 =
        section(layout.b13_offset(), static_cast<std::size_t>(layout.w13_rows()) * sizeof(float));
    found.b2 = section(layout.b2_offset(), static_cast<std::size_t>(layout.hidden) * sizeof(float));
    if (found.b13 == nullptr || found.b2 == nullptr) return std::nullopt;
  }
  return found;
}

}  // namespace

ExpertStoreBuilder::ExpertStoreBuilder(ExpertStore::Options options) {
  require<ConfigError>(options.chunk_bytes >= kDirectAlignment &&
                           options.chunk_bytes <= kMaxChunkBytes &&
                           options.chunk_bytes % kDirectAlignment == 0,
                       [&] {
                         return "chunk_bytes: got " + std::to_string(options.chunk_bytes) +
                                ", expected a multiple of 4096 from 4096 to 4194304";
                       });
  pending_ = std::make_unique<Pending>(options);
}

ExpertStoreBuilder::~ExpertStoreBuilder() = default;

FileIdx ExpertStoreBuilder::add_file(const std::string& path, const std::string& identity) {
  ReadFile file(path, pending_->store->options.direct);
  require<CheckpointError>(identity.empty() || identity == file.identity(), [&] {
    return path + ": got another file than the one whose header was read (" + file.identity() +
           ", expected " + identity + "); it was replaced meanwhile: load again";
  });
  return add_file(std::move(file));
}

FileIdx ExpertStoreBuilder::add_file(ReadFile file) {
  auto& files = pending_->store->files;
  files.push_back(std::move(file));
  return static_cast<FileIdx>(files.size() - 1);
}

LayerIdx ExpertStoreBuilder::add_layer(StoredLayer layer) {
  const ExpertLayout& layout = layer.layout;
  require<CheckpointError>(
      layer.num_experts > 0 && layer.num_experts <= kMaxExperts && layout.hidden > 0 &&
          layout.hidden <= kMaxWidth && layout.intermediate > 0 && layout.intermediate <= kMaxWidth,
      [&] {
        return "layer \"" + layer.name + "\": got " + std::to_string(layer.num_experts) +
               " experts of hidden " + std::to_string(layout.hidden) + ", intermediate " +
               std::to_string(layout.intermediate) +
               ", expected positive sizes up to 2^24 and 2^20 experts";
      });
  const auto num_experts = static_cast<std::size_t>(layer.num_experts);
  ExpertStore::Impl& store = *pending_->store;
  const std::size_t first =
      store.layers.empty() ? 0
                           : store.layers.back().first_expert +
                                 static_cast<std::size_t>(store.layers.back().stored.num_experts);
  store.layers.push_back({.stored = std::move(layer), .slot_bytes = 0, .first_expert = first});
  pending_->pieces.emplace_back(num_experts);
  return static_cast<LayerIdx>(store.layers.size() - 1);
}

void ExpertStoreBuilder::add_piece(ExpertKey key, const Piece& piece) {
  (void)pending_->store->index(key);
  pending_
      ->pieces[static_cast<std::size_t>(to_int(key.layer))]
              [static_cast<std::size_t>(to_int(key.expert))]
      .push_back(piece);
}

void ExpertStoreBuilder::set_direct_slots(bool direct_slots) {
  pending_->direct_slots = direct_slots;
}

void ExpertStoreBuilder::set_checksum(ExpertKey key, std::uint32_t crc32c) {
  (void)pending_->store->index(key);
  pending_->checksums[key] = crc32c;
}

void ExpertStoreBuilder::set_description(std::string description) {
  pending_->store->description = std::move(description);
}

std::shared_ptr<const ExpertStore> ExpertStoreBuilder::build() {
  require<InternalError>(pending_->store != nullptr,
                         [] { return std::string("expert store: built twice, expected once"); });
  ExpertStore::Impl& store = *pending_->store;
  const std::size_t slot_alignment = pending_->direct_slots ? kDirectAlignment : kSlotAlignment;
  for (std::size_t l = 0; l < store.layers.size(); ++l) {
    ExpertStore::Impl::Layer& layer = store.layers[l];
    const ExpertLayout& layout = layer.stored.layout;
    layer.slot_bytes = align_up(layout.bytes(), slot_alignment);
    for (std::size_t e = 0; e < pending_->pieces[l].size(); ++e) {
      std::vector<Piece>& pieces = pending_->pieces[l][e];
      const std::string who =
          "layer " + std::to_string(l) + " (" + layer.stored.name + ") expert " + std::to_string(e);
      check_pieces(who, layout, layer.slot_bytes, pieces, store.files);
      ExpertStore::Impl::Expert expert;
      expert.first_chunk = store.plan.chunks.size();
      append_chunks(pieces, layout.dtype, store.options.chunk_bytes, store.plan);
      expert.num_chunks = static_cast<std::int32_t>(store.plan.chunks.size() - expert.first_chunk);
      if (const auto in_place = find_in_place(layout, pieces)) {
        expert.is_in_place = true;
        expert.in_place = *in_place;
      }
      for (const Piece& piece : pieces) {
        if (piece.file == FileIdx::kMemory) store.adopted_bytes += piece.bytes;
      }
      const auto checksum = pending_->checksums.find(
          make_key(static_cast<std::int32_t>(l), static_cast<std::int32_t>(e)));
      require<CheckpointError>(
          checksum == pending_->checksums.end() ||
              (pieces.size() == 1 && pieces[0].file != FileIdx::kMemory &&
               pieces[0].transform == Piece::Transform::kCopy),
          [&] { return who + ": got a checksum over several pieces, expected one piece"; });
      store.experts.push_back(expert);
      pieces = {};
    }
  }
  if (!pending_->checksums.empty()) {
    require<CheckpointError>(pending_->checksums.size() == store.experts.size(), [&] {
      return "expert store: got " + std::to_string(pending_->checksums.size()) +
             " checksums, expected none or one for each of " +
             std::to_string(store.experts.size()) + " experts";
    });
    std::vector<std::uint32_t> expected;
    for (const auto& [key, crc] : pending_->checksums) expected.push_back(crc);
    std::vector<std::int32_t> num_chunks;
    for (const ExpertStore::Impl::Expert& expert : store.experts) {
      num_chunks.push_back(expert.num_chunks);
    }
    store.checksums =
        std::make_unique<Checksums>(store.options.verify, std::move(expected), num_chunks);
  }
  for (const ReadChunk& chunk : store.plan.chunks) {
    if (chunk.file == FileIdx::kMemory) continue;
    store.largest_read_bytes = std::max(store.largest_read_bytes, chunk.aligned_bytes());
  }
  return std::shared_ptr<const ExpertStore>(new ExpertStore(std::move(pending_->store)));
}

}  // namespace sluice
