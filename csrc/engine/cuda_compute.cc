#include "engine/cuda_compute.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/combine_gpu.h"
#include "kernels/dependent_launch.h"
#include "kernels/expert_gemv.h"
#include "kernels/expert_tiles.h"
#include "kernels/route.h"

namespace sluice {
namespace {

/// Memory of a device that grows and is kept; contents are lost on growth, which waits for all work
/// of the device.
class DeviceScratch {
 public:
  DeviceScratch(Device& device, MemoryKind kind) : device_(device), kind_(kind) {}

  template <class T>
  T* reserve(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > buffer_.bytes()) {
      buffer_ = {};  // first, so that both never exist at once
      buffer_ = kind_ == MemoryKind::kDevice ? device_.allocate_slab(bytes)
                                             : device_.allocate_pinned(bytes);
    }
    return reinterpret_cast<T*>(buffer_.data());
  }
  [[nodiscard]] std::uint64_t bytes() const { return buffer_.bytes(); }
  void free() noexcept { buffer_ = {}; }

 private:
  Device& device_;
  const MemoryKind kind_;
  DeviceBuffer buffer_;
};

bool begins_early(Device& device) {
  const DeviceScope here(device);
  return supports_dependent_launch();
}

class CudaCompute final : public ExpertCompute {
 public:
  explicit CudaCompute(Device& device)
      : device_(device),
        gpu_{.num_multiprocessors = device.traits().num_multiprocessors,
             .shared_bytes_per_block = device.traits().shared_bytes_per_block},
        chains_(begins_early(device)) {}
  ~CudaCompute() override { close(); }

  [[nodiscard]] const Grouping& begin(const ForwardArgs& args, const StoredLayer& layer,
                                      const LayerSpec& spec) override;
  [[nodiscard]] bool takes_several(const Grouping::Group& /*group*/) const override {
    return !spec_->has_callback();
  }
  void several(std::span<const ReadyExpert> experts) override;
  void one(const ReadyExpert& expert) override;
  void combine_rows() override;
  void close() noexcept override;

  [[nodiscard]] std::int64_t generic_gate_calls() const override { return generic_gate_calls_; }
  [[nodiscard]] std::uint64_t workspace_bytes() const override { return workspace_bytes_; }

 private:
  [[nodiscard]] std::int64_t num_entries() const { return args_->num_tokens * args_->top_k; }
  [[nodiscard]] RoutedRows routed() const {
    return {.offsets = offsets_,
            .rows = rows_,
            .num_experts = layer_->num_experts,
            .top_k = static_cast<std::int32_t>(args_->top_k)};
  }
  void follow_last_call();
  void fetch_routing();
  void reserve_scratch();
  void gemv(const ExpertEntries& entries);
  void tiles(const ExpertEntries& entries);

  Device& device_;
  const GpuTraits gpu_;
  const bool chains_;  // kernels may begin while the one ahead in the stream ends
  const ForwardArgs* args_ = nullptr;
  const StoredLayer* layer_ = nullptr;
  const LayerSpec* spec_ = nullptr;
  ExpertProblem problem_;
  Grouping grouping_;
  ExpertEntries entries_;
  std::int64_t generic_gate_calls_ = 0;
  std::atomic<std::uint64_t> workspace_bytes_{0};

  bool used_ = false;  // the scratch, by a call on last_stream_
  StreamHandle last_stream_{};
  EventHandle last_use_{};  // behind that call; {}: it ended early
  bool overlaps_ = false;   // the work just ahead is a kernel of this chain, and `chains_`

  DeviceScratch host_routing_{device_, MemoryKind::kPinned};
  DeviceScratch row_scratch_{device_, MemoryKind::kDevice};      // offsets [E + 1], rows [T · K]
  DeviceScratch h_scratch_{device_, MemoryKind::kDevice};        // [T · K, I]
  DeviceScratch result_scratch_{device_, MemoryKind::kDevice};   // [T · K, H] fp32
  DeviceScratch raw_scratch_{device_, MemoryKind::kDevice};      // [T · K, R], generic gates
  DeviceScratch compact_scratch_{device_, MemoryKind::kDevice};  // [T · K, H] twice, post-expert
  std::int32_t* offsets_ = nullptr;
  std::int32_t* rows_ = nullptr;
  std::byte* h_ = nullptr;
  float* results_ = nullptr;
  std::byte* raw_ = nullptr;
  std::byte* compact_ = nullptr;
};

const Grouping& CudaCompute::begin(const ForwardArgs& args, const StoredLayer& layer,
                                   const LayerSpec& spec) {
  const ExpertLayout& layout = layer.layout;
  require<ConfigError>(args.activations == layout.dtype || args.activations == DType::kF32, [&] {
    return "forward of " + layer.name + ": got activations " +
           std::string(dtype_name(args.activations)) + " over weights " +
           std::string(dtype_name(layout.dtype)) +
           ", expected the weights' type or F32; cast the hidden states";
  });
  args_ = &args;
  layer_ = &layer;
  spec_ = &spec;
  problem_ = {.weights = layout.dtype,
              .activations = args.activations,
              .hidden = layout.hidden,
              .intermediate = layout.intermediate,
              .gate = spec.gate};
  generic_gate_calls_ = 0;
  follow_last_call();
  reserve_scratch();
  fetch_routing();
  return grouping_;
}

// The scratch is of one call at a time; on another stream it is not known to be free.
void CudaCompute::follow_last_call() {
  if (used_ && args_->stream != last_stream_) {
    if (last_use_ == EventHandle{}) last_use_ = device_.record(last_stream_);
    device_.wait(args_->stream, last_use_);
  }
  device_.release(std::exchange(last_use_, {}));
  used_ = true;
  last_stream_ = args_->stream;
}

void CudaCompute::reserve_scratch() {
  const std::int64_t entries = num_entries();
  const ExpertLayout& layout = layer_->layout;
  const auto element = static_cast<std::int64_t>(element_bytes(args_->activations));
  // Rows behind the offsets, 16-byte aligned.
  const std::int64_t offsets = (layer_->num_experts + 1 + 3) / 4 * 4;
  offsets_ = row_scratch_.reserve<std::int32_t>(offsets + entries);
  rows_ = offsets_ + offsets;
  h_ = h_scratch_.reserve<std::byte>(entries * layout.intermediate * element);
  results_ = result_scratch_.reserve<float>(entries * layout.hidden);
  if (spec_->gate.kind == GateKind::kGeneric) {
    raw_ = raw_scratch_.reserve<std::byte>(entries * layout.w13_rows() * element);
  }
  if (spec_->post_expert_callback) {
    compact_ = compact_scratch_.reserve<std::byte>(2 * entries * layout.hidden * element);
  }
}

// The ids are what the host decides by: their way to it is enqueued first, then the device sorts
// its own copy while the host waits.
void CudaCompute::fetch_routing() {
  const std::int64_t entries = num_entries();
  const auto id_bytes = static_cast<std::size_t>(entries) * sizeof(std::int64_t);
  const std::size_t weight_bytes =
      static_cast<std::size_t>(entries) * element_bytes(args_->weights_dtype);
  std::byte* const host =
      host_routing_.reserve<std::byte>(static_cast<std::int64_t>(id_bytes + weight_bytes));
  ForwardArgs on_host = *args_;
  on_host.expert_ids = reinterpret_cast<const std::int64_t*>(host);
  on_host.weights = host + id_bytes;
  workspace_bytes_ = host_routing_.bytes() + row_scratch_.bytes() + h_scratch_.bytes() +
                     result_scratch_.bytes() + raw_scratch_.bytes() + compact_scratch_.bytes();
  overlaps_ = false;
  if (entries > 0) {
    const StreamHandle stream = args_->stream;
    device_.read_async(host, reinterpret_cast<const std::byte*>(args_->expert_ids), id_bytes,
                       stream);
    device_.read_async(host + id_bytes, static_cast<const std::byte*>(args_->weights), weight_bytes,
                       stream);
    const EventHandle arrived = device_.record(stream);
    const RouteProblem problem{.num_tokens = args_->num_tokens,
                               .top_k = args_->top_k,
                               .num_experts = layer_->num_experts,
                               .weights = args_->weights_dtype};
    launch_route(
        problem, plan_route(problem),
        {.ids = args_->expert_ids, .weights = args_->weights, .offsets = offsets_, .rows = rows_},
        stream);
    device_.synchronize(arrived);
    device_.release(arrived);
  }
  grouping_.assign(on_host, layer_->num_experts);
}

void CudaCompute::several(std::span<const ReadyExpert> experts) {
  const auto launch_those = [&](bool few) {
    entries_.count = 0;
    for (const ReadyExpert& expert : experts) {
      if ((expert.group->count <= kGemvTokens) != few) continue;
      entries_.entries[entries_.count++] = {.weights = expert.weights,
                                            .expert = expert.group->expert};
      if (entries_.count < kMaxListedExperts) continue;
      few ? gemv(entries_) : tiles(entries_);
      entries_.count = 0;
    }
    if (entries_.count > 0) few ? gemv(entries_) : tiles(entries_);
  };
  launch_those(true);
  launch_those(false);
}

void CudaCompute::gemv(const ExpertEntries& entries) {
  const StreamHandle stream = args_->stream;
  launch_expert_gate_up(problem_, plan_expert_gate_up(problem_, entries.count, num_entries(), gpu_),
                        entries, {.routed = routed(), .hidden = args_->hidden, .h = h_}, stream);
  launch_expert_down(problem_, plan_expert_down(problem_, entries.count, num_entries(), gpu_),
                     entries, {.routed = routed(), .h = h_, .scratch = results_}, stream, chains_);
  overlaps_ = chains_;
}

void CudaCompute::tiles(const ExpertEntries& entries) {
  const StreamHandle stream = args_->stream;
  launch_tile_gate_up(
      problem_, plan_tile_gate_up(problem_, entries.count, num_entries(), gpu_), entries,
      {.routed = routed(), .min_tokens = kGemvTokens + 1, .hidden = args_->hidden, .out = h_},
      stream);
  launch_tile_down(problem_, plan_tile_down(problem_, entries.count, num_entries(), gpu_), entries,
                   {.routed = routed(), .min_tokens = kGemvTokens + 1, .h = h_, .out = results_},
                   stream, chains_);
  overlaps_ = chains_;
}

void CudaCompute::one(const ReadyExpert& expert) {
  const StreamHandle stream = args_->stream;
  const ExpertLayout& layout = layer_->layout;
  const std::int64_t begin = expert.group->begin;
  const std::int64_t rows = expert.group->count;
  const auto element = static_cast<std::int64_t>(element_bytes(args_->activations));
  entries_.entries[0] = {.weights = expert.weights, .expert = expert.group->expert};
  entries_.count = 1;

  TileGateUpArgs in{.routed = routed(), .min_tokens = 1, .hidden = args_->hidden, .out = h_};
  if (spec_->gate.kind == GateKind::kGeneric) {
    in.out = raw_;
    const std::int64_t columns = layout.w13_rows();
    launch_tile_gate_up_raw(problem_, columns,
                            plan_tile_gate_up_raw(problem_, columns, 1, num_entries(), gpu_),
                            entries_, in, stream);
    ++generic_gate_calls_;
    call_back(spec_->gate_callback, "gate callback", *args_, *layer_, rows, columns,
              layout.intermediate, raw_ + begin * columns * element,
              h_ + begin * layout.intermediate * element);
    (void)device_.enter_thread();  // the callback may have chosen another device
  } else {
    launch_tile_gate_up(problem_, plan_tile_gate_up(problem_, 1, num_entries(), gpu_), entries_, in,
                        stream);
  }

  const ExpertTilesPlan plan = plan_tile_down(problem_, 1, num_entries(), gpu_);
  TileDownArgs down{.routed = routed(), .min_tokens = 1, .h = h_, .out = results_};
  if (!spec_->post_expert_callback) {
    launch_tile_down(problem_, plan, entries_, down, stream);
  } else {
    down.out = compact_;
    launch_tile_down_compact(problem_, plan, entries_, down, stream);
    std::byte* const after = compact_ + num_entries() * layout.hidden * element;
    const std::int64_t offset = begin * layout.hidden * element;
    call_back(spec_->post_expert_callback, "post-expert callback", *args_, *layer_, rows,
              layout.hidden, layout.hidden, compact_ + offset, after + offset);
    (void)device_.enter_thread();  // the callback may have chosen another device
    launch_scatter_rows({.first = begin,
                         .num_rows = rows,
                         .hidden = layout.hidden,
                         .num_experts = layer_->num_experts,
                         .compact = args_->activations},
                        {.compact = after, .offsets = offsets_, .rows = rows_, .scratch = results_},
                        stream);
  }
  overlaps_ = chains_;
}

void CudaCompute::combine_rows() {
  if (args_->num_tokens > 0) {
    launch_combine({.num_tokens = args_->num_tokens,
                    .top_k = args_->top_k,
                    .hidden = layer_->layout.hidden,
                    .num_experts = layer_->num_experts,
                    .weights = args_->weights_dtype,
                    .out = args_->activations},
                   {.ids = args_->expert_ids,
                    .weights = args_->weights,
                    .scratch = results_,
                    .out = args_->out},
                   args_->stream, overlaps_);
  }
  last_use_ = device_.record(args_->stream);
}

void CudaCompute::close() noexcept {
  device_.release(std::exchange(last_use_, {}));
  for (DeviceScratch* const scratch : {&host_routing_, &row_scratch_, &h_scratch_, &result_scratch_,
                                       &raw_scratch_, &compact_scratch_}) {
    scratch->free();
  }
  workspace_bytes_ = 0;
}

}  // namespace

std::unique_ptr<ExpertCompute> make_cuda_compute(Device& device) {
  return std::make_unique<CudaCompute>(device);
}

}  // namespace sluice
