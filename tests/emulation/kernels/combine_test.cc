#include "kernels/combine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/error.h"
#include "kernels/bandwidth_gpu.h"
#include "kernels/combine_gpu.h"
#include "tests/emulation/kernels/device_array.h"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the test support of this folder

TEST(CombineGpu, GivesTheBitsOfTheHost) {
  std::mt19937 random(41);
  std::normal_distribution<float> normal;
  SerialFor serial;
  std::size_t i = 0;
  for (const DType out : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const DType weights : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const std::int64_t hidden : {8, 24, 1016, 1024, 1032, 2880}) {
        schedule(i++).set_up();
        const auto tokens = static_cast<std::int64_t>(1 + random() % 4);
        const auto top_k = static_cast<std::int64_t>(1 + random() % 5);
        constexpr int kExperts = 4;
        const auto entries = static_cast<std::size_t>(tokens * top_k);
        std::vector<std::int64_t> ids(entries);
        std::vector<float> weight(entries);
        std::vector<std::uint8_t> valid(entries);
        std::vector<float> rows(entries * static_cast<std::size_t>(hidden));
        for (float& value : rows) value = normal(random);
        for (std::size_t e = 0; e < entries; ++e) {
          ids[e] = static_cast<std::int64_t>(random() % (kExperts + 2)) - 1;
          weight[e] = random() % 4 == 0 ? 0.0f : normal(random);
          valid[e] = ids[e] >= 0 && ids[e] < kExperts && weight[e] != 0.0f ? 1 : 0;
        }
        const auto weight_bytes = encode(weights, weight);
        const std::vector<float> rounded = decode(weights, weight_bytes);
        std::vector<std::byte> expected(static_cast<std::size_t>(tokens * hidden) *
                                        element_bytes(out));
        combine(rows.data(), rounded.data(), valid.data(), tokens, top_k, hidden, out,
                expected.data(), serial);

        // Rows of entries that are none stay undefined: nobody may read them.
        const DeviceArray<float> scratch(rows.size());
        {
          const fake::Peek peek;
          for (std::size_t e = 0; e < entries; ++e) {
            if (valid[e] == 0) continue;
            float* const row = scratch.data() + e * static_cast<std::size_t>(hidden);
            std::copy_n(rows.data() + e * static_cast<std::size_t>(hidden), hidden, row);
            simt::mark_defined(row, static_cast<std::size_t>(hidden) * sizeof(float));
          }
        }
        const DeviceArray<std::int64_t> ids_device(ids);
        const DeviceArray<std::byte> weights_device(weight_bytes);
        const DeviceArray<std::byte> out_device(expected.size());
        const Stream stream(i % 2 == 0);
        launch_combine({.num_tokens = tokens,
                        .top_k = top_k,
                        .hidden = hidden,
                        .num_experts = kExperts,
                        .weights = weights,
                        .out = out},
                       {.ids = ids_device.data(),
                        .weights = weights_device.data(),
                        .scratch = scratch.data(),
                        .out = out_device.data()},
                       stream.handle());
        ASSERT_EQ(out_device.read(), expected)
            << dtype_name(out) << " from " << dtype_name(weights) << " weights, H " << hidden;
      }
    }
  }
}

TEST(ScatterRows, GivesEachEntryItsRowWidened) {
  std::mt19937 random(43);
  std::normal_distribution<float> normal;
  std::size_t i = 0;
  for (const DType compact : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::int64_t hidden : {8, 24, 1024, 1032}) {
      // Positions: all, one alone in the middle, more than there are.
      struct Range {
        std::int64_t first, count;
      };
      for (const Range& range : {Range{0, 5}, Range{2, 1}, Range{3, 4}}) {
        schedule(i++).set_up();
        constexpr std::int32_t kEntries = 7;
        constexpr std::int32_t kRouted = 5;  // by expert: 2, 0, 3
        const std::vector<std::int32_t> offsets = {0, 2, 2, kRouted};
        std::vector<std::int32_t> entries(kEntries);
        for (std::int32_t e = 0; e < kEntries; ++e) entries[static_cast<std::size_t>(e)] = e;
        std::shuffle(entries.begin(), entries.end(), random);
        std::vector<float> rows(static_cast<std::size_t>(kEntries * hidden));
        for (float& value : rows) value = normal(random);
        const auto bytes = encode(compact, rows);
        const std::vector<float> widened = decode(compact, bytes);
        std::vector<std::byte> expected(rows.size() * sizeof(float), std::byte{0xff});
        for (std::int64_t p = range.first; p < range.first + range.count && p < kRouted; ++p) {
          const std::int64_t entry = entries[static_cast<std::size_t>(p)];
          std::memcpy(expected.data() + static_cast<std::size_t>(entry * hidden) * sizeof(float),
                      widened.data() + p * hidden,
                      static_cast<std::size_t>(hidden) * sizeof(float));
        }

        const DeviceArray<std::byte> compact_device(bytes);
        const DeviceArray<std::int32_t> offsets_device(offsets);
        const DeviceArray<std::int32_t> entries_device(entries);
        const DeviceArray<float> scratch(rows.size());
        const Stream stream(i % 2 == 0);
        launch_scatter_rows({.first = range.first,
                             .num_rows = range.count,
                             .hidden = hidden,
                             .num_experts = 3,
                             .compact = compact},
                            {.compact = compact_device.data(),
                             .offsets = offsets_device.data(),
                             .rows = entries_device.data(),
                             .scratch = scratch.data()},
                            stream.handle());
        ASSERT_EQ(encode(DType::kF32, scratch.read()), expected)
            << dtype_name(compact) << ", H " << hidden << ", from " << range.first << " on "
            << range.count;
      }
    }
  }
}

TEST(CombineGpu, RefusesWidthsByName) {
  Schedule{}.set_up();
  const DeviceArray<float> rows(16);
  const auto width = refusal<ConfigError>([&] {
    launch_combine({.num_tokens = 1, .top_k = 1, .hidden = 12, .num_experts = 1},
                   {.scratch = rows.data(), .out = rows.data()}, {});
  });
  EXPECT_NE(width.find("combine: got a hidden width of 12"), std::string::npos) << width;
  const auto nothing = refusal<ConfigError>([&] {
    launch_combine({.num_tokens = 1, .top_k = 1, .hidden = 0, .num_experts = 1},
                   {.scratch = rows.data(), .out = rows.data()}, {});
  });
  EXPECT_NE(nothing.find("combine: got a hidden width of 0"), std::string::npos) << nothing;
  const auto askew = refusal<ConfigError>([&] {
    launch_scatter_rows({.num_rows = 1, .hidden = 8, .num_experts = 1},
                        {.compact = rows.data() + 1, .scratch = rows.data()}, {});
  });
  EXPECT_NE(askew.find("scatter_rows: got the compact rows at an address"), std::string::npos)
      << askew;
  const std::uint64_t launches = fake::stats().launches;
  launch_combine({.num_tokens = 0, .top_k = 1, .hidden = 8, .num_experts = 1},
                 {.scratch = rows.data(), .out = rows.data()}, {});
  EXPECT_EQ(fake::stats().launches, launches);
}

TEST(ReadBandwidth, AddsUpEveryWordOnce) {
  std::mt19937 random(42);
  std::size_t i = 0;
  for (const std::size_t bytes : {16u, 48u, 4096u, 16'384u, 16'400u, 200'000u}) {
    schedule(i++).set_up();
    const GpuTraits gpu = {.num_multiprocessors = 1 + static_cast<int>(random() % 3)};
    std::vector<std::uint32_t> words(bytes / 4);
    std::uint32_t expected = 0;
    for (std::uint32_t& word : words) {
      word = static_cast<std::uint32_t>(random());
      expected += word;
    }
    const DeviceArray<std::uint32_t> data(words);
    const DeviceArray<std::uint32_t> sums(static_cast<std::size_t>(read_bandwidth_blocks(gpu)));
    launch_read_bandwidth(data.data(), bytes, sums.data(), gpu, {});
    std::uint32_t sum = 0;
    for (const std::uint32_t block : sums.read()) sum += block;
    EXPECT_EQ(sum, expected) << bytes << " bytes";
  }
  const DeviceArray<std::uint32_t> data(std::vector<std::uint32_t>(8));
  for (const std::size_t bytes : {4u, 20u, 24u}) {
    const auto refused = refusal<ConfigError>(
        [&] { launch_read_bandwidth(data.data(), bytes, data.data(), {}, {}); });
    EXPECT_EQ(refused.find("read_bandwidth: got " + std::to_string(bytes) +
                           " bytes, expected a multiple of 16"),
              0u)
        << refused;
  }
}

}  // namespace
}  // namespace sluice
