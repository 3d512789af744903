#include "store/expert_store.h"

#include <cstdio>
#include <cstring>

#include "base/crc32c.h"
#include "base/error.h"
#include "store/expert_store_impl.h"
#include "store/io_scratch.h"

namespace sluice {
namespace {

bool is_aligned(const std::byte* address) {
  return reinterpret_cast<std::uintptr_t>(address) % kDirectAlignment == 0;
}

// Reads the chunk's blocks, straight into the slot where that may be, and returns where its first
// source byte lies.
const std::byte* fetch(const ReadFile& file, const ReadChunk& chunk, const Scatter& first,
                       std::byte* slot, IoScratch& scratch, ReadFile::Cost& cost) {
  if (chunk.straight && is_aligned(slot)) {
    file.read_aligned(chunk.offset, chunk.bytes, chunk.bytes, slot + first.target, cost);
    return slot + first.target;
  }
  std::byte* bounce = scratch.reserve(chunk.aligned_bytes());
  const std::size_t lead = chunk.offset - chunk.aligned_offset();
  file.read_aligned(chunk.aligned_offset(), chunk.aligned_bytes(), lead + chunk.bytes, bounce,
                    cost);
  return bounce + lead;
}

}  // namespace

std::size_t ExpertStore::Impl::index(ExpertKey key) const {
  const auto layer = static_cast<std::size_t>(to_int(key.layer));
  require<InternalError>(
      to_int(key.layer) >= 0 && layer < layers.size() && to_int(key.expert) >= 0 &&
          to_int(key.expert) < layers[layer].stored.num_experts,
      [&] { return "expert store: got " + describe(key) + ", expected one that it holds"; });
  return layers[layer].first_expert + static_cast<std::size_t>(to_int(key.expert));
}

ExpertStore::ExpertStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ExpertStore::~ExpertStore() = default;

void ExpertStore::read(ExpertKey key, std::int32_t chunk, std::byte* slot, IoScratch& scratch,
                       std::uint64_t* bytes_read) const {
  const std::size_t expert = impl_->index(key);
  const std::span<const ReadChunk> chunks = impl_->chunks_of(expert);
  require<InternalError>(chunk >= 0 && static_cast<std::size_t>(chunk) < chunks.size(), [&] {
    return "expert store: got chunk " + std::to_string(chunk) + " of " + describe(key) +
           ", expected one of " + std::to_string(chunks.size());
  });
  const ReadChunk& wanted = chunks[static_cast<std::size_t>(chunk)];
  const std::span<const Scatter> parts =
      std::span(impl_->plan.parts).subspan(wanted.first_part, wanted.num_parts);

  auto& counters = impl_->counters;
  if (wanted.file == FileIdx::kMemory) {
    for (const Scatter& part : parts) {
      scatter(part, reinterpret_cast<const std::byte*>(part.source), slot);
    }
    counters.memory_bytes.fetch_add(wanted.payload_bytes, std::memory_order_relaxed);
    return;
  }

  const ReadFile& file = impl_->files[static_cast<std::size_t>(wanted.file)];
  Checksums* checksums = impl_->checksums.get();
  const bool due = checksums != nullptr && checksums->due(expert);
  struct Report {  // what the read cost is counted also when it throws
    ReadFile::Cost cost;
    decltype(counters) totals;
    std::uint64_t* bytes_read;
    ~Report() {
      totals.bytes_read.fetch_add(cost.bytes, std::memory_order_relaxed);
      totals.reads.fetch_add(1, std::memory_order_relaxed);
      totals.buffered_reads.fetch_add(cost.buffered, std::memory_order_relaxed);
      totals.retried_reads.fetch_add(cost.retries, std::memory_order_relaxed);
      if (bytes_read != nullptr) *bytes_read += cost.bytes;
    }
  } report{{}, counters, bytes_read};

  const RateLimit::Instant begun = RateLimit::Clock::now();
  const std::byte* source = fetch(file, wanted, parts[0], slot, scratch, report.cost);
  if (source != slot + parts[0].target) {
    for (const Scatter& part : parts) scatter(part, source + (part.source - wanted.offset), slot);
  }
  impl_->rate_limit.pass(report.cost.bytes, begun);
  if (!due) return;

  const std::uint32_t crc = crc32c(std::span(source, wanted.bytes));
  const auto verdict =
      checksums->accept(expert, chunks, static_cast<std::size_t>(chunk), crc, slot);
  require<CheckpointError>(verdict == Checksums::Verdict::kGood, [&] {
    char expected[9];
    std::snprintf(expected, sizeof expected, "%08x", checksums->expected(expert));
    return file.path() + ": " + describe(key) +
           ": got bytes of another checksum, expected CRC-32C " + expected +
           "; the pack or its disk is damaged: write the pack again";
  });
}

void ExpertStore::read_expert(ExpertKey key, std::span<std::byte> out) const {
  const std::size_t bytes = layer(key.layer).layout.bytes();
  require<ConfigError>(out.size() == bytes, [&] {
    return "nbytes: got " + std::to_string(out.size()) + ", expected " + std::to_string(bytes);
  });
  const AlignedBuffer slot(slot_bytes(key.layer));
  std::memset(slot.data(), 0, slot.bytes());
  IoScratch scratch;
  for (std::int32_t c = 0; c < num_chunks(key); ++c) read(key, c, slot.data(), scratch);
  std::memcpy(out.data(), slot.data(), bytes);
}

std::int32_t ExpertStore::num_layers() const {
  return static_cast<std::int32_t>(impl_->layers.size());
}

const StoredLayer& ExpertStore::layer(LayerIdx layer) const {
  return impl_->layers.at(static_cast<std::size_t>(to_int(layer))).stored;
}

std::size_t ExpertStore::slot_bytes(LayerIdx layer) const {
  return impl_->layers.at(static_cast<std::size_t>(to_int(layer))).slot_bytes;
}

std::uint64_t ExpertStore::total_slot_bytes() const {
  std::uint64_t total = 0;
  for (const Impl::Layer& layer : impl_->layers) {
    total += std::uint64_t{layer.slot_bytes} * static_cast<std::uint64_t>(layer.stored.num_experts);
  }
  return total;
}

std::int32_t ExpertStore::num_chunks(ExpertKey key) const {
  return impl_->experts[impl_->index(key)].num_chunks;
}

std::size_t ExpertStore::chunk_bytes(ExpertKey key, std::int32_t chunk) const {
  const std::span<const ReadChunk> chunks = impl_->chunks_of(impl_->index(key));
  require<InternalError>(chunk >= 0 && static_cast<std::size_t>(chunk) < chunks.size(), [&] {
    return "expert store: got chunk " + std::to_string(chunk) + " of " + describe(key) +
           ", expected one of " + std::to_string(chunks.size());
  });
  return chunks[static_cast<std::size_t>(chunk)].payload_bytes;
}

std::size_t ExpertStore::largest_read_bytes() const { return impl_->largest_read_bytes; }

std::optional<ExpertStore::InPlace> ExpertStore::in_place(ExpertKey key) const {
  const Impl::Expert& expert = impl_->experts[impl_->index(key)];
  if (!expert.is_in_place) return std::nullopt;
  return expert.in_place;
}

std::uint64_t ExpertStore::adopted_bytes() const { return impl_->adopted_bytes; }

StoreCounters ExpertStore::counters() const {
  const auto& now = impl_->counters;
  return {.bytes_read = now.bytes_read.load(std::memory_order_relaxed),
          .reads = now.reads.load(std::memory_order_relaxed),
          .buffered_reads = now.buffered_reads.load(std::memory_order_relaxed),
          .retried_reads = now.retried_reads.load(std::memory_order_relaxed),
          .memory_bytes = now.memory_bytes.load(std::memory_order_relaxed)};
}

std::string ExpertStore::description() const { return impl_->description; }

}  // namespace sluice
