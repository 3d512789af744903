#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/log_ring.h"
#include "store/io_scratch.h"
#include "store/pack/pack.h"
#include "store/pack/pack_format.h"
#include "store/pack/partial_pack.h"

namespace sluice {

struct PackWriter::Impl {
  std::string path;
  std::vector<StoredLayer> layers;
  std::int64_t num_experts = 0;
  std::optional<PartialPack> partial;
  std::int64_t resumed = 0;
  std::size_t layer = 0;  ///< of the next expert
  std::int32_t expert = 0;
  AlignedBuffer blob;
  bool failed = false;
  bool finished = false;

  void next_expert() {
    if (++expert < layers[layer].num_experts) return;
    expert = 0;
    ++layer;
  }

  void require_usable() const {
    require<InternalError>(!failed && !finished, [&] {
      return path + ": pack writer: got a call after it " + (failed ? "failed" : "finished") +
             ", expected none; make a new writer to resume";
    });
  }
};

PackWriter::PackWriter(std::string path, PackManifest manifest, bool fresh,
                       std::uint64_t sync_bytes)
    : impl_(std::make_unique<Impl>()) {
  manifest = PackManifest::from_json(manifest.to_json());  // what no reader would take is refused
  impl_->path = path;
  impl_->num_experts = total_experts(manifest.layers);
  PartialPack::Plan plan{.path = std::move(path),
                         .header = pack_header(manifest),
                         .blob_bytes = {},
                         .sync_bytes = sync_bytes};
  std::size_t largest = 0;
  for (const StoredLayer& layer : manifest.layers) {
    largest = std::max(largest, blob_bytes(layer.layout));
    plan.blob_bytes.insert(plan.blob_bytes.end(), static_cast<std::size_t>(layer.num_experts),
                           blob_bytes(layer.layout));
  }
  impl_->blob = AlignedBuffer(largest);
  impl_->layers = std::move(manifest.layers);
  impl_->partial.emplace(std::move(plan), fresh);
  impl_->resumed = static_cast<std::int64_t>(impl_->partial->num_blobs());
  for (std::int64_t i = 0; i < impl_->resumed; ++i) impl_->next_expert();
}

PackWriter::~PackWriter() {
  if (impl_->finished || impl_->failed) return;
  try {
    impl_->partial->checkpoint();
  } catch (const std::exception& error) {  // what is not journalled is written again by a resume
    log_ring().log(LogLevel::kWarning, error.what());
  }
}

std::int64_t PackWriter::resumed_experts() const { return impl_->resumed; }
std::int64_t PackWriter::num_experts() const { return impl_->num_experts; }
std::uint64_t PackWriter::file_bytes() const { return impl_->partial->file_bytes(); }

void PackWriter::append(std::span<const std::byte> expert) {
  impl_->require_usable();
  require<InternalError>(impl_->layer < impl_->layers.size(), [&] {
    return impl_->path + ": pack writer: got an expert more, expected " +
           std::to_string(impl_->num_experts);
  });
  const ExpertLayout& layout = impl_->layers[impl_->layer].layout;
  require<InternalError>(expert.size() == layout.bytes(), [&] {
    return impl_->path + ": pack writer: got an expert of " + std::to_string(expert.size()) +
           " bytes, expected " + std::to_string(layout.bytes());
  });
  const std::span<std::byte> padded(impl_->blob.data(), blob_bytes(layout));
  std::memcpy(padded.data(), expert.data(), expert.size());
  clear_gaps(layout, padded);
  impl_->failed = true;
  impl_->partial->append(padded);
  impl_->failed = false;
  impl_->next_expert();
}

void PackWriter::finish() {
  impl_->require_usable();
  require<InternalError>(impl_->layer == impl_->layers.size(), [&] {
    return impl_->path + ": pack writer: got " + std::to_string(impl_->partial->num_blobs()) +
           " experts, expected " + std::to_string(impl_->num_experts);
  });
  impl_->failed = true;
  impl_->partial->finish();
  impl_->failed = false;
  impl_->finished = true;
}

}  // namespace sluice
