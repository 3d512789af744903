#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "store/checksums.h"
#include "store/chunk_plan.h"
#include "store/expert_store.h"
#include "store/rate_limit.h"

namespace sluice {

/// What the builder has proven and the store reads by. Immutable but for counters and checksums.
struct ExpertStore::Impl {
  struct Layer {
    StoredLayer stored;
    std::size_t slot_bytes = 0;
    std::size_t first_expert = 0;  ///< position of its expert 0 in `experts`
  };
  struct Expert {
    std::size_t first_chunk = 0;
    std::int32_t num_chunks = 0;
    bool is_in_place = false;
    InPlace in_place{};
  };

  explicit Impl(const Options& store_options)
      : options(store_options), rate_limit(store_options.read_rate) {}

  [[nodiscard]] std::size_t index(ExpertKey key) const;
  [[nodiscard]] std::span<const ReadChunk> chunks_of(std::size_t expert) const {
    return std::span(plan.chunks)
        .subspan(experts[expert].first_chunk, static_cast<std::size_t>(experts[expert].num_chunks));
  }

  Options options;
  std::vector<ReadFile> files;
  std::vector<Layer> layers;
  std::vector<Expert> experts;
  ChunkPlan plan;
  std::string description;
  std::uint64_t adopted_bytes = 0;
  std::size_t largest_read_bytes = 0;
  std::unique_ptr<Checksums> checksums;  ///< null: none

  mutable RateLimit rate_limit;
  struct {
    std::atomic<std::uint64_t> bytes_read{0};
    std::atomic<std::uint64_t> reads{0};
    std::atomic<std::uint64_t> buffered_reads{0};
    std::atomic<std::uint64_t> retried_reads{0};
    std::atomic<std::uint64_t> memory_bytes{0};
  } mutable counters;
};

}  // namespace sluice
