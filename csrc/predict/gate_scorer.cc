#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/convert.h"
#include "predict/scorer_parts.h"
#include "predict/scorers.h"

namespace sluice {
namespace {

class GateScorer final : public Scorer {
 public:
  explicit GateScorer(GateTables tables)
      : t_((check(tables), std::move(tables))),
        width_(static_cast<std::size_t>(t_.width)),
        num_experts_(static_cast<std::size_t>(t_.num_experts)),
        num_ids_(t_.ids.size()),
        normal_(width_),
        state_(width_),
        here_(width_),
        there_(width_),
        choices_(num_experts_),
        ordered_(num_experts_),
        not_used_(num_experts_) {
    means_of_rows_.reserve(static_cast<std::size_t>(kMostRows));
  }

  [[nodiscard]] Shape shape() const override { return {t_.num_layers, t_.num_experts, t_.width}; }

  void begin_step(const StepRows& rows) override {
    means_of_rows_.clear();
    if (rows.token_ids.size() > static_cast<std::size_t>(kMostRows)) return;
    for (const std::int64_t id : rows.token_ids) {
      const auto place = std::lower_bound(t_.ids.begin(), t_.ids.end(), id);
      const bool known = place != t_.ids.end() && *place == id;
      means_of_rows_.push_back(known ? static_cast<std::size_t>(place - t_.ids.begin()) : num_ids_);
    }
  }

  void guess(const ForwardArgs& args, const Grouping& /*grouping*/,
             std::vector<LayerGuess>& guesses) override {
    const std::int32_t layer = to_int(args.layer);
    const std::int32_t last = std::min(t_.max_layers, t_.num_layers - 1 - layer);
    if (args.num_tokens > kMostRows) return;
    const auto rows = static_cast<std::size_t>(args.num_tokens);
    if (means_of_rows_.size() != rows) means_of_rows_.assign(rows, num_ids_);
    for (std::int32_t ahead = 1; ahead <= last; ++ahead) {
      std::fill(not_used_.begin(), not_used_.end(), 1.0F);
      for (std::int64_t token = 0; token < args.num_tokens; ++token) {
        look(args, token, layer, layer + ahead, ahead);
      }
      append_guesses(not_used_, kLeastProbability, LayerIdx{layer + ahead}, ahead, guesses);
    }
  }

 private:
  static void check(const GateTables& t) {
    require<ConfigError>(t.num_layers > 0 && t.width > 0 && t.max_layers > 0 && t.top_k > 0 &&
                             t.top_k <= t.num_experts,
                         [&] {
                           return "scorer: got gates of " + std::to_string(t.num_layers) +
                                  " layers, width " + std::to_string(t.width) + ", " +
                                  std::to_string(t.max_layers) + " layers ahead, top " +
                                  std::to_string(t.top_k) + " of " + std::to_string(t.num_experts) +
                                  ", expected some of each";
                         });
    const std::int64_t layers = t.num_layers;
    check_size("gate", t.gate.size(), layers * t.num_experts * t.width);
    check_size("bias", t.bias.size(), layers * t.num_experts);
    check_size("correction", t.correction.size(), layers * t.num_experts);
    check_size("scale", t.scale.size(), layers * t.width);
    check_size("shift", t.shift.size(), layers * t.width);
    check_size("sigmoid", t.sigmoid.size(), layers);
    check_size("centred", t.centred.size(), layers);
    check_size("means", t.means.size(),
               static_cast<std::int64_t>(table_size(t.ids.size() + 1, layers, t.width)));
    check_size("curves", t.curves.size(), layers * t.max_layers * 4);
  }

  static constexpr float kTiny = 1e-6F;

  [[nodiscard]] const float* row(const std::vector<float>& table, std::int32_t layer) const {
    return table.data() + static_cast<std::size_t>(layer) * width_;
  }

  void look(const ForwardArgs& args, std::int64_t token, std::int32_t from, std::int32_t to,
            std::int32_t ahead) {
    const auto* const hidden =
        static_cast<const std::byte*>(args.hidden) +
        static_cast<std::size_t>(token) * width_ * element_bytes(args.activations);
    widen(args.activations, hidden, normal_.data(), t_.width);
    const float* const scale = row(t_.scale, from);
    const float* const shift = row(t_.shift, from);
    const std::size_t mean = means_of_rows_[static_cast<std::size_t>(token)];
    read_mean(mean, from, here_);
    read_mean(mean, to, there_);
    float middle = 0;
    for (std::size_t i = 0; i < width_; ++i) {
      const bool usable = std::abs(scale[i]) > kTiny;
      state_[i] = (usable ? (normal_[i] - shift[i]) / scale[i] : 0.0F) + (there_[i] - here_[i]);
      middle += state_[i];
    }
    middle =
        t_.centred[static_cast<std::size_t>(to)] != 0 ? middle / static_cast<float>(t_.width) : 0;
    float square = 0;
    for (float& each : state_) {
      each -= middle;
      square += each * each;
    }
    const float size = std::max(std::sqrt(square / static_cast<float>(t_.width)), kTiny);
    const float* const to_scale = row(t_.scale, to);
    const float* const to_shift = row(t_.shift, to);
    for (std::size_t i = 0; i < width_; ++i) {
      state_[i] = to_scale[i] * (state_[i] / size) + to_shift[i];
    }
    choose(to);
    turn_into_probabilities(to, ahead, mean == num_ids_);
  }

  void read_mean(std::size_t mean, std::int32_t layer, std::vector<float>& into) const {
    const std::size_t at =
        (mean * static_cast<std::size_t>(t_.num_layers) + static_cast<std::size_t>(layer)) * width_;
    widen(DType::kF16, t_.means.data() + at, into.data(), t_.width);
  }

  // What the layer would choose the largest of.
  void choose(std::int32_t to) {
    for (std::size_t e = 0; e < num_experts_; ++e) {
      const std::size_t at = static_cast<std::size_t>(to) * num_experts_ + e;
      float logit = t_.bias[at] + dot(state_, t_.gate.data() + at * width_);
      if (t_.sigmoid[static_cast<std::size_t>(to)] != 0) logit = 1.0F / (1.0F + std::exp(-logit));
      choices_[e] = logit + t_.correction[at];
    }
  }

  void turn_into_probabilities(std::int32_t to, std::int32_t ahead, bool unknown) {
    ordered_ = choices_;
    const auto k = static_cast<std::size_t>(t_.top_k);
    const std::size_t next = std::min(k, num_experts_ - 1);
    std::partial_sort(ordered_.begin(), ordered_.begin() + static_cast<std::ptrdiff_t>(next + 1),
                      ordered_.end(), std::greater<>());
    const float middle = (ordered_[k - 1] + ordered_[next]) / 2;
    const float* const curve = t_.curves.data() + 4 * table_size(ahead - 1, t_.num_layers) +
                               4 * static_cast<std::size_t>(to) + (unknown ? 2 : 0);
    for (std::size_t e = 0; e < num_experts_; ++e) {
      const float x = std::clamp(curve[0] * (choices_[e] - middle) + curve[1], -30.0F, 30.0F);
      not_used_[e] *= 1.0F - 1.0F / (1.0F + std::exp(-x));
    }
  }

  GateTables t_;
  std::size_t width_;
  std::size_t num_experts_;
  std::size_t num_ids_;
  std::vector<std::size_t> means_of_rows_;  // of the running step
  std::vector<float> normal_;
  std::vector<float> state_;
  std::vector<float> here_;
  std::vector<float> there_;
  std::vector<float> choices_;
  std::vector<float> ordered_;
  std::vector<float> not_used_;
};

}  // namespace

std::unique_ptr<Scorer> make_gate_scorer(GateTables tables) {
  return std::make_unique<GateScorer>(std::move(tables));
}

}  // namespace sluice
