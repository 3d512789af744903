#pragma once

#include <memory>
#include <utility>

#include "store/expert_store.h"
#include "transfer/transfer_engine.h"

namespace sluice {

/// The store's own chunks: what a reader thread reads at once.
class StoreChunks final : public ChunkSource {
 public:
  explicit StoreChunks(std::shared_ptr<const ExpertStore> store) : store_(std::move(store)) {}
  [[nodiscard]] std::int32_t num_chunks(ExpertKey key) const override {
    return store_->num_chunks(key);
  }
  [[nodiscard]] std::size_t chunk_bytes(ExpertKey key, std::int32_t chunk) const override {
    return store_->chunk_bytes(key, chunk);
  }

 private:
  const std::shared_ptr<const ExpertStore> store_;
};

}  // namespace sluice
