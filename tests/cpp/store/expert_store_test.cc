#include "store/expert_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>

#include "base/dtype.h"
#include "base/error.h"
#include "store/experts.h"
#include "store/fault_disk.h"

namespace sluice {
namespace {

using testing::canonical_expert;
using testing::FaultDisk;
using testing::pattern;
using testing::read_expert;
using testing::TempFolder;
using testing::write_file;
using Bytes = std::vector<std::byte>;

// A shard that grows piece by piece, with what each piece should become in the slot.
struct Shard {
  Bytes bytes;
  std::vector<Piece> pieces;

  std::uint64_t put(const Bytes& data, std::size_t gap) {
    const Bytes filler = pattern(gap, bytes.size() + 77);
    bytes.insert(bytes.end(), filler.begin(), filler.end());
    const std::uint64_t at = bytes.size();
    bytes.insert(bytes.end(), data.begin(), data.end());
    return at;
  }
};

// [rows, columns] → [columns, rows], one element at a time.
Bytes transposed(const Bytes& in, std::size_t rows, std::size_t columns, std::size_t element) {
  Bytes out(in.size());
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < columns; ++c) {
      std::memcpy(out.data() + (c * rows + r) * element, in.data() + (r * columns + c) * element,
                  element);
    }
  }
  return out;
}

// fp32 of bf16 numbers, and those numbers.
std::pair<Bytes, Bytes> bias_of(std::size_t count, std::uint64_t seed) {
  Bytes narrow = pattern(count * 2, seed);
  Bytes wide(count * 4);
  for (std::size_t i = 0; i < count; ++i) {
    BFloat16 value;
    std::memcpy(&value, narrow.data() + 2 * i, 2);
    value.bits &= 0xbfffu;  // finite
    std::memcpy(narrow.data() + 2 * i, &value, 2);
    const float number = to_float(value);
    std::memcpy(wide.data() + 4 * i, &number, 4);
  }
  return {narrow, wide};
}

// Builds one expert from random pieces of two shards; returns the bytes that its slot should hold.
Bytes random_expert(std::mt19937& random, const ExpertLayout& layout, std::vector<Shard>& shards,
                    std::vector<std::pair<std::size_t, Piece>>& pieces) {
  const auto pick = [&](std::size_t limit) { return static_cast<std::size_t>(random()) % limit; };
  static constexpr std::size_t kGaps[] = {0, 0, 1, 3, 100, 4096, 70000};
  const auto gap = [&] { return kGaps[pick(std::size(kGaps))]; };
  Bytes expected(layout.bytes());
  const std::size_t element = element_bytes(layout.dtype);
  const auto matrix = [&](std::size_t offset, std::size_t rows, std::size_t columns) {
    const std::size_t bytes = rows * columns * element;
    const Bytes wanted = pattern(bytes, random());
    std::memcpy(expected.data() + offset, wanted.data(), bytes);
    const std::size_t shard = pick(shards.size());
    Piece piece;
    piece.bytes = bytes;
    piece.target_offset = offset;
    if (pick(2) == 0) {
      piece.transform = Piece::Transform::kTranspose;  // lies as [columns, rows]
      piece.rows = static_cast<std::int64_t>(columns);
      piece.columns = static_cast<std::int64_t>(rows);
      piece.offset = shards[shard].put(transposed(wanted, rows, columns, element), gap());
    } else {
      piece.offset = shards[shard].put(wanted, gap());
    }
    pieces.emplace_back(shard, piece);
  };
  const auto bias = [&](std::size_t offset, std::size_t count) {
    const auto [narrow, wide] = bias_of(count, random());
    std::memcpy(expected.data() + offset, wide.data(), wide.size());
    const std::size_t shard = pick(shards.size());
    Piece piece;
    piece.target_offset = offset;
    if (pick(2) == 0) {
      piece.transform = Piece::Transform::kWiden;
      piece.dtype = DType::kBF16;
      piece.bytes = narrow.size();
      piece.offset = shards[shard].put(narrow, gap());
    } else {
      piece.bytes = wide.size();
      piece.offset = shards[shard].put(wide, gap());
    }
    pieces.emplace_back(shard, piece);
  };
  const auto hidden = static_cast<std::size_t>(layout.hidden);
  const auto inner = static_cast<std::size_t>(layout.intermediate);
  matrix(0, inner, hidden);  // gate, then up behind it
  if (layout.gated) matrix(inner * hidden * element, inner, hidden);
  matrix(layout.w2_offset(), hidden, inner);
  if (layout.has_bias) {
    bias(layout.b13_offset(), static_cast<std::size_t>(layout.w13_rows()));
    bias(layout.b2_offset(), hidden);
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  return expected;
}

TEST(ExpertStore, PutsEveryByteInItsPlaceWhateverThePieces) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const TempFolder folder;
  for (int round = 0; round < 60; ++round) {
    ExpertLayout layout{.dtype = random() % 2 == 0 ? DType::kBF16 : DType::kF32,
                        .hidden = static_cast<std::int64_t>(1 + random() % 90),
                        .intermediate = static_cast<std::int64_t>(1 + random() % 2500),
                        .gated = random() % 3 != 0,
                        .has_bias = random() % 2 == 0};
    if (random() % 2 == 0) std::swap(layout.hidden, layout.intermediate);
    std::vector<Shard> shards(2);
    std::vector<std::pair<std::size_t, Piece>> pieces;
    const Bytes expected = random_expert(random, layout, shards, pieces);
    const std::size_t chunk_bytes = 4096 * (1 + random() % 8);
    ExpertStoreBuilder builder({.chunk_bytes = chunk_bytes, .direct = random() % 2 == 0});
    std::vector<FileIdx> files;
    for (std::size_t s = 0; s < shards.size(); ++s) {
      const std::string path = folder.file("shard" + std::to_string(s));
      write_file(path, shards[s].bytes);
      files.push_back(builder.add_file(path));
    }
    builder.set_direct_slots(random() % 2 == 0);
    (void)builder.add_layer({.name = "experts", .num_experts = 1, .layout = layout});
    std::size_t source_bytes = 0;
    for (auto& [shard, piece] : pieces) {
      piece.file = random() % 4 == 0 ? FileIdx::kMemory : files[shard];
      if (piece.file == FileIdx::kMemory) {
        piece.offset = reinterpret_cast<std::uint64_t>(shards[shard].bytes.data()) + piece.offset;
      }
      source_bytes += piece.bytes;
      builder.add_piece(make_key(0, 0), piece);
    }
    const auto store = builder.build();

    const ExpertKey key = make_key(0, 0);
    std::vector<std::int32_t> order;
    std::size_t payload = 0;
    for (std::int32_t c = 0; c < store->num_chunks(key); ++c) {
      order.push_back(c);
      payload += store->chunk_bytes(key, c);
      EXPECT_LE(store->chunk_bytes(key, c), chunk_bytes);
    }
    EXPECT_EQ(payload, source_bytes);
    EXPECT_LE(store->largest_read_bytes(), chunk_bytes + 8192);
    std::shuffle(order.begin(), order.end(), random);
    AlignedBuffer slot(store->slot_bytes(key.layer) + 64);
    std::byte* target = slot.data() + (random() % 2 == 0 ? 64 : 0);  // with and without the bounce
    std::memset(slot.data(), 0, slot.bytes());
    IoScratch scratch(store->largest_read_bytes());
    std::uint64_t bytes_read = 0;
    for (const std::int32_t c : order) store->read(key, c, target, scratch, &bytes_read);
    EXPECT_EQ(Bytes(target, target + layout.bytes()), expected);
    EXPECT_EQ(bytes_read, store->counters().bytes_read);
    EXPECT_EQ(scratch.bytes(), align_up(store->largest_read_bytes(), 4096)) << "never grows";
    if (HasFailure()) return;
  }
}

// One expert of one file, as gate_up and down behind each other.
struct OneExpert {
  TempFolder folder;
  std::string path = folder.file("model.safetensors");
  ExpertLayout layout{.dtype = DType::kBF16, .hidden = 64, .intermediate = 96};
  Bytes expected = canonical_expert(layout, 9);

  // Writes `lead` bytes, the expert, `trail` bytes.
  explicit OneExpert(std::size_t lead = 0, std::size_t trail = 0) {
    Bytes file = pattern(lead, 1);
    file.insert(file.end(), expected.begin(), expected.end());
    const Bytes rest = pattern(trail, 2);
    file.insert(file.end(), rest.begin(), rest.end());
    write_file(path, file);
  }

  [[nodiscard]] std::vector<Piece> pieces(FileIdx file, std::uint64_t lead) const {
    Piece w13;
    w13.file = file;
    w13.offset = lead;
    w13.bytes = layout.w13_bytes();
    Piece w2 = w13;
    w2.offset = lead + layout.w2_offset();
    w2.bytes = layout.w2_bytes();
    w2.target_offset = layout.w2_offset();
    return {w13, w2};
  }

  std::shared_ptr<const ExpertStore> build(const std::vector<Piece>& pieces) const {
    ExpertStoreBuilder builder({.chunk_bytes = 16384});
    (void)builder.add_file(path);
    (void)builder.add_layer({.name = "mlp.experts", .num_experts = 1, .layout = layout});
    for (const Piece& piece : pieces) builder.add_piece(make_key(0, 0), piece);
    return builder.build();
  }
};

TEST(ExpertStore, ReadsTwoSectionsThatShareTheirSource) {
  const TempFolder folder;
  const ExpertLayout layout{.dtype = DType::kF32, .hidden = 64, .intermediate = 64, .gated = false};
  const Bytes source = pattern(layout.w13_bytes(), 5);
  write_file(folder.file("tied"), source);
  ExpertStoreBuilder builder({.chunk_bytes = 4096});
  Piece w13;
  w13.file = builder.add_file(folder.file("tied"));
  w13.bytes = source.size();
  Piece w2 = w13;
  w2.target_offset = layout.w2_offset();
  (void)builder.add_layer({.name = "experts", .num_experts = 1, .layout = layout});
  builder.add_piece(make_key(0, 0), w13);
  builder.add_piece(make_key(0, 0), w2);
  const auto store = builder.build();
  Bytes expected = source;
  expected.insert(expected.end(), source.begin(), source.end());
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), expected);
  EXPECT_LE(store->largest_read_bytes(), 4096u + 8192u);
}

TEST(ExpertStore, ReadsAnExpertThatEndsWithTheFileWhateverItsSizeModuloABlock) {
  const std::size_t expert_bytes = OneExpert().expected.size();
  for (const std::size_t modulo : {0, 1, 4095}) {
    const std::size_t lead = 4096 * 2 + modulo - expert_bytes % 4096 + 4096;
    const OneExpert one(lead);
    ASSERT_EQ((lead + expert_bytes) % 4096, modulo);
    const auto store = one.build(one.pieces(FileIdx{0}, lead));
    EXPECT_EQ(read_expert(*store, make_key(0, 0)), one.expected) << modulo;
    EXPECT_EQ(store->counters().retried_reads, 0u) << "the end of the file is no short read";
  }
}

TEST(ExpertStore, ReadsAShardThatIsSmallerThanABlock) {
  const TempFolder folder;
  const ExpertLayout layout{.dtype = DType::kF32, .hidden = 4, .intermediate = 4};
  const Bytes expected = canonical_expert(layout, 3);
  ASSERT_LT(expected.size(), 4096u);
  write_file(folder.file("tiny"), expected);
  ExpertStoreBuilder builder({.chunk_bytes = 4096});
  Piece whole;
  whole.file = builder.add_file(folder.file("tiny"));
  whole.bytes = expected.size();
  (void)builder.add_layer({.name = "experts", .num_experts = 1, .layout = layout});
  builder.add_piece(make_key(0, 0), whole);
  const auto store = builder.build();
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), expected);
  EXPECT_EQ(store->counters().bytes_read, expected.size());
  EXPECT_EQ(store->counters().reads, 1u);
}

TEST(ExpertStore, ReadsRangesNearerThan64KiBAtOnceAndOthersApart) {
  for (const auto& [gap, reads] : {std::pair<std::size_t, std::int32_t>{0, 1},
                                   {100, 1},
                                   {64 * kKiB - 1, 1},
                                   {64 * kKiB, 2},
                                   {200 * kKiB, 2}}) {
    const OneExpert one(0, 300 * kKiB);
    ExpertStoreBuilder builder({.chunk_bytes = kMiB});
    (void)builder.add_file(one.path);
    (void)builder.add_layer({.name = "experts", .num_experts = 1, .layout = one.layout});
    std::vector<Piece> pieces = one.pieces(FileIdx{0}, 0);
    pieces[1].offset = pieces[0].bytes + gap;
    for (const Piece& piece : pieces) builder.add_piece(make_key(0, 0), piece);
    EXPECT_EQ(builder.build()->num_chunks(make_key(0, 0)), reads) << gap;
  }
}

TEST(ExpertStore, CutsChunksAtBlocksSoThatNoneIsReadTwice) {
  const OneExpert one(100);
  const auto store = one.build(one.pieces(FileIdx{0}, 100));
  EXPECT_EQ(store->num_chunks(make_key(0, 0)), 3);
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), one.expected);
  EXPECT_EQ(store->counters().bytes_read, 100 + one.expected.size());
}

TEST(ExpertStore, CountsWhatTheKernelGaveAndWhatMemoryGave) {
  const OneExpert one(5000, 9000);
  const auto store = one.build(one.pieces(FileIdx{0}, 5000));
  (void)read_expert(*store, make_key(0, 0));
  const std::uint64_t once = align_up(5000 + one.expected.size(), 4096) - align_down(5000, 4096);
  EXPECT_EQ(store->counters().bytes_read, once);
  (void)read_expert(*store, make_key(0, 0));
  EXPECT_EQ(store->counters().bytes_read, 2 * once);
  EXPECT_EQ(store->counters().memory_bytes, 0u);
  EXPECT_EQ(store->adopted_bytes(), 0u);
}

TEST(ExpertStore, CountsAReadThatFailsAndWorksOnAfterIt) {
  const OneExpert one;
  const auto store = one.build(one.pieces(FileIdx{0}, 0));
  AlignedBuffer slot(store->slot_bytes(LayerIdx{0}));
  IoScratch scratch;
  {
    FaultDisk disk;
    disk.short_reads = 2;
    disk.short_read_bytes = 4096;
    std::uint64_t bytes_read = 0;
    EXPECT_THROW(store->read(make_key(0, 0), 0, slot.data(), scratch, &bytes_read), IoError);
    EXPECT_EQ(bytes_read, 8192u);
    EXPECT_EQ(store->counters().bytes_read, 8192u);
    EXPECT_EQ(store->counters().retried_reads, 1u);
    disk.read_fails_in = 0;
    EXPECT_REFUSED(store->read(make_key(0, 0), 0, slot.data(), scratch), IoError, one.path);
  }
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), one.expected);
}

TEST(ExpertStore, NamesTheDegradationWhenDirectReadsAreRefused) {
  const OneExpert one;
  const auto store = one.build(one.pieces(FileIdx{0}, 0));
  FaultDisk disk;
  disk.refuses_direct = true;
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), one.expected);
  EXPECT_EQ(store->counters().buffered_reads, store->counters().reads);
}

TEST(ExpertStore, ShowsAdoptedExpertsInPlaceOnlyWhenCanonicalAndAligned) {
  const OneExpert one;
  AlignedBuffer memory(one.expected.size() + 64);
  std::memcpy(memory.data(), one.expected.data(), one.expected.size());
  const auto address = reinterpret_cast<std::uint64_t>(memory.data());
  const auto store = one.build(one.pieces(FileIdx::kMemory, address));
  const auto in_place = store->in_place(make_key(0, 0));
  ASSERT_TRUE(in_place.has_value());
  EXPECT_EQ(in_place->w13, memory.data());
  EXPECT_EQ(in_place->w2, memory.data() + one.layout.w2_offset());
  EXPECT_EQ(in_place->b13, nullptr);
  EXPECT_EQ(store->adopted_bytes(), one.layout.w13_bytes() + one.layout.w2_bytes());
  EXPECT_EQ(read_expert(*store, make_key(0, 0)), one.expected);
  EXPECT_EQ(store->counters().memory_bytes, store->adopted_bytes());
  EXPECT_EQ(store->largest_read_bytes(), 0u);

  std::memmove(memory.data() + 4, one.expected.data(), one.expected.size());
  const auto unaligned = one.build(one.pieces(FileIdx::kMemory, address + 4));
  EXPECT_FALSE(unaligned->in_place(make_key(0, 0)).has_value());
  EXPECT_EQ(read_expert(*unaligned, make_key(0, 0)), one.expected);

  const auto on_disk = one.build(one.pieces(FileIdx{0}, 0));
  EXPECT_FALSE(on_disk->in_place(make_key(0, 0)).has_value());
}

TEST(ExpertStore, PadsSlotsTo4096OnlyWhereDirectReadsFillThem) {
  const OneExpert one;
  for (const bool direct_slots : {false, true}) {
    ExpertStoreBuilder builder(ExpertStore::Options{});
    (void)builder.add_file(one.path);
    builder.set_direct_slots(direct_slots);
    builder.set_description("1 shard in place");
    (void)builder.add_layer({.name = "experts", .num_experts = 1, .layout = one.layout});
    for (const Piece& piece : one.pieces(FileIdx{0}, 0)) builder.add_piece(make_key(0, 0), piece);
    const auto store = builder.build();
    EXPECT_EQ(store->slot_bytes(LayerIdx{0}),
              align_up(one.layout.bytes(), direct_slots ? 4096 : 64));
    EXPECT_EQ(store->total_slot_bytes(), store->slot_bytes(LayerIdx{0}));
    EXPECT_EQ(store->description(), "1 shard in place");
  }
}

TEST(ExpertStore, RefusesPiecesThatDoNotCoverAnExpertExactlyOnce) {
  const OneExpert one;
  const std::vector<Piece> good = one.pieces(FileIdx{0}, 0);
  const auto with = [&](auto&& change) {
    std::vector<Piece> pieces = good;
    change(pieces);
    return pieces;
  };
  const std::string who = "layer 0 (mlp.experts) expert 0: ";
  const auto refused = [&](const std::vector<Piece>& pieces, const std::string& what) {
    EXPECT_REFUSED((void)one.build(pieces), CheckpointError, who + what);
  };
  refused({}, "got no source for bytes from 0 of w13");
  refused(with([](auto& p) { p.pop_back(); }), "got no source for bytes from 24576 of w2");
  refused(with([](auto& p) { p[0].bytes -= 1; }), "got no source for bytes from 24575 of w13");
  refused(with([](auto& p) { p.push_back(p[0]); }), "got two sources for bytes [0, 24576)");
  refused(with([](auto& p) { p[1].target_offset -= 2; }), "got two sources for bytes [24574");
  refused(with([](auto& p) { p[1].target_offset += 64; }), "got a piece of 12288 bytes for offset");
  refused(with([](auto& p) { p[1].target_offset = SIZE_MAX - 3; }), "got a piece of");
  refused(with([](auto& p) { p[1].bytes = 0; }), "got a piece of 0 bytes");
  refused(with([](auto& p) { p[1].offset += 1; }), "got 12288 bytes at offset 24577 of ");
  refused(with([](auto& p) { p[1].offset = UINT64_MAX - 3; }), "got 12288 bytes at offset");
  refused(with([](auto& p) { p[1].file = FileIdx{1}; }), "got file 1");
  refused(with([](auto& p) { p[1].file = FileIdx{-2}; }), "got file -2");
  refused(with([](auto& p) {
            p[1].file = FileIdx::kMemory;
            p[1].offset = 0;
          }),
          "got a null");
  const auto transposing = [&](std::int64_t rows, std::int64_t columns) {
    return with([&](auto& p) {
      p[0].transform = Piece::Transform::kTranspose;
      p[0].rows = rows;
      p[0].columns = columns;
    });
  };
  EXPECT_NO_THROW((void)one.build(transposing(64, 192)));
  refused(transposing(64, 191), "got a transpose of [64, 191]");
  refused(transposing(-64, -192), "got a transpose");
  refused(transposing(0, 0), "got a transpose");
  refused(transposing(std::int64_t{1} << 40, std::int64_t{1} << 40), "got a transpose");
  refused(with([](auto& p) {
            p[1].transform = Piece::Transform::kWiden;
            p[1].dtype = DType::kBF16;
            p[1].bytes = 6143;
          }),
          "got 6143 bytes of BF16");
}

TEST(ExpertStoreBuilder, RefusesSettingsAndSizesThatCannotWork) {
  for (const std::size_t chunk :
       {std::size_t{0}, std::size_t{4095}, std::size_t{5000}, 4 * kMiB + 4096}) {
    EXPECT_REFUSED(ExpertStoreBuilder({.chunk_bytes = chunk}), ConfigError, "chunk_bytes");
  }
  ExpertStoreBuilder builder(ExpertStore::Options{});
  const ExpertLayout sane{.dtype = DType::kF32, .hidden = 8, .intermediate = 8};
  EXPECT_THROW((void)builder.add_layer({.name = "a", .num_experts = 0, .layout = sane}),
               CheckpointError);
  ExpertLayout huge = sane;
  huge.hidden = INT64_MAX;
  EXPECT_THROW((void)builder.add_layer({.name = "a", .num_experts = 1, .layout = huge}),
               CheckpointError);
  EXPECT_THROW((void)builder.add_file("/absent/file"), IoError);
}

TEST(ExpertStore, ReadsDifferentExpertsOnManyThreads) {
  const TempFolder folder;
  const std::string path = folder.file("a.sluice.safetensors");
  const PackManifest manifest = testing::small_manifest();
  testing::write_pack(path, manifest);
  const auto store = open_pack(path, {.chunk_bytes = 4096, .verify = Verify::kAlways});
  std::vector<std::jthread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) {
        const std::int32_t expert = (i + t) % 3;
        EXPECT_EQ(read_expert(*store, make_key(0, expert)),
                  canonical_expert(manifest.layers[0].layout, testing::seed_of(0, expert)));
      }
    });
  }
}

}  // namespace
}  // namespace sluice
