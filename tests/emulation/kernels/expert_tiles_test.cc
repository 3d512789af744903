#include "kernels/expert_tiles.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "kernels/combine_gpu.h"
#include "tests/emulation/kernels/experts_check.h"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the test support of this folder

constexpr GpuTraits kGpu = {.num_multiprocessors = 2, .shared_bytes_per_block = 227 * 1024};

struct Case {
  ExpertProblem problem;
  bool biased = false;
  std::vector<int> counts;
  int top_k = 2;
  int min_tokens = 1;
  bool table = false;
  [[nodiscard]] std::string text() const {
    std::string found = testing::text(problem) + (biased ? ", biased" : "") + ", tokens";
    for (const int count : counts) found.append(1, ' ').append(std::to_string(count));
    return found + ", from " + std::to_string(min_tokens) + (table ? ", table" : ", entries");
  }
};

/// The many-token kernels over experts, rows and inputs that stay.
struct Rig {
  Rig(const Case& c, Values values, std::mt19937& random)
      : problem(c.problem),
        min_tokens(c.min_tokens),
        experts(problem, w13_rows(problem), static_cast<int>(c.counts.size()), c.biased, values,
                random),
        routing(c.counts, c.top_k, static_cast<int>(random() % 3), random),
        hidden(draw(values, problem.activations, routing.num_tokens() * problem.hidden, 1, random)),
        hidden_device(encode(problem.activations, hidden)) {}

  [[nodiscard]] DeviceArray<std::byte> rows(std::int64_t columns, DType dtype) const {
    return DeviceArray<std::byte>(static_cast<std::size_t>(routing.num_entries() * columns) *
                                  element_bytes(dtype));
  }
  [[nodiscard]] std::vector<std::byte> gate_up(const auto& list, StreamHandle stream = {}) const {
    const auto out = rows(problem.intermediate, problem.activations);
    const auto plan = plan_tile_gate_up(problem, list.count, routing.num_entries(), gpu);
    launch_tile_gate_up(problem, plan, list,
                        {.routed = routing.device(),
                         .min_tokens = min_tokens,
                         .hidden = hidden_device.data(),
                         .out = out.data()},
                        stream);
    return out.read();
  }
  [[nodiscard]] std::vector<std::byte> gate_up_raw(const auto& list) const {
    const std::int64_t r = w13_rows(problem);
    const auto out = rows(r, problem.activations);
    const auto plan = plan_tile_gate_up_raw(problem, r, list.count, routing.num_entries(), gpu);
    launch_tile_gate_up_raw(problem, r, plan, list,
                            {.routed = routing.device(),
                             .min_tokens = min_tokens,
                             .hidden = hidden_device.data(),
                             .out = out.data()},
                            {});
    return out.read();
  }
  [[nodiscard]] std::vector<std::byte> down(const auto& list, const std::vector<std::byte>& h,
                                            StreamHandle stream = {}) const {
    const DeviceArray<std::byte> h_device(h);
    const auto out = rows(problem.hidden, DType::kF32);
    const auto plan = plan_tile_down(problem, list.count, routing.num_entries(), gpu);
    launch_tile_down(problem, plan, list,
                     {.routed = routing.device(),
                      .min_tokens = min_tokens,
                      .h = h_device.data(),
                      .out = out.data()},
                     stream);
    return out.read();
  }
  [[nodiscard]] std::vector<std::byte> down_compact(const auto& list,
                                                    const std::vector<std::byte>& h) const {
    const DeviceArray<std::byte> h_device(h);
    const auto out = rows(problem.hidden, problem.activations);
    const auto plan = plan_tile_down(problem, list.count, routing.num_entries(), gpu);
    launch_tile_down_compact(problem, plan, list,
                             {.routed = routing.device(),
                              .min_tokens = min_tokens,
                              .h = h_device.data(),
                              .out = out.data()},
                             {});
    return out.read();
  }

  ExpertProblem problem;
  int min_tokens;
  GpuTraits gpu = kGpu;
  Experts experts;
  Routing routing;
  std::vector<float> hidden;
  DeviceArray<std::byte> hidden_device;
};

/// Calls `check(expert, position, taken)` for every routed position.
template <class Check>
void for_each_row(const Rig& rig, Check check) {
  for (int e = 0; e < rig.experts.count(); ++e) {
    for (int p = rig.routing.begin(e); p < rig.routing.begin(e + 1); ++p) {
      ASSERT_NO_FATAL_FAILURE(check(e, p, rig.routing.count(e) >= rig.min_tokens));
    }
  }
}

void check_exact(const Case& c, Rig& rig, const auto& list, StreamHandle stream,
                 std::mt19937& random) {
  const DType type = c.problem.activations;
  const std::int64_t hidden = c.problem.hidden;
  const std::int64_t width = c.problem.intermediate;
  const auto h = rig.gate_up(list, stream);
  for_each_row(rig, [&](int e, int p, bool taken) {
    const auto got = row_bytes(h, type, p, width);
    const float* const x = hidden_of(rig.hidden, rig.routing, p, hidden);
    if (taken) {
      ASSERT_EQ(got, exact_h(c.problem, rig.experts.host(e), x))
          << c.text() << ": h of expert " << e << ", position " << p;
    } else {
      ASSERT_TRUE(untouched(got)) << c.text() << ": h of expert " << e << ", which is left out";
    }
  });

  const auto halves =
      draw(Values::kSmallIntegers, type, rig.routing.num_entries() * width, 1, random);
  const auto scratch = rig.down(list, encode(type, halves), stream);
  for_each_row(rig, [&](int e, int p, bool taken) {
    const auto got = row_bytes(scratch, DType::kF32, rig.routing.row(p), hidden);
    if (taken) {
      ASSERT_EQ(got,
                encode(DType::kF32, exact_product(rig.experts.host(e).w2, rig.experts.host(e).b2,
                                                  hidden, width, halves.data() + p * width)))
          << c.text() << ": down of expert " << e << ", position " << p;
    } else {
      ASSERT_TRUE(untouched(got)) << c.text() << ": down of expert " << e << ", which is left out";
    }
  });
}

TEST(ExpertTiles, AreExactOnSmallIntegersInEveryShape) {
  constexpr std::int64_t kWidths[] = {8, 16, 32, 40, 56, 64, 72, 120, 128, 136, 192, 264};
  for (int seed = 0; seed < num_seeds(); ++seed) {
    std::mt19937 random(static_cast<unsigned>(21 + seed));
    const auto pick = [&](std::size_t count) { return random() % count; };
    std::size_t i = 0;
    for (const Types types : kTypes) {
      for (const std::int64_t width : kWidths) {
        Case c;
        c.problem = {.weights = types.weights,
                     .activations = types.activations,
                     .hidden = width,
                     .intermediate = kWidths[pick(width > 100 ? 6 : 12)],
                     .gate = {.kind = kGateKinds[i % std::size(kGateKinds)],
                              .interleaved = pick(2) == 0,
                              .limit = 1.5f}};
        if (pick(2) == 0) std::swap(c.problem.hidden, c.problem.intermediate);
        c.biased = pick(2) == 0;
        constexpr int kCounts[] = {0, 1, 5, 16, 17, 63, 64, 65, 130};
        c.counts = {kCounts[pick(9)], kCounts[pick(5)], kCounts[i % 9], kCounts[pick(3)]};
        c.top_k = 1 + static_cast<int>(pick(4));
        c.min_tokens = pick(2) == 0 ? 1 : 17;
        c.table = pick(2) == 0;
        const Schedule run = schedule(i++ + 60 * static_cast<std::size_t>(seed));
        run.set_up();
        SCOPED_TRACE(run.text());
        const Stream stream(i % 2 == 0);
        Rig rig(c, Values::kSmallIntegers, random);
        rig.gpu.num_multiprocessors = 1 + static_cast<int>(pick(3));
        std::vector<int> order = rig.experts.all();
        std::shuffle(order.begin(), order.end(), random);
        if (c.table) {
          check_exact(c, rig, rig.experts.table(order), stream.handle(), random);
        } else {
          check_exact(c, rig, rig.experts.entries(order), stream.handle(), random);
        }
        if (HasFatalFailure()) return;
        ASSERT_TRUE(fake::findings().empty()) << fake::findings().front();
      }
    }
  }
}

TEST(ExpertTiles, AreExactOnTheRowsOfRealModels) {
  std::mt19937 random(22);
  std::size_t i = 0;
  for (const std::int64_t width : {768, 1408, 2880, 14336}) {
    for (const Types types : kTypes) {
      if (width > 4096 && types.activations == DType::kF32 && types.weights != DType::kF32)
        continue;
      Case c;
      const bool long_hidden = i % 2 == 0;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = long_hidden ? width : 8,
                   .intermediate = long_hidden ? 8 : width,
                   .gate = {.kind = GateKind::kSilu}};
      c.counts = {width > 4096 ? 3 : 17};
      schedule(i++).set_up();
      Rig rig(c, Values::kSmallIntegers, random);
      ASSERT_NO_FATAL_FAILURE(check_exact(c, rig, rig.experts.entries({0}), {}, random));
    }
  }
}

TEST(ExpertTiles, AreWithinRoundingOfFp64UnderEveryModelOfTheMma) {
  std::mt19937 random(23);
  std::size_t i = 0;
  for (const simt::MmaModel model : mma_models()) {
    for (const Types types : kTypes) {
      Case c;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = i % 2 == 0 ? 776 : 40,
                   .intermediate = i % 2 == 0 ? 40 : 776,
                   .gate = {.kind = kGateKinds[i % std::size(kGateKinds)], .limit = 1.5f}};
      c.biased = i % 2 == 0;
      c.counts = {1, 19};
      Schedule run = schedule(i++);
      run.mma = model;
      run.set_up();
      Rig rig(c, Values::kNormal, random);
      const ExpertEntries list = rig.experts.entries({0, 1});
      const auto h = rig.gate_up(list);
      const auto raw = decode(types.activations, rig.gate_up_raw(list));
      const auto scratch = decode(DType::kF32, rig.down(list, h));
      const auto compact = decode(types.activations, rig.down_compact(list, h));
      const auto values = decode(types.activations, h);
      const std::int64_t rows = w13_rows(c.problem);
      for_each_row(rig, [&](int e, int p, bool) {
        const float* const x = hidden_of(rig.hidden, rig.routing, p, c.problem.hidden);
        const float* const row = values.data() + p * c.problem.intermediate;
        const Experts::Host& expert = rig.experts.host(e);
        ASSERT_LE(h_error(c.problem, expert, x, {row, row + c.problem.intermediate}), 1)
            << c.text() << ", " << run.text() << ": h at position " << p;
        ASSERT_LE(product_error(expert.w13, expert.b13, rows, c.problem.hidden, x,
                                raw.data() + p * rows, types.activations),
                  1)
            << c.text() << ", " << run.text() << ": raw gate_up at position " << p;
        const auto down_error = [&](const std::vector<float>& got, int at, DType type) {
          return product_error(expert.w2, expert.b2, c.problem.hidden, c.problem.intermediate, row,
                               got.data() + at * c.problem.hidden, type);
        };
        ASSERT_LE(down_error(scratch, rig.routing.row(p), DType::kF32), 1)
            << c.text() << ", " << run.text() << ": down at position " << p;
        ASSERT_LE(down_error(compact, p, types.activations), 1)
            << c.text() << ", " << run.text() << ": compact down at position " << p;
      });
    }
  }
}

TEST(ExpertTiles, RawRowsAreThoseOfW13InItsOrderBiasedAndRoundedOnce) {
  std::mt19937 random(24);
  for (const Types types : kTypes) {
    for (const GateKind kind : {GateKind::kGeneric, GateKind::kRelu2}) {
      schedule(random() % 16).set_up();
      Case c;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = 40,
                   .intermediate = 72,
                   .gate = {.kind = kind, .interleaved = true}};
      c.biased = true;
      c.counts = {2, 0, 33};
      Rig rig(c, Values::kSmallIntegers, random);
      const auto raw = rig.gate_up_raw(rig.experts.table(rig.experts.all()));
      const std::int64_t rows = w13_rows(c.problem);
      for_each_row(rig, [&](int e, int p, bool) {
        const float* const x = hidden_of(rig.hidden, rig.routing, p, c.problem.hidden);
        const Experts::Host& expert = rig.experts.host(e);
        ASSERT_EQ(row_bytes(raw, types.activations, p, rows),
                  encode(types.activations,
                         exact_product(expert.w13, expert.b13, rows, c.problem.hidden, x)))
            << c.text() << ": position " << p;
      });
    }
  }
}

TEST(ExpertTiles, CompactRowsScatterToTheirEntries) {
  std::mt19937 random(25);
  for (const Types types : kTypes) {
    schedule(random() % 16).set_up();
    Case c;
    c.problem = {.weights = types.weights,
                 .activations = types.activations,
                 .hidden = 1048,  // two blocks' columns
                 .intermediate = 8};
    c.biased = true;
    c.counts = {3, 0, 2};
    c.top_k = 3;
    Rig rig(c, Values::kSmallIntegers, random);
    const auto halves =
        draw(Values::kSmallIntegers, types.activations, rig.routing.num_entries() * 8, 1, random);
    const DeviceArray<std::byte> compact(
        rig.down_compact(rig.experts.entries({2, 0, 1}), encode(types.activations, halves)));
    const DeviceArray<float> scratch(static_cast<std::size_t>(rig.routing.num_entries() * 1048));
    // All rows but the first, and more than there are.
    const RoutedRows routed = rig.routing.device();
    launch_scatter_rows({.first = 1,
                         .num_rows = rig.routing.num_entries() - 1,
                         .hidden = 1048,
                         .num_experts = 3,
                         .compact = types.activations},
                        {.compact = compact.data(),
                         .offsets = routed.offsets,
                         .rows = routed.rows,
                         .scratch = scratch.data()},
                        {});
    const auto got = encode(DType::kF32, scratch.read());
    std::vector<bool> written(static_cast<std::size_t>(rig.routing.num_entries()), false);
    for_each_row(rig, [&](int e, int p, bool) {
      if (p == 0) return;
      written[static_cast<std::size_t>(rig.routing.row(p))] = true;
      const Experts::Host& expert = rig.experts.host(e);
      const auto product = exact_product(expert.w2, expert.b2, 1048, 8, halves.data() + p * 8);
      ASSERT_EQ(row_bytes(got, DType::kF32, rig.routing.row(p), 1048),
                encode(DType::kF32, decode(types.activations, encode(types.activations, product))))
          << c.text() << ": position " << p;
    });
    for (std::size_t entry = 0; entry < written.size(); ++entry) {
      ASSERT_TRUE(written[entry] ||
                  untouched(row_bytes(got, DType::kF32, static_cast<std::int64_t>(entry), 1048)))
          << c.text() << ": entry " << entry << " is nobody's";
    }
  }
}

TEST(ExpertTiles, BitsIgnoreTheWaveTheListAndTheTokensBeside) {
  std::mt19937 random(26);
  for (const simt::MmaModel model : mma_models(2)) {
    for (const Types types : kTypes) {
      Schedule{.order = simt::Order::kRandom, .mma = model}.set_up();
      Case c;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = 136,
                   .intermediate = 72};
      c.biased = true;
      c.counts = {20, 66, 1};
      Rig rig(c, Values::kNormal, random);
      const auto all = rig.experts.entries({0, 1, 2});
      const auto h = rig.gate_up(all);
      const auto scratch = rig.down(all, h);
      // Waves: other experts in the launch, in another order, on another GPU.
      EXPECT_EQ(h, rig.gate_up(rig.experts.table({0, 1, 2}))) << c.text();
      EXPECT_EQ(scratch, rig.down(rig.experts.entries({2, 1, 0}), h)) << c.text();
      rig.gpu.num_multiprocessors = 5;
      EXPECT_EQ(h, rig.gate_up(all)) << c.text();
      const auto wave_h = rig.gate_up(rig.experts.entries({1}));
      const auto wave_scratch = rig.down(rig.experts.entries({1}), h);
      for (int p = rig.routing.begin(1); p < rig.routing.begin(2); ++p) {
        ASSERT_EQ(row_bytes(h, types.activations, p, 72),
                  row_bytes(wave_h, types.activations, p, 72))
            << c.text() << ": h at " << p;
        ASSERT_EQ(row_bytes(scratch, DType::kF32, rig.routing.row(p), 136),
                  row_bytes(wave_scratch, DType::kF32, rig.routing.row(p), 136))
            << c.text() << ": down at " << p;
      }
      // A token alone, and in another place of a tile.
      for (const int p : {0, 3, 19}) {
        const DeviceArray<std::int32_t> offsets(std::vector<std::int32_t>{p, p + 1, p + 1, p + 1});
        RoutedRows routed = rig.routing.device();
        routed.offsets = offsets.data();
        const auto out = rig.rows(72, types.activations);
        launch_tile_gate_up(c.problem, plan_tile_gate_up(c.problem, 3, 1, kGpu), all,
                            {.routed = routed,
                             .min_tokens = 1,
                             .hidden = rig.hidden_device.data(),
                             .out = out.data()},
                            {});
        ASSERT_EQ(row_bytes(h, types.activations, p, 72),
                  row_bytes(out.read(), types.activations, p, 72))
            << c.text() << ": position " << p << " alone";
      }
    }
  }
}

TEST(ExpertTiles, LeaveAloneAnExpertThatTheirTableDoesNotHave) {
  std::mt19937 random(28);
  for (const std::int64_t intermediate : {8, 136}) {  // one item of an expert, several
    Schedule{}.set_up();
    Case c;
    c.problem = {.hidden = 16, .intermediate = intermediate};
    c.counts = {2, 1, 3};
    Rig rig(c, Values::kNormal, random);
    const auto all = rig.gate_up(rig.experts.table({0, 1, 2}));
    const auto without = rig.gate_up(rig.experts.table({0, 2}));
    for_each_row(rig, [&](int e, int p, bool) {
      const auto row = row_bytes(without, DType::kBF16, p, intermediate);
      if (e == 1) {
        ASSERT_TRUE(untouched(row)) << c.text() << ": position " << p;
      } else {
        ASSERT_EQ(row, row_bytes(all, DType::kBF16, p, intermediate))
            << c.text() << ": position " << p;
      }
    });
  }
}

TEST(ExpertTiles, RefuseWhatTheyCannotServeByName) {
  std::mt19937 random(27);
  Schedule{}.set_up();
  const auto plan = [](const ExpertProblem& problem) {
    return refusal<ConfigError>([&] { (void)plan_tile_gate_up(problem, 4, 64, kGpu); });
  };
  EXPECT_NE(plan({.hidden = 20, .intermediate = 8}).find("hidden width of 20"), std::string::npos);
  EXPECT_NE(plan({.hidden = 8, .intermediate = 8, .gate = {.kind = GateKind::kGeneric}})
                .find("use launch_tile_gate_up_raw"),
            std::string::npos);
  const auto rows = refusal<ConfigError>(
      [&] { (void)plan_tile_gate_up_raw({.hidden = 8, .intermediate = 8}, 12, 4, 64, kGpu); });
  EXPECT_NE(rows.find("got 12 rows of w13"), std::string::npos) << rows;

  Case c;
  c.problem = {.hidden = 16, .intermediate = 8};
  c.counts = {1, 1};
  Rig rig(c, Values::kNormal, random);
  const auto out = rig.rows(16, DType::kF32);
  const TileGateUpArgs args{.routed = rig.routing.device(),
                            .min_tokens = 1,
                            .hidden = rig.hidden_device.data(),
                            .out = out.data()};
  const auto raw_plan = plan_tile_gate_up_raw(c.problem, 16, 2, 4, kGpu);
  const auto mixed = refusal<InternalError>(
      [&] { launch_tile_gate_up(c.problem, raw_plan, rig.experts.entries({0}), args, {}); });
  EXPECT_NE(mixed.find("paired rows, expected what the plan was made for"), std::string::npos)
      << mixed;
  ExpertProblem wide = c.problem;
  wide.weights = wide.activations = DType::kF32;
  const auto other = refusal<InternalError>([&] {
    launch_tile_gate_up(wide, plan_tile_gate_up(c.problem, 2, 4, kGpu), rig.experts.entries({0}),
                        args, {});
  });
  EXPECT_NE(other.find("a plan with a buffer of 49152 bytes, expected 55296"), std::string::npos)
      << other;
  fake::fail_after(fake::Api::kLaunchKernel, 0, cudaErrorLaunchOutOfResources);
  const auto failed = refusal<DeviceError>([&] {
    launch_tile_gate_up_raw(c.problem, 16, raw_plan, rig.experts.entries({0}), args, {});
  });
  EXPECT_NE(failed.find("launch of tile_gate_up_raw: got cudaErrorLaunchOutOfResources"),
            std::string::npos)
      << failed;
}

}  // namespace
}  // namespace sluice
