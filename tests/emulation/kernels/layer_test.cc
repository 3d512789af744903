// A layer as the engine enqueues it: route, the decode pair, the tiles, combine; on any stream,
// with and without overlap, captured.
#include <gtest/gtest.h>

#include <memory>

#include "kernels/combine.h"
#include "kernels/combine_gpu.h"
#include "kernels/convert.h"
#include "kernels/expert_decode.h"
#include "kernels/expert_gemv.h"
#include "kernels/expert_tiles.h"
#include "kernels/route.h"
#include "tests/emulation/kernels/experts_check.h"

namespace sluice {
namespace {

using namespace testing;  // NOLINT: the test support of this folder

constexpr GpuTraits kGpu = {.num_multiprocessors = 2, .shared_bytes_per_block = 227 * 1024};

struct Shape {
  std::int64_t num_tokens = 24;
  std::int64_t top_k = 2;
  int num_experts = 6;
};

/// Ids and routing weights of a call: expert 0 is chosen by most tokens, so that its rows are for
/// the tile kernels; some entries are nobody's, some tokens name an expert twice.
struct Choice {
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  Choice(const Shape& shape, std::mt19937& random) {
    for (std::int64_t i = 0; i < shape.num_tokens * shape.top_k; ++i) {
      const auto draw = random() % 20;
      ids.push_back(draw == 0    ? -1
                    : draw <= 10 ? 0
                                 : static_cast<std::int64_t>(
                                       random() % static_cast<unsigned>(shape.num_experts)));
      weights.push_back(random() % 16 == 0 ? 0.0f : static_cast<float>(random() % 64) / 64);
    }
  }
};

/// One layer's device memory, at fixed addresses.
struct Layer {
  Layer(const ExpertProblem& of, const Shape& call, std::mt19937& random)
      : problem(of),
        shape(call),
        experts(problem, w13_rows(problem), shape.num_experts, true, Values::kNormal, random),
        table(experts.table(experts.all())),
        ids(static_cast<std::size_t>(entries())),
        weights(static_cast<std::size_t>(entries())),
        offsets(static_cast<std::size_t>(shape.num_experts) + 1),
        rows(static_cast<std::size_t>(entries())),
        h(static_cast<std::size_t>(entries() * problem.intermediate) *
          element_bytes(problem.activations)),
        scratch(static_cast<std::size_t>(entries() * problem.hidden)),
        out(static_cast<std::size_t>(shape.num_tokens * problem.hidden) *
            element_bytes(problem.activations)) {}

  [[nodiscard]] std::int64_t entries() const { return shape.num_tokens * shape.top_k; }

  /// Enqueues the layer on `hidden`. Waves: experts by value, in lists of `wave`; 0: all by table.
  void launch(const void* hidden, int wave, StreamHandle stream, bool overlap) const {
    const RoutedRows routed{.offsets = offsets.data(),
                            .rows = rows.data(),
                            .num_experts = shape.num_experts,
                            .top_k = static_cast<std::int32_t>(shape.top_k)};
    const RouteProblem route{
        .num_tokens = shape.num_tokens, .top_k = shape.top_k, .num_experts = shape.num_experts};
    launch_route(route, plan_route(route),
                 {.ids = ids.data(),
                  .weights = weights.data(),
                  .offsets = offsets.data(),
                  .rows = rows.data()},
                 stream, overlap);
    const auto compute = [&](const auto& list) {
      launch_expert_gate_up(problem, plan_expert_gate_up(problem, list.count, entries(), kGpu),
                            list, {.routed = routed, .hidden = hidden, .h = h.data()}, stream,
                            overlap);
      launch_expert_down(problem, plan_expert_down(problem, list.count, entries(), kGpu), list,
                         {.routed = routed, .h = h.data(), .scratch = scratch.data()}, stream,
                         overlap);
      launch_tile_gate_up(
          problem, plan_tile_gate_up(problem, list.count, entries(), kGpu), list,
          {.routed = routed, .min_tokens = kGemvTokens + 1, .hidden = hidden, .out = h.data()},
          stream, overlap);
      launch_tile_down(
          problem, plan_tile_down(problem, list.count, entries(), kGpu), list,
          {.routed = routed, .min_tokens = kGemvTokens + 1, .h = h.data(), .out = scratch.data()},
          stream, overlap);
    };
    if (wave == 0) compute(table);
    for (int first = 0; wave > 0 && first < shape.num_experts; first += wave) {
      std::vector<int> listed;
      for (int e = first; e < std::min(first + wave, shape.num_experts); ++e) listed.push_back(e);
      compute(experts.entries(listed));
    }
    launch_combine({.num_tokens = shape.num_tokens,
                    .top_k = shape.top_k,
                    .hidden = problem.hidden,
                    .num_experts = shape.num_experts,
                    .out = problem.activations},
                   {.ids = ids.data(),
                    .weights = weights.data(),
                    .scratch = scratch.data(),
                    .out = out.data()},
                   stream, overlap);
  }

  ExpertProblem problem;
  Shape shape;
  Experts experts;
  ExpertTable table;
  DeviceArray<std::int64_t> ids;
  DeviceArray<float> weights;
  DeviceArray<std::int32_t> offsets, rows;
  DeviceArray<std::byte> h;
  DeviceArray<float> scratch;
  DeviceArray<std::byte> out;
};

/// The same call by the CPU's kernels.
std::vector<float> on_host(const Layer& layer, const Choice& choice,
                           const std::vector<float>& hidden) {
  const std::int64_t width = layer.problem.hidden;
  const auto entries = static_cast<std::size_t>(layer.entries());
  SerialFor serial;
  std::vector<float> rows(entries * static_cast<std::size_t>(width));
  std::vector<std::uint8_t> valid(entries, 0);
  std::vector<float> scratch(static_cast<std::size_t>(expert_decode_scratch(layer.problem, 1)));
  for (std::size_t i = 0; i < entries; ++i) {
    const std::int64_t id = choice.ids[i];
    valid[i] = id >= 0 && id < layer.shape.num_experts && choice.weights[i] != 0.0f ? 1 : 0;
    if (valid[i] == 0) continue;
    const Experts::Host& host = layer.experts.host(static_cast<int>(id));
    const auto w13 = encode(layer.problem.weights, host.w13);
    const auto w2 = encode(layer.problem.weights, host.w2);
    const float* const in =
        hidden.data() + static_cast<std::int64_t>(i) / layer.shape.top_k * width;
    float* const out = rows.data() + i * static_cast<std::size_t>(width);
    const ExpertWork work{.weights = {.w13 = w13.data(),
                                      .w2 = w2.data(),
                                      .b13 = host.b13.data(),
                                      .b2 = host.b2.data()},
                          .inputs = &in,
                          .outputs = &out,
                          .num_tokens = 1};
    expert_decode(layer.problem, {&work, 1}, scratch.data(), serial);
  }
  std::vector<float> result(static_cast<std::size_t>(layer.shape.num_tokens * width));
  combine(rows.data(), choice.weights.data(), valid.data(), layer.shape.num_tokens,
          layer.shape.top_k, width, DType::kF32, result.data(), serial);
  return result;
}

/// Largest difference between two outputs, relative to the largest value: rounding of h is what
/// they differ by, and one turned-around bit of it moves an output by half an ulp times √I values
/// of size one over √I.
double distance(const std::vector<float>& got, const std::vector<float>& expected) {
  double largest = 0;
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
    worst = std::max(worst, std::isnan(error) ? INFINITY : error);
  }
  return worst / largest;
}

TEST(LayerOnTheGpu, IsTheHostsLayerUnderEveryScheduleAndStream) {
  std::mt19937 random(51);
  for (std::size_t i = 0; i < 16 * static_cast<std::size_t>(num_seeds()); ++i) {
    const Types types = kTypes[i % 5];
    const Schedule run = schedule(i);
    run.set_up();
    SCOPED_TRACE(run.text());
    const Shape shape;
    const ExpertProblem problem{.weights = types.weights,
                                .activations = types.activations,
                                .hidden = 72,
                                .intermediate = 40,
                                .gate = {.kind = GateKind::kSilu, .interleaved = i % 2 == 0}};
    Layer layer(problem, shape, random);
    const Choice choice(shape, random);
    const auto hidden =
        draw(Values::kNormal, types.activations, shape.num_tokens * problem.hidden, 1, random);
    layer.ids.write(choice.ids);
    layer.weights.write(choice.weights);
    const DeviceArray<std::byte> hidden_device(encode(types.activations, hidden));
    const Stream stream(i / 2 % 2 == 0);
    const bool overlap = i % 4 != 3;
    layer.launch(hidden_device.data(), 0, stream.handle(), overlap);
    const auto bytes = layer.out.read();
    EXPECT_LE(distance(decode(types.activations, bytes), on_host(layer, choice, hidden)),
              4 * half_ulp(types.activations) + 0x1p-18)
        << text(problem);
    // Law 1 across waves: one expert a launch, two, all by value.
    for (const int wave : {1, 4}) {
      layer.launch(hidden_device.data(), wave, stream.handle(), overlap);
      EXPECT_EQ(layer.out.read(), bytes) << text(problem) << ": waves of " << wave;
    }
    // handle 0 runs grids in order like any stream; only a dependent launch starts early.
    if (overlap && run.policy == fake::Policy::kLazy) {
      EXPECT_GT(fake::stats().early_prologues, 0u);
    }
    ASSERT_TRUE(fake::findings().empty()) << fake::findings().front();
  }
}

/// Copies device words by a kernel: what is ahead of a launch that may start early.
class Producer {
 public:
  explicit Producer(const std::vector<float>& values) : source_(values), count_(values.size() / 8) {
    std::vector<std::int32_t> rows(count_);
    for (std::size_t i = 0; i < count_; ++i) rows[i] = static_cast<std::int32_t>(i);
    offsets_.write({0, static_cast<std::int32_t>(count_)});
    rows_ = std::make_unique<DeviceArray<std::int32_t>>(rows);
  }
  void launch(void* target, StreamHandle stream) const {
    launch_scatter_rows({.num_rows = static_cast<std::int64_t>(count_),
                         .hidden = 8,
                         .num_experts = 1,
                         .compact = DType::kF32},
                        {.compact = source_.data(),
                         .offsets = offsets_.data(),
                         .rows = rows_->data(),
                         .scratch = static_cast<float*>(target)},
                        stream);
  }

 private:
  DeviceArray<float> source_;
  std::size_t count_;
  DeviceArray<std::int32_t> offsets_{2};
  std::unique_ptr<DeviceArray<std::int32_t>> rows_;
};

TEST(LayerOnTheGpu, EveryKernelWaitsForTheOneAheadAlthoughItStartsEarly) {
  std::mt19937 random(53);
  for (const fake::Policy policy : {fake::Policy::kLazy, fake::Policy::kAhead}) {
    Schedule{.policy = policy}.set_up();
    const Stream stream(true);
    const Shape shape{.num_tokens = 32, .top_k = 2, .num_experts = 2};
    const ExpertProblem problem{
        .weights = DType::kF32, .activations = DType::kF32, .hidden = 16, .intermediate = 8};
    Layer layer(problem, shape, random);
    const Choice choice(shape, random);
    layer.weights.write(choice.weights);
    const auto hidden = draw(Values::kNormal, DType::kF32, 32 * 16, 1, random);

    // route behind the kernel that writes the ids, as words of floats.
    std::vector<float> words(2 * choice.ids.size());
    std::memcpy(words.data(), choice.ids.data(), words.size() * sizeof(float));
    const Producer ids(words);
    const RouteProblem route{.num_tokens = 32, .top_k = 2, .num_experts = 2};
    ids.launch(layer.ids.data(), stream.handle());
    launch_route(route, plan_route(route),
                 {.ids = layer.ids.data(),
                  .weights = layer.weights.data(),
                  .offsets = layer.offsets.data(),
                  .rows = layer.rows.data()},
                 stream.handle(), true);
    std::vector<std::int32_t> offsets = layer.offsets.read();
    EXPECT_GT(fake::stats().early_prologues, 0u);
    EXPECT_TRUE(offsets[0] == 0 && offsets[1] > kGemvTokens && offsets[2] > offsets[1]);
    const RoutedRows routed{
        .offsets = layer.offsets.data(), .rows = layer.rows.data(), .num_experts = 2, .top_k = 2};
    const ExpertEntries list = layer.experts.entries({0, 1});

    // Both gate_ups behind the kernel that writes the hidden rows.
    const Producer producer(hidden);
    const auto gate_up = [&](bool tiles, bool early) {
      const DeviceArray<float> input(hidden.size());
      const DeviceArray<std::byte> h(layer.h.size());
      producer.launch(input.data(), stream.handle());
      EXPECT_TRUE(early || cudaStreamSynchronize(stream.cuda()) == cudaSuccess);
      if (tiles) {
        launch_tile_gate_up(problem, plan_tile_gate_up(problem, 2, 64, kGpu), list,
                            {.routed = routed, .hidden = input.data(), .out = h.data()},
                            stream.handle(), early);
      } else {
        launch_expert_gate_up(problem, plan_expert_gate_up(problem, 2, 64, kGpu), list,
                              {.routed = routed, .hidden = input.data(), .h = h.data()},
                              stream.handle(), early);
      }
      return h.read();
    };
    for (const bool tiles : {false, true}) {
      EXPECT_EQ(gate_up(tiles, true), gate_up(tiles, false)) << (tiles ? "tiles" : "decode");
    }

    // Both downs behind the kernel that writes h, and what reads their rows behind them.
    const auto h = draw(Values::kNormal, DType::kF32, layer.entries() * 8, 1, random);
    const Producer h_producer(h);
    const auto down = [&](int kind, bool early) {
      const DeviceArray<float> input(h.size());
      const DeviceArray<float> rows(static_cast<std::size_t>(layer.entries() * 16));
      const DeviceArray<float> scratch(rows.size());
      const auto wait = [&] {
        EXPECT_TRUE(early || cudaStreamSynchronize(stream.cuda()) == cudaSuccess);
      };
      h_producer.launch(input.data(), stream.handle());
      wait();
      if (kind == 0) {
        launch_expert_down(problem, plan_expert_down(problem, 2, 64, kGpu), list,
                           {.routed = routed, .h = input.data(), .scratch = rows.data()},
                           stream.handle(), early);
        return rows.read();
      }
      const ExpertTilesPlan plan = plan_tile_down(problem, 2, 64, kGpu);
      const TileDownArgs args{.routed = routed, .h = input.data(), .out = rows.data()};
      if (kind == 1) {
        launch_tile_down(problem, plan, list, args, stream.handle(), early);
        return rows.read();
      }
      launch_tile_down_compact(problem, plan, list, args, stream.handle(), early);
      wait();
      launch_scatter_rows(
          {.num_rows = layer.entries(), .hidden = 16, .num_experts = 2, .compact = DType::kF32},
          {.compact = rows.data(),
           .offsets = routed.offsets,
           .rows = routed.rows,
           .scratch = scratch.data()},
          stream.handle(), early);
      return scratch.read();
    };
    for (const int kind : {0, 1, 2}) {
      EXPECT_EQ(encode(DType::kF32, down(kind, true)), encode(DType::kF32, down(kind, false)))
          << "kind " << kind;
    }
  }
}

TEST(LayerOnTheGpu, AStackIsCapturedAndReplayedWithOtherRoutes) {
  std::mt19937 random(52);
  for (const fake::Policy policy : kPolicies) {
    Schedule{.order = simt::Order::kRandom, .policy = policy}.set_up();
    const Shape shape{.num_tokens = 20, .top_k = 2, .num_experts = 4};
    const ExpertProblem problem{.hidden = 40, .intermediate = 24};
    std::vector<std::unique_ptr<Layer>> stack;
    for (int l = 0; l < 3; ++l) stack.push_back(std::make_unique<Layer>(problem, shape, random));
    DeviceArray<std::byte> hidden(static_cast<std::size_t>(20 * 40 * 2));
    const Stream stream(true);
    const auto launch_all = [&] {
      const void* in = hidden.data();
      for (const auto& layer : stack) {
        layer->launch(in, 0, stream.handle(), true);
        in = layer->out.data();
      }
    };
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(stream.cuda(), cudaStreamCaptureModeGlobal), cudaSuccess);
    launch_all();
    ASSERT_EQ(cudaStreamEndCapture(stream.cuda(), &graph), cudaSuccess) << fake::last_failure();
    ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess) << fake::last_failure();
    std::vector<std::byte> last;
    for (int replay = 0; replay < 3; ++replay) {
      hidden.write(encode(DType::kBF16, draw(Values::kNormal, DType::kBF16, 20 * 40, 1, random)));
      for (const auto& layer : stack) {
        const Choice choice(shape, random);
        layer->ids.write(choice.ids);
        layer->weights.write(choice.weights);
      }
      ASSERT_EQ(cudaGraphLaunch(exec, stream.cuda()), cudaSuccess) << fake::last_failure();
      const auto replayed = stack.back()->out.read();
      launch_all();
      EXPECT_EQ(stack.back()->out.read(), replayed) << "replay " << replay;
      EXPECT_NE(replayed, last) << "a replay must read the routes anew";
      last = replayed;
    }
    ASSERT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
    ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }
}

}  // namespace
}  // namespace sluice
