#include "kernels/expert_gemv.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/emulation/kernels/experts_check.h"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the test support of this folder

constexpr GpuTraits kGpu = {.num_multiprocessors = 2, .shared_bytes_per_block = 227 * 1024};

enum class ListKind { kEntries, kTable };

struct Case {
  ExpertProblem problem;
  bool biased = false;
  std::vector<int> counts;
  int top_k = 2;
  ListKind list = ListKind::kEntries;
  GpuTraits gpu = kGpu;
  [[nodiscard]] std::string text() const {
    std::string found = testing::text(problem) + (biased ? ", biased" : "") + ", tokens";
    for (const int count : counts) found.append(1, ' ').append(std::to_string(count));
    return found + (list == ListKind::kTable ? ", table" : ", entries") + ", " +
           std::to_string(gpu.shared_bytes_per_block) + " bytes shared";
  }
};

bool takes(int count) { return count >= 1 && count <= kGemvTokens; }

/// The decode pair over experts, rows and inputs that stay.
struct Rig {
  Rig(const Case& c, Values values, std::mt19937& random)
      : problem(c.problem),
        gpu(c.gpu),
        experts(problem, w13_rows(problem), static_cast<int>(c.counts.size()), c.biased, values,
                random),
        routing(c.counts, c.top_k, static_cast<int>(random() % 3), random),
        hidden(draw(values, problem.activations, routing.num_tokens() * problem.hidden, 1, random)),
        hidden_device(encode(problem.activations, hidden)) {}

  [[nodiscard]] std::vector<std::byte> gate_up(const auto& list, const RoutedRows& routed,
                                               StreamHandle stream = {}) const {
    const DeviceArray<std::byte> h(h_bytes());
    const ExpertGemvPlan plan =
        plan_expert_gate_up(problem, list.count, routing.num_entries(), gpu);
    launch_expert_gate_up(problem, plan, list,
                          {.routed = routed, .hidden = hidden_device.data(), .h = h.data()},
                          stream);
    return h.read();
  }
  [[nodiscard]] std::vector<float> down(const auto& list, const RoutedRows& routed,
                                        const std::vector<std::byte>& h,
                                        StreamHandle stream = {}) const {
    const DeviceArray<std::byte> h_device(h);
    const DeviceArray<float> scratch(
        static_cast<std::size_t>(routing.num_entries() * problem.hidden));
    const ExpertGemvPlan plan = plan_expert_down(problem, list.count, routing.num_entries(), gpu);
    launch_expert_down(problem, plan, list,
                       {.routed = routed, .h = h_device.data(), .scratch = scratch.data()}, stream);
    return scratch.read();
  }
  [[nodiscard]] std::size_t h_bytes() const {
    return static_cast<std::size_t>(routing.num_entries() * problem.intermediate) *
           element_bytes(problem.activations);
  }

  ExpertProblem problem;
  GpuTraits gpu;
  Experts experts;
  Routing routing;
  std::vector<float> hidden;
  DeviceArray<std::byte> hidden_device;
};

/// Calls `fn` with the experts as the case wants them listed.
template <class Fn>
auto with_list(const Case& c, Rig& rig, const std::vector<int>& experts, Fn fn) {
  return c.list == ListKind::kTable ? fn(rig.experts.table(experts))
                                    : fn(rig.experts.entries(experts));
}

void check_exact(const Case& c, Rig& rig, StreamHandle stream, std::mt19937& random) {
  std::vector<int> order = rig.experts.all();
  std::shuffle(order.begin(), order.end(), random);
  const RoutedRows routed = rig.routing.device();
  const std::int64_t width = c.problem.intermediate;
  const auto h =
      with_list(c, rig, order, [&](const auto& list) { return rig.gate_up(list, routed, stream); });
  // What gate_up left alone is undefined; down must not look at it.
  std::vector<float> halves = draw(Values::kSmallIntegers, c.problem.activations,
                                   rig.routing.num_entries() * width, 1, random);
  const auto scratch = with_list(c, rig, order, [&](const auto& list) {
    return rig.down(list, routed, encode(c.problem.activations, halves), stream);
  });
  const auto scratch_bytes = encode(DType::kF32, scratch);

  std::vector<bool> written(static_cast<std::size_t>(rig.routing.num_entries()), false);
  for (int e = 0; e < rig.experts.count(); ++e) {
    if (!takes(rig.routing.count(e))) continue;
    for (int p = rig.routing.begin(e); p < rig.routing.begin(e + 1); ++p) {
      const auto entry = static_cast<std::size_t>(rig.routing.row(p));
      written[entry] = true;
      const float* const x = hidden_of(rig.hidden, rig.routing, p, c.problem.hidden);
      ASSERT_EQ(row_bytes(h, c.problem.activations, p, width),
                exact_h(c.problem, rig.experts.host(e), x))
          << c.text() << ": h of expert " << e << ", position " << p;
      const auto product = exact_product(rig.experts.host(e).w2, rig.experts.host(e).b2,
                                         c.problem.hidden, width, halves.data() + p * width);
      ASSERT_EQ(
          row_bytes(scratch_bytes, DType::kF32, static_cast<std::int64_t>(entry), c.problem.hidden),
          encode(DType::kF32, product))
          << c.text() << ": down of expert " << e << ", entry " << entry;
    }
  }
  for (int e = 0; e < rig.experts.count(); ++e) {
    if (takes(rig.routing.count(e))) continue;
    for (int p = rig.routing.begin(e); p < rig.routing.begin(e + 1); ++p) {
      ASSERT_TRUE(untouched(row_bytes(h, c.problem.activations, p, width)))
          << c.text() << ": h of expert " << e << ", which is not for these kernels";
    }
  }
  for (std::size_t entry = 0; entry < written.size(); ++entry) {
    ASSERT_TRUE(written[entry] ||
                untouched(row_bytes(scratch_bytes, DType::kF32, static_cast<std::int64_t>(entry),
                                    c.problem.hidden)))
        << c.text() << ": entry " << entry << " has no expert in these kernels, but a result";
  }
}

/// Shapes around every tail, step, block and split of the columns; the other axes drawn.
std::vector<Case> sweep(std::mt19937& random) {
  const auto pick = [&](std::size_t count) { return random() % count; };
  constexpr std::int64_t kWidths[] = {8,   16,  24,  32,  40,  56,  64,  72,  88,  120, 128,
                                      136, 192, 248, 256, 264, 504, 512, 520, 528, 1032};
  std::vector<Case> cases;
  for (const Types types : kTypes) {
    for (const std::int64_t hidden : kWidths) {
      Case c;
      // The other matrix is short when this one's rows are long.
      const std::int64_t intermediate =
          hidden > 264 ? 8 * (1 + static_cast<std::int64_t>(pick(6))) : kWidths[pick(14)];
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = hidden,
                   .intermediate = intermediate,
                   .gate = {.kind = kGateKinds[cases.size() % std::size(kGateKinds)],
                            .interleaved = pick(2) == 0,
                            .limit = 1.5f}};
      if (pick(2) == 0) std::swap(c.problem.hidden, c.problem.intermediate);
      c.biased = pick(2) == 0;
      for (int e = 0; e < 5; ++e) {
        constexpr int kCounts[] = {0, 0, 1, 1, 2, 3, 5, 8, 9, 16, 17};
        c.counts.push_back(kCounts[pick(std::size(kCounts))]);
      }
      c.counts[pick(5)] = 1 + static_cast<int>(pick(kGemvTokens));
      c.top_k = 1 + static_cast<int>(pick(4));
      c.list = pick(2) == 0 ? ListKind::kEntries : ListKind::kTable;
      c.gpu.num_multiprocessors = 1 + static_cast<int>(pick(3));
      cases.push_back(c);
    }
  }
  return cases;
}

TEST(ExpertGemv, IsExactOnSmallIntegersInEveryShape) {
  for (int seed = 0; seed < num_seeds(); ++seed) {
    std::mt19937 random(static_cast<unsigned>(11 + seed));
    const std::vector<Case> cases = sweep(random);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const Schedule run = schedule(i + static_cast<std::size_t>(seed) * cases.size());
      run.set_up();
      SCOPED_TRACE(run.text());
      const Stream stream(i % 2 == 0);
      Rig rig(cases[i], Values::kSmallIntegers, random);
      ASSERT_NO_FATAL_FAILURE(check_exact(cases[i], rig, stream.handle(), random))
          << cases[i].text();
      ASSERT_TRUE(fake::findings().empty()) << fake::findings().front();
    }
  }
}

TEST(ExpertGemv, FindsTheBusyOnesOfMoreExpertsThanABlockHasThreads) {
  std::mt19937 random(19);
  Schedule{.order = simt::Order::kSkew}.set_up();
  Case c;
  c.problem = {.hidden = 16, .intermediate = 8};
  c.counts.assign(264, 0);
  for (const std::size_t busy : {0u, 31u, 32u, 255u, 256u, 257u, 263u}) {
    c.counts[busy] = 1 + static_cast<int>(busy % 3);
  }
  c.list = ListKind::kTable;
  Rig rig(c, Values::kSmallIntegers, random);
  check_exact(c, rig, {}, random);
}

TEST(ExpertGemv, IsExactOnTheRowsOfRealModels) {
  // Row lengths of Qwen3-30B, OLMoE, gpt-oss, DeepSeek-V2-Lite and Mixtral; few rows.
  constexpr std::int64_t kWidths[] = {768, 1408, 2048, 2880, 4096, 14336};
  std::mt19937 random(12);
  std::size_t i = 0;
  for (const Types types : kTypes) {
    for (const std::int64_t width : kWidths) {
      Case c;
      const bool long_hidden = i % 2 == 0;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = long_hidden ? width : 16,
                   .intermediate = long_hidden ? 8 : width,
                   .gate = {.kind = GateKind::kSilu, .interleaved = i % 3 == 0}};
      // Rows of 16 tokens do not fit: segments, whose size is the GPU's.
      c.counts = {1, i % 3 == 0 ? 16 : 3};
      if (i % 2 == 1) c.gpu.shared_bytes_per_block = 99 * 1024;
      c.biased = i % 2 == 1;
      schedule(i++).set_up();
      Rig rig(c, Values::kSmallIntegers, random);
      ASSERT_NO_FATAL_FAILURE(check_exact(c, rig, {}, random)) << c.text();
    }
  }
}

TEST(ExpertGemv, IsWithinRoundingOfFp64UnderEveryModelOfTheMma) {
  std::mt19937 random(13);
  std::size_t i = 0;
  for (const simt::MmaModel model : mma_models()) {
    for (const Types types : kTypes) {
      for (const std::int64_t hidden : {72, 776, 2048}) {
        Case c;
        c.problem = {.weights = types.weights,
                     .activations = types.activations,
                     .hidden = hidden,
                     .intermediate = hidden > 1000 ? 16 : 136,
                     .gate = {.kind = kGateKinds[i % std::size(kGateKinds)], .limit = 1.5f}};
        c.biased = i % 2 == 0;
        c.counts = {1, 3, 9};
        Schedule run = schedule(i++);
        run.mma = model;
        run.set_up();
        Rig rig(c, Values::kNormal, random);
        const RoutedRows routed = rig.routing.device();
        const ExpertEntries list = rig.experts.entries(rig.experts.all());
        const auto h = rig.gate_up(list, routed);
        const auto scratch = rig.down(list, routed, h);
        const auto values = decode(c.problem.activations, h);
        for (int e = 0; e < rig.experts.count(); ++e) {
          for (int p = rig.routing.begin(e); p < rig.routing.begin(e + 1); ++p) {
            const float* const x = hidden_of(rig.hidden, rig.routing, p, hidden);
            const float* const row = values.data() + p * c.problem.intermediate;
            ASSERT_LE(
                h_error(c.problem, rig.experts.host(e), x, {row, row + c.problem.intermediate}), 1)
                << c.text() << ", " << run.text() << ": h at position " << p;
            ASSERT_LE(product_error(rig.experts.host(e).w2, rig.experts.host(e).b2, hidden,
                                    c.problem.intermediate, row,
                                    scratch.data() + rig.routing.row(p) * hidden, DType::kF32),
                      1)
                << c.text() << ", " << run.text() << ": down at position " << p;
          }
        }
      }
    }
  }
}

/// The bytes of each expert's rows of h and scratch, by position.
std::vector<std::vector<std::byte>> results(const Rig& rig, const auto& list) {
  const RoutedRows routed = rig.routing.device();
  const auto h = rig.gate_up(list, routed);
  const auto scratch = encode(DType::kF32, rig.down(list, routed, h));
  std::vector<std::vector<std::byte>> found;
  for (int e = 0; e < rig.experts.count(); ++e) {
    std::vector<std::byte>& bytes = found.emplace_back();
    for (int p = rig.routing.begin(e); p < rig.routing.begin(e + 1); ++p) {
      for (const auto& row :
           {row_bytes(h, rig.problem.activations, p, rig.problem.intermediate),
            row_bytes(scratch, DType::kF32, rig.routing.row(p), rig.problem.hidden)}) {
        bytes.insert(bytes.end(), row.begin(), row.end());
      }
    }
  }
  return found;
}

// One matrix has long rows, cut over warps and staged in segments, the other few of them.
constexpr std::int64_t kLongAndShort[][2] = {{1048, 24}, {24, 1048}};

TEST(ExpertGemv, BitsIgnoreTheLaunchTheListAndTheGpu) {
  std::mt19937 random(14);
  std::size_t i = 0;
  for (const Types types : kTypes) {
    for (const auto& [hidden, intermediate] : kLongAndShort) {
      if (kSanitized && i++ % 3 != 0) continue;  // both shapes, four of the types
      Case c;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = hidden,
                   .intermediate = intermediate};
      c.biased = true;
      c.counts = {2, 16, 0, 7};
      Schedule{.order = simt::Order::kRandom, .mma = simt::MmaModel::kFp64PerEight}.set_up();
      Rig rig(c, Values::kNormal, random);
      const auto all = rig.experts.entries({0, 1, 2, 3});
      const auto expected = results(rig, all);
      ASSERT_FALSE(untouched(expected[0]));
      for (const int expert : {1, 3}) {
        EXPECT_EQ(expected[static_cast<std::size_t>(expert)],
                  results(rig, rig.experts.entries({expert}))[static_cast<std::size_t>(expert)])
            << c.text() << ": alone";
      }
      EXPECT_EQ(expected, results(rig, rig.experts.entries({3, 1, 2, 0})))
          << c.text() << ": the list turned around";
      EXPECT_EQ(expected, results(rig, rig.experts.table({0, 1, 2, 3})))
          << c.text() << ": by table";
      // Less shared memory: rows are staged in segments. Other multiprocessors: items move blocks.
      rig.gpu = {.num_multiprocessors = 1, .shared_bytes_per_block = 99 * 1024};
      EXPECT_EQ(expected, results(rig, all)) << c.text() << ": a smaller GPU";
      rig.gpu = {.num_multiprocessors = 7, .shared_bytes_per_block = 163 * 1024};
      EXPECT_EQ(expected, results(rig, all)) << c.text() << ": another GPU";
    }
  }
}

TEST(ExpertGemv, ATokensBitsIgnoreTheTokensBesideIt) {
  std::mt19937 random(15);
  std::size_t i = 0;
  for (const simt::MmaModel model : mma_models(2)) {
    for (const Types types : kTypes) {
      Schedule{.mma = model}.set_up();
      const auto& [hidden, intermediate] = kLongAndShort[i++ % 2];
      Case c;
      c.problem = {.weights = types.weights,
                   .activations = types.activations,
                   .hidden = hidden,
                   .intermediate = intermediate};
      c.counts = {kGemvTokens};
      c.top_k = 1;
      Rig rig(c, Values::kNormal, random);
      const ExpertEntries list = rig.experts.entries({0});
      const auto h = rig.gate_up(list, rig.routing.device());
      const auto scratch = encode(DType::kF32, rig.down(list, rig.routing.device(), h));
      for (const int count : {1, 2, 8, 9}) {
        for (const int first : {5, kGemvTokens - count}) {
          // Positions first … first + count − 1 are the expert's, the others nobody's.
          const DeviceArray<std::int32_t> offsets(std::vector<std::int32_t>{first, first + count});
          RoutedRows routed = rig.routing.device();
          routed.offsets = offsets.data();
          const auto h_few = rig.gate_up(list, routed);
          const auto scratch_few = encode(DType::kF32, rig.down(list, routed, h));
          for (int p = 0; p < kGemvTokens; ++p) {
            const bool inside = p >= first && p < first + count;
            const int entry = rig.routing.row(p);
            const auto few = row_bytes(h_few, types.activations, p, intermediate);
            const auto few_row = row_bytes(scratch_few, DType::kF32, entry, hidden);
            if (inside) {
              ASSERT_EQ(few, row_bytes(h, types.activations, p, intermediate))
                  << c.text() << ": h at " << p << ", " << count << " tokens";
              ASSERT_EQ(few_row, row_bytes(scratch, DType::kF32, entry, hidden))
                  << c.text() << ": down at " << p << ", " << count << " tokens";
            } else {
              ASSERT_TRUE(untouched(few) && untouched(few_row)) << c.text() << ", " << p;
            }
          }
        }
      }
    }
  }
}

TEST(ExpertGemv, TheGatesHaveTheHostsBitsWhereTheirBranchesMeet) {
  // Arguments around the limit, and around those of gelu and gelu_tanh at which one approximation
  // takes over from another: erf's at 1, tanh's at 5/8. The second token's sums are all tiny: for
  // the first channel -0, by underflow.
  std::vector<float> values = {-0x1p-100f};
  for (const float border : {1.5f, 0x1.6a09e6p+0f, 0x1.86dfc2p-1f}) {
    for (int ulps = -16; ulps < 16; ++ulps) {
      const float value = border + static_cast<float>(ulps) * 0x1p-24f * (border > 1 ? 2.0f : 1.0f);
      values.insert(values.end(), {value, -value});
    }
  }
  values.resize((values.size() + 7) / 8 * 8, 1.0f);
  std::mt19937 random(20);
  for (const GateKind kind : kGateKinds) {
    Schedule{}.set_up();
    const ExpertProblem problem{.weights = DType::kF32,
                                .activations = DType::kF32,
                                .hidden = 16,
                                .intermediate = static_cast<std::int64_t>(values.size()),
                                .gate = {.kind = kind, .limit = 1.5f}};
    Experts::Host host;
    host.w13.assign(static_cast<std::size_t>(w13_rows(problem) * problem.hidden), -0x1p-100f);
    for (std::int64_t channel = 0; channel < problem.intermediate; ++channel) {
      const ChannelRows rows = channel_rows(problem, channel);
      const float value = values[static_cast<std::size_t>(channel)];
      host.w13[static_cast<std::size_t>(rows.up * problem.hidden)] =
          is_gated(kind) ? 1.5f - value : value;
      host.w13[static_cast<std::size_t>(rows.gate * problem.hidden)] = value;
    }
    std::vector<float> hidden(32, 0.0f);
    hidden[0] = 1;
    std::fill(hidden.begin() + 16, hidden.end(), 0x1p-100f);

    const Routing routing({2}, 1, 0, random);
    const DeviceArray<float> w13(host.w13);
    const DeviceArray<float> hidden_device(hidden);
    const DeviceArray<float> h(2 * values.size());
    ExpertEntries list;
    list.count = 1;
    list.entries[0].weights.w13 = reinterpret_cast<const std::byte*>(w13.data());
    launch_expert_gate_up(
        problem, plan_expert_gate_up(problem, 1, 2, kGpu), list,
        {.routed = routing.device(), .hidden = hidden_device.data(), .h = h.data()}, {});
    const auto got = encode(DType::kF32, h.read());
    for (int p = 0; p < 2; ++p) {
      const float* const x = hidden_of(hidden, routing, p, problem.hidden);
      ASSERT_EQ(row_bytes(got, DType::kF32, p, problem.intermediate), exact_h(problem, host, x))
          << text(problem) << ": position " << p;
    }
  }
}

TEST(ExpertGemv, TouchesNothingOfASlotButItsSections) {
  // Two slots side by side in one slab, as the cache lays them out, padding between the sections.
  std::mt19937 random(16);
  Schedule{}.set_up();
  const ExpertProblem problem{.hidden = 40, .intermediate = 24};
  const std::size_t w13 = 2 * 24 * 40 * 2, w2 = 40 * 24 * 2;
  const std::size_t w2_offset = (w13 + 63) / 64 * 64, slot = (w2_offset + w2 + 63) / 64 * 64;
  const DeviceArray<std::byte> slab(encode(
      DType::kBF16,
      draw(Values::kNormal, DType::kBF16, static_cast<std::int64_t>(3 * slot / 2), 1, random)));
  simt::forbid(slab.data(), slot);
  simt::forbid(slab.data() + slot + w13, w2_offset - w13);
  simt::forbid(slab.data() + slot + w2_offset + w2, slot - w2_offset - w2);
  simt::forbid(slab.data() + 2 * slot, slot);
  ExpertEntries list;
  list.count = 1;
  list.entries[0].weights = {.w13 = slab.data() + slot, .w2 = slab.data() + slot + w2_offset};

  const Routing routing({3}, 1, 0, random);
  const DeviceArray<std::byte> hidden(
      encode(DType::kBF16, draw(Values::kNormal, DType::kBF16, 3 * 40, 1, random)));
  const DeviceArray<std::byte> h(3 * 24 * 2);
  const DeviceArray<float> scratch(3 * 40);
  launch_expert_gate_up(problem, plan_expert_gate_up(problem, 1, 3, kGpu), list,
                        {.routed = routing.device(), .hidden = hidden.data(), .h = h.data()}, {});
  launch_expert_down(problem, plan_expert_down(problem, 1, 3, kGpu), list,
                     {.routed = routing.device(), .h = h.data(), .scratch = scratch.data()}, {},
                     true);
  for (const float value : scratch.read()) EXPECT_FALSE(std::isnan(value));
  simt::clear_forbidden();
}

TEST(ExpertGemv, LeavesAloneAnExpertThatItsTableDoesNotHave) {
  std::mt19937 random(20);
  for (const std::int64_t intermediate : {8, 520}) {  // one item of an expert, several
    Schedule{}.set_up();
    Case c;
    c.problem = {.hidden = 16, .intermediate = intermediate};
    c.counts = {2, 1, 3};
    Rig rig(c, Values::kNormal, random);
    const auto all = results(rig, rig.experts.table({0, 1, 2}));
    const auto without = results(rig, rig.experts.table({0, 2}));
    EXPECT_EQ(without[0], all[0]) << c.text();
    EXPECT_TRUE(untouched(without[1])) << c.text();
    EXPECT_EQ(without[2], all[2]) << c.text();
  }
}

TEST(ExpertGemv, NothingToDoIsNothingDone) {
  std::mt19937 random(17);
  Schedule{}.set_up();
  Case c;
  c.problem = {.hidden = 16, .intermediate = 8};
  c.counts = {0, 17, 0};
  Rig rig(c, Values::kNormal, random);
  EXPECT_TRUE(untouched(rig.gate_up(rig.experts.entries({0, 1, 2}), rig.routing.device())));
  EXPECT_TRUE(untouched(rig.gate_up(rig.experts.table({}), rig.routing.device())));
  const std::uint64_t launches = fake::stats().launches;
  EXPECT_TRUE(untouched(rig.gate_up(rig.experts.entries({}), rig.routing.device())));
  EXPECT_EQ(fake::stats().launches, launches);
}

TEST(ExpertGemv, RefusesWhatItCannotServeByName) {
  std::mt19937 random(18);
  Schedule{}.set_up();
  const auto plan = [](const ExpertProblem& problem) {
    return refusal<ConfigError>([&] { (void)plan_expert_gate_up(problem, 4, 1, kGpu); });
  };
  EXPECT_NE(plan({.hidden = 20, .intermediate = 8}).find("hidden width of 20"), std::string::npos);
  EXPECT_NE(plan({.hidden = 8, .intermediate = 12}).find("intermediate width of 12"),
            std::string::npos);
  EXPECT_NE(plan({.weights = DType::kF32, .hidden = 8, .intermediate = 8})
                .find("activations BF16 over weights F32"),
            std::string::npos);
  EXPECT_NE(plan({.hidden = 8, .intermediate = 8, .gate = {.kind = GateKind::kGeneric}})
                .find("the generic gate"),
            std::string::npos);
  const auto crowded = refusal<ConfigError>(
      [&] { (void)plan_expert_down({.hidden = 8, .intermediate = 8}, 30'000, 1, kGpu); });
  EXPECT_NE(crowded.find("a list of 30000 experts"), std::string::npos) << crowded;

  Case c;
  c.problem = {.hidden = 16, .intermediate = 8};
  c.counts = {1, 1};
  Rig rig(c, Values::kNormal, random);
  const ExpertGemvPlan one = plan_expert_gate_up(c.problem, 1, 2, kGpu);
  const ExpertGateUpArgs args{.routed = rig.routing.device(),
                              .hidden = rig.hidden_device.data(),
                              .h = rig.hidden_device.data()};
  const auto longer = refusal<InternalError>(
      [&] { launch_expert_gate_up(c.problem, one, rig.experts.entries({0, 1}), args, {}); });
  EXPECT_NE(longer.find("got 2 experts, expected at most the plan's 1"), std::string::npos)
      << longer;
  ExpertGateUpArgs askew = args;
  askew.hidden = rig.hidden_device.data() + 2;
  const auto misaligned = refusal<ConfigError>(
      [&] { launch_expert_gate_up(c.problem, one, rig.experts.entries({0}), askew, {}); });
  EXPECT_NE(misaligned.find("the input rows at an address that is 2 bytes past"), std::string::npos)
      << misaligned;
  fake::fail_after(fake::Api::kLaunchKernel, 0, cudaErrorLaunchOutOfResources);
  const auto failed = refusal<DeviceError>(
      [&] { launch_expert_gate_up(c.problem, one, rig.experts.entries({0}), args, {}); });
  EXPECT_NE(failed.find("launch of expert_gate_up: got cudaErrorLaunchOutOfResources"),
            std::string::npos)
      << failed;
}

}  // namespace
}  // namespace sluice
