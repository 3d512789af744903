#include "store/reader_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "store/experts.h"
#include "store/fault_disk.h"

namespace sluice {
namespace {

using testing::canonical_expert;
using testing::FaultDisk;
using testing::small_manifest;
using testing::TempFolder;

struct Pack {
  TempFolder folder;
  std::string path = folder.file("a.sluice.safetensors");
  PackManifest manifest = small_manifest();
  std::shared_ptr<const ExpertStore> store;
  explicit Pack(ExpertStore::Options options = {.chunk_bytes = 4096}) {
    testing::write_pack(path, manifest);
    store = open_pack(path, options);
  }
};

TEST(ReaderPool, ReportsEveryChunkOnceWithItsBytes) {
  const Pack pack;
  const ExpertKey key = make_key(0, 2);
  const std::int32_t chunks = pack.store->num_chunks(key);
  ASSERT_EQ(chunks, 3);
  AlignedBuffer slot(pack.store->slot_bytes(LayerIdx{0}));
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(chunks));
  std::atomic<std::uint64_t> bytes{0};
  std::latch landed(chunks);
  ReaderPool pool(pack.store, 2,
                  [&](std::uint64_t token, std::exception_ptr error, std::uint64_t bytes_read) {
                    EXPECT_EQ(error, nullptr);
                    ++seen[token];
                    bytes += bytes_read;
                    landed.count_down();
                  });
  EXPECT_EQ(pool.num_threads(), 2);
  EXPECT_EQ(pool.workspace_bytes(), 2 * pack.store->largest_read_bytes());
  for (std::int32_t c = 0; c < chunks; ++c) {
    pool.start(static_cast<std::uint64_t>(c), key, c, slot.data());
  }
  landed.wait();
  const auto expected = canonical_expert(pack.manifest.layers[0].layout, testing::seed_of(0, 2));
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), slot.data()));
  EXPECT_EQ(bytes, pack.store->counters().bytes_read);
  for (const auto& count : seen) EXPECT_EQ(count, 1);
}

TEST(ReaderPool, TakesChunksInTheOrderOfTheirStart) {
  const Pack pack;
  AlignedBuffer slot(pack.store->slot_bytes(LayerIdx{0}));
  std::vector<std::uint64_t> order;
  {
    ReaderPool pool(pack.store, 1, [&](std::uint64_t token, std::exception_ptr, std::uint64_t) {
      order.push_back(token);
    });
    for (std::uint64_t t = 0; t < 200; ++t) {
      pool.start(t, make_key(0, 0), static_cast<std::int32_t>(t % 3), slot.data());
    }
  }
  ASSERT_EQ(order.size(), 200u) << "closing awaits what was started";
  for (std::uint64_t t = 0; t < 200; ++t) EXPECT_EQ(order[t], t);
}

TEST(ReaderPool, CarriesErrorsToTheirChunkAndWorksOn) {
  const Pack pack;
  AlignedBuffer slot(pack.store->slot_bytes(LayerIdx{0}));
  std::mutex mutex;
  std::vector<std::string> errors;
  std::atomic<int> landed{0};
  FaultDisk disk;
  ReaderPool pool(pack.store, 1, [&](std::uint64_t, std::exception_ptr error, std::uint64_t) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const IoError& io) {
      const std::lock_guard lock(mutex);
      errors.push_back(io.what());
    }
    ++landed;
  });
  disk.read_fails_in = 0;
  pool.start(1, make_key(0, 0), 0, slot.data());
  while (landed < 1) std::this_thread::yield();
  disk.read_fails_in = -1;
  pool.start(2, make_key(0, 0), 0, slot.data());
  while (landed < 2) std::this_thread::yield();
  pool.close();
  ASSERT_EQ(errors.size(), 1u);
  EXPECT_NE(errors[0].find(pack.path), std::string::npos);
}

TEST(ReaderPool, ClosesWithReadsInFlightAndRefusesMore) {
  const Pack pack({.chunk_bytes = 4096, .read_rate = 4 << 20});
  std::vector<AlignedBuffer> slots;
  for (int load = 0; load < 10; ++load) slots.emplace_back(pack.store->slot_bytes(LayerIdx{0}));
  std::atomic<int> landed{0};
  ReaderPool pool(pack.store, 3, [&](std::uint64_t, std::exception_ptr error, std::uint64_t) {
    EXPECT_EQ(error, nullptr);
    ++landed;
  });
  for (std::uint64_t t = 0; t < 30; ++t) {
    pool.start(t, make_key(0, 0), static_cast<std::int32_t>(t % 3), slots[t / 3].data());
  }
  std::jthread other([&] { pool.close(); });
  pool.close();
  EXPECT_EQ(landed, 30);
  pool.close();
  EXPECT_THROW(pool.start(1, make_key(0, 0), 0, slots[0].data()), InternalError);
}

TEST(ReaderPool, RefusesNumbersOfThreadsThatCannotWork) {
  const Pack pack;
  const auto done = [](std::uint64_t, std::exception_ptr, std::uint64_t) {};
  EXPECT_REFUSED(ReaderPool(pack.store, 0, done), ConfigError, "io_threads: got 0");
  EXPECT_REFUSED(ReaderPool(pack.store, 65, done), ConfigError, "io_threads: got 65");
}

TEST(ReaderPool, ReadsManyLoadsAtOnceIntoTheirOwnSlots) {
  const Pack pack({.chunk_bytes = 4096, .verify = Verify::kAlways});
  const auto& layout = pack.manifest.layers[0].layout;
  for (int round = 0; round < 20; ++round) {
    std::vector<AlignedBuffer> slots;
    for (int s = 0; s < 6; ++s) slots.emplace_back(pack.store->slot_bytes(LayerIdx{0}));
    {
      ReaderPool pool(pack.store, 4, [](std::uint64_t, std::exception_ptr error, std::uint64_t) {
        EXPECT_EQ(error, nullptr);
      });
      for (std::int32_t c = 0; c < 3; ++c) {
        for (std::size_t s = 0; s < slots.size(); ++s) {
          pool.start(s, make_key(0, static_cast<std::int32_t>(s % 3)), c, slots[s].data());
        }
      }
    }
    for (std::size_t s = 0; s < slots.size(); ++s) {
      const auto expected =
          canonical_expert(layout, testing::seed_of(0, static_cast<std::int32_t>(s % 3)));
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), slots[s].data()));
    }
  }
}

}  // namespace
}  // namespace sluice
