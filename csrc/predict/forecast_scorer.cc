#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/error.h"
#include "kernels/convert.h"
#include "predict/alike_tokens.h"
#include "predict/expert_usage.h"
#include "predict/forecast_head.h"
#include "predict/pending_tokens.h"
#include "predict/scorer_parts.h"
#include "predict/scorers.h"

namespace sluice {
namespace {

// A token ahead there are many guesses and the link is the limit: at 0.2 they read a fifth more
// than none do, at 0.5 nothing more.
constexpr float kLeastNextToken = 0.5F;
constexpr std::int64_t kMostTokens = 1 << 24;  // of a request in one forward
constexpr std::size_t kMostStreams = 16;       // requests that are remembered

/// What one request's text is known for, and how far its running token has come.
struct Stream {
  std::int64_t request = 0;
  std::int64_t step = 0;    // its newest
  std::int64_t tokens = 0;  // finished
  ExpertUsage usage;
  PendingTokens pending;
  std::int32_t column = -1;  // of the newest token that joined the memory
  std::vector<std::uint16_t> overlap;
  AlikeTokens::Looking looking;
  // What the head reads of the token before, through `place`: features of the sequence and of all
  // text, as far as the running token has routed and of the last finished one. [2, W] each.
  std::vector<float> context;
  std::vector<float> next_context;
  std::vector<float> prefix;         // [W], of the running token's routes
  std::vector<std::int16_t> routes;  // [S, K] of it
  std::vector<float> keep;           // [S, E] as of each layer's newest route
  std::vector<float> next_token;     // [S, E]
};

class ForecastScorer final : public Scorer {
 public:
  explicit ForecastScorer(ForecastTables tables)
      : t_((check(tables), std::move(tables))),
        layers_(static_cast<std::size_t>(t_.num_layers)),
        experts_(static_cast<std::size_t>(t_.num_experts)),
        top_k_(static_cast<std::size_t>(t_.top_k)),
        prompt_tokens_(static_cast<std::size_t>(t_.prompt_tokens)),
        alike_(std::move(t_.memory), t_.num_layers, t_.num_experts, t_.top_k, t_.window),
        head_(std::move(t_.head), t_.num_layers, t_.num_experts, num_features(t_)),
        features_(static_cast<std::size_t>(num_features(t_)) * experts_),
        followed_(experts_ * static_cast<std::size_t>(t_.window + 1)),
        ids_(top_k_),
        weights_(top_k_),
        keep_(layers_ * experts_),
        not_used_(experts_) {
    worth_.resize(static_cast<std::size_t>(t_.window + 1) * t_.discounts.size());
    for (std::size_t g = 0; g < t_.discounts.size(); ++g) {
      for (std::int32_t n = 1; n <= t_.window; ++n) {
        worth_[static_cast<std::size_t>(n) * t_.discounts.size() + g] =
            std::pow(t_.discounts[g], static_cast<float>(n - 1));
      }
    }
    running_.reserve(static_cast<std::size_t>(kMostRows));
  }

  [[nodiscard]] Shape shape() const override {
    return {.num_layers = t_.num_layers,
            .num_experts = t_.num_experts,
            .width = 0,
            .reads_weights = true};
  }

  void begin_step(const StepRows& rows) override {
    ++step_;
    const auto here = [&](std::int64_t request) {
      return std::find(rows.requests.begin(), rows.requests.end(), request) != rows.requests.end();
    };
    for (Stream* const stream : running_) {  // first, so that who comes knows what they taught
      if (!here(stream->request)) hand_over(*stream, 0);
    }
    running_.clear();
    next_layer_ = 0;
    tokens_ = rows.tokens;
    if (rows.tokens < 1 || rows.tokens > kMostTokens ||
        std::cmp_greater(rows.requests.size(), kMostRows)) {
      return;
    }
    for (const std::int64_t request : rows.requests) {
      Stream& stream = stream_of(request);
      if (std::find(running_.begin(), running_.end(), &stream) != running_.end()) {
        running_.clear();  // twice the same: no rows of any text
        return;
      }
      running_.push_back(&stream);
    }
    const auto shown = std::min(static_cast<std::size_t>(tokens_), prompt_tokens_);
    if (tokens_ > 1) {
      late_ids_.assign(running_.size() * shown * layers_ * top_k_, -1);
      late_weights_.assign(late_ids_.size(), 0);
    } else {
      for (Stream* const stream : running_) begin_token(*stream);
    }
  }

  [[nodiscard]] LayerScores rank(const ForwardArgs& args) override {
    const std::int32_t layer = to_int(args.layer);
    scored_ = false;
    if (running_.empty()) return {};
    if (layer != next_layer_ || !std::cmp_equal(args.num_tokens, running_.size() * tokens_)) {
      running_.clear();  // somebody else's layer: this token is lost
      return {};
    }
    ++next_layer_;
    const bool last = next_layer_ == t_.num_layers;
    if (tokens_ > 1) {
      keep_late(args);
      if (!last) return {};
      for (std::size_t i = 0; i < running_.size(); ++i) read_prompt(*running_[i], i);
      return joined(0, layers_);
    }
    for (std::size_t i = 0; i < running_.size(); ++i) {
      read_row(args, i);
      after_layer(*running_[i], args.layer, true);
      if (last) end_token(*running_[i]);
    }
    scored_ = true;
    return joined(static_cast<std::size_t>(layer), 1);
  }

  // The same layer of the next token.
  void guess(const ForwardArgs& args, const Grouping& /*grouping*/,
             std::vector<LayerGuess>& guesses) override {
    if (!scored_) return;
    const std::size_t at = static_cast<std::size_t>(to_int(args.layer)) * experts_;
    std::fill(not_used_.begin(), not_used_.end(), 1.0F);
    for (const Stream* const stream : running_) {
      for (std::size_t e = 0; e < experts_; ++e) not_used_[e] *= 1 - stream->next_token[at + e];
    }
    append_guesses(not_used_, kLeastNextToken, args.layer, t_.num_layers, guesses);
  }

 private:
  static std::int32_t num_usage_features(const ForecastTables& t) {
    return static_cast<std::int32_t>(t.usage.half_lives.size() + ExpertUsage::kShares);
  }
  static std::int32_t num_features(const ForecastTables& t) {
    return num_usage_features(t) + static_cast<std::int32_t>(t.discounts.size());
  }

  static void check(const ForecastTables& t) {
    require<ConfigError>(
        t.num_layers > 0 && t.num_experts > 0 && t.top_k > 0 && t.prompt_tokens > 0, [&] {
          return "scorer: got a forecaster of " + std::to_string(t.num_layers) + " layers, top " +
                 std::to_string(t.top_k) + " of " + std::to_string(t.num_experts) + " experts, " +
                 std::to_string(t.prompt_tokens) + " tokens of a prompt, expected some of each";
        });
    check_size("context", t.context.size(), 2);
    for (const std::int32_t each : t.context) {
      require<ConfigError>(each >= 0 && each < num_usage_features(t), [&] {
        return "scorer: got feature " + std::to_string(each) + " as context, expected one below " +
               std::to_string(num_usage_features(t));
      });
    }
  }

  Stream& stream_of(std::int64_t request) {
    const auto known = std::find_if(streams_.begin(), streams_.end(),
                                    [&](const auto& each) { return each->request == request; });
    if (known != streams_.end()) {
      (*known)->step = step_;
      return **known;
    }
    if (streams_.size() >= kMostStreams) forget_one();
    std::unique_ptr<Stream> made;
    if (latest_ == nullptr) {
      made = std::make_unique<Stream>(Stream{
          .usage = ExpertUsage(t_.usage, t_.num_layers, t_.num_experts),
          .pending = PendingTokens(static_cast<std::size_t>(t_.window), layers_, experts_, top_k_),
          .overlap = {},
          .looking = {},
          .context = std::vector<float>(2 * head_.width()),
          .next_context = std::vector<float>(2 * head_.width()),
          .prefix = std::vector<float>(head_.width()),
          .routes = std::vector<std::int16_t>(layers_ * top_k_, -1),
          .keep = std::vector<float>(layers_ * experts_),
          .next_token = std::vector<float>(layers_ * experts_)});
    } else {  // one text goes on where another ended
      made = std::make_unique<Stream>(*latest_);
      made->usage.begin_sequence();
      std::fill_n(made->context.begin(), head_.width(), 0.0F);
      while (made->pending.size() > 0) made->pending.pop();
      made->column = -1;
      made->tokens = 0;
      made->overlap.clear();
    }
    made->request = request;
    made->step = step_;
    streams_.push_back(std::move(made));
    return *streams_.back();
  }

  // Who was longest without a row, but for the newest text of all.
  void forget_one() {
    auto oldest = streams_.end();
    for (auto each = streams_.begin(); each != streams_.end(); ++each) {
      if (each->get() == latest_ || (*each)->step == step_) continue;
      if (oldest == streams_.end() || (*each)->step < (*oldest)->step) oldest = each;
    }
    if (oldest != streams_.end()) streams_.erase(oldest);
  }

  void hand_over(Stream& stream, std::size_t most) {
    while (stream.pending.size() > most) {
      stream.column = alike_.add(stream.pending.oldest_routes(), stream.pending.oldest_next_uses(),
                                 stream.column);
      stream.pending.pop();
    }
  }

  void begin_token(Stream& stream) {
    std::span<const std::uint16_t> previous;
    if (stream.tokens > 0) previous = stream.overlap;
    alike_.begin(stream.looking, previous);
    std::fill(stream.prefix.begin(), stream.prefix.end(), 0.0F);
    std::fill(stream.next_context.begin(), stream.next_context.end(), 0.0F);
    std::fill(stream.routes.begin(), stream.routes.end(), std::int16_t{-1});
  }

  void end_token(Stream& stream) {
    stream.overlap.swap(stream.looking.overlap);
    stream.context.swap(stream.next_context);
    stream.usage.end_token();
    ++stream.tokens;
    stream.pending.push(stream.routes);
    if (stream.pending.is_full()) hand_over(stream, stream.pending.size() - 1);
    latest_ = &stream;
  }

  /// `ids_` and `weights_` of one row of a call.
  void read_row(const ForwardArgs& args, std::size_t at) {
    const auto wide = static_cast<std::size_t>(args.top_k);
    const std::size_t count = std::min(wide, top_k_);
    std::fill(ids_.begin(), ids_.end(), -1);
    std::fill(weights_.begin(), weights_.end(), 0.0F);
    for (std::size_t k = 0; k < count; ++k) {
      const std::int64_t id = args.expert_ids[at * wide + k];
      if (id >= 0 && id < t_.num_experts) ids_[k] = static_cast<std::int32_t>(id);
    }
    const auto* const bytes =
        static_cast<const std::byte*>(args.weights) + at * wide * element_bytes(args.weights_dtype);
    widen(args.weights_dtype, bytes, weights_.data(), static_cast<std::int64_t>(count));
  }

  /// A prompt's layers run for all of its tokens at once: its newest are kept until all have run.
  void keep_late(const ForwardArgs& args) {
    const auto tokens = static_cast<std::size_t>(tokens_);
    const std::size_t shown = std::min(tokens, prompt_tokens_);
    const auto layer = static_cast<std::size_t>(to_int(args.layer));
    for (std::size_t i = 0; i < running_.size(); ++i) {
      for (std::size_t t = 0; t < shown; ++t) {
        read_row(args, i * tokens + tokens - shown + t);
        const std::size_t at = ((i * shown + t) * layers_ + layer) * top_k_;
        std::copy(ids_.begin(), ids_.end(), late_ids_.begin() + static_cast<std::ptrdiff_t>(at));
        std::copy(weights_.begin(), weights_.end(),
                  late_weights_.begin() + static_cast<std::ptrdiff_t>(at));
      }
    }
  }

  // Scores are wanted of the last token, and its comparison reads the overlap of the one before.
  void read_prompt(Stream& stream, std::size_t index) {
    const std::size_t shown = std::min(static_cast<std::size_t>(tokens_), prompt_tokens_);
    for (std::size_t t = 0; t < shown; ++t) {
      begin_token(stream);
      for (std::size_t l = 0; l < layers_; ++l) {
        const std::size_t at = ((index * shown + t) * layers_ + l) * top_k_;
        std::copy_n(late_ids_.begin() + static_cast<std::ptrdiff_t>(at), top_k_, ids_.begin());
        std::copy_n(late_weights_.begin() + static_cast<std::ptrdiff_t>(at), top_k_,
                    weights_.begin());
        after_layer(stream, LayerIdx{static_cast<std::int32_t>(l)}, t + 1 == shown);
      }
      end_token(stream);
    }
  }

  /// The running token's layer has routed to `ids_`.
  void after_layer(Stream& stream, LayerIdx layer, bool scores) {
    const auto l = static_cast<std::size_t>(to_int(layer));
    for (std::size_t k = 0; k < top_k_; ++k) {
      stream.routes[l * top_k_ + k] = static_cast<std::int16_t>(ids_[k]);
    }
    stream.usage.advance(layer, ids_, weights_, features_);
    for (std::size_t each = 0; each < 2; ++each) {
      const auto feature = static_cast<std::size_t>(t_.context[each]);
      head_.add_context(layer, each, {features_.data() + feature * experts_, experts_},
                        part(stream.next_context, each));
    }
    head_.add_routes(layer, ids_, stream.prefix);
    if (!scores) {
      alike_.count(stream.looking, layer, ids_);
      return;
    }
    const AlikeTokens::Found found = alike_.look(stream.looking, layer, ids_);
    recall(found, layer);
    head_.answer(layer,
                 {.prefix = stream.prefix,
                  .context = {part(stream.context, 0), part(stream.context, 1)},
                  .position = stream.tokens,
                  .sure = found.sure,
                  .ids = ids_,
                  .features = features_},
                 {stream.next_token.data() + l * experts_, experts_},
                 {stream.keep.data() + l * experts_, experts_});
  }

  /// One of the two halves of a context.
  [[nodiscard]] std::span<float> part(std::vector<float>& context, std::size_t which) const {
    return {context.data() + which * head_.width(), head_.width()};
  }

  /// What followed similar tokens: square roots of discounted next uses, as further features.
  void recall(const AlikeTokens::Found& found, LayerIdx layer) {
    const std::size_t ahead = static_cast<std::size_t>(t_.window) + 1;
    const std::size_t discounts = t_.discounts.size();
    std::fill(followed_.begin(), followed_.end(), 0.0F);
    for (std::size_t i = 0; i < found.columns.size(); ++i) {
      const std::uint8_t* const next = alike_.next_uses(found.columns[i], layer);
      for (std::size_t e = 0; e < experts_; ++e) followed_[e * ahead + next[e]] += found.weights[i];
    }
    float* const recalled = features_.data() + features_.size() - discounts * experts_;
    for (std::size_t e = 0; e < experts_; ++e) {
      for (std::size_t g = 0; g < discounts; ++g) {
        float sum = 0;
        for (std::size_t n = 1; n < ahead; ++n) {
          sum += followed_[e * ahead + n] * worth_[n * discounts + g];
        }
        recalled[g * experts_ + e] = std::sqrt(sum);
      }
    }
  }

  /// Rows of all running requests as one: the probability that any of them comes back.
  LayerScores joined(std::size_t first, std::size_t count) {
    const std::span<float> rows(keep_.data(), count * experts_);
    if (running_.size() == 1) {
      std::copy_n(running_.front()->keep.begin() + static_cast<std::ptrdiff_t>(first * experts_),
                  rows.size(), rows.begin());
    } else {
      std::fill(rows.begin(), rows.end(), 1.0F);
      for (const Stream* const stream : running_) {
        for (std::size_t i = 0; i < rows.size(); ++i) {
          rows[i] *= 1 - stream->keep[first * experts_ + i];
        }
      }
      for (float& each : rows) each = 1 - each;
    }
    return {.first_layer = LayerIdx{static_cast<std::int32_t>(first)}, .scores = rows};
  }

  ForecastTables t_;
  std::size_t layers_;
  std::size_t experts_;
  std::size_t top_k_;
  std::size_t prompt_tokens_;
  AlikeTokens alike_;
  ForecastHead head_;

  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Stream*> running_;  // of the step, in order of its rows
  const Stream* latest_ = nullptr;
  std::int64_t step_ = 0;
  std::int64_t tokens_ = 1;  // of each request in the step
  std::int32_t next_layer_ = 0;
  bool scored_ = false;  // the call's own layer

  std::vector<float> worth_;  // [window + 1, discounts]
  // Of a call.
  std::vector<float> features_;  // [F + R, E]
  std::vector<float> followed_;  // [E, window + 1], weight of similar tokens by next use
  std::vector<std::int32_t> ids_;
  std::vector<float> weights_;
  std::vector<float> keep_;
  std::vector<float> not_used_;
  std::vector<std::int32_t> late_ids_;  // [B, shown, S, K]
  std::vector<float> late_weights_;
};

}  // namespace

std::unique_ptr<Scorer> make_forecast_scorer(ForecastTables tables) {
  return std::make_unique<ForecastScorer>(std::move(tables));
}

}  // namespace sluice
