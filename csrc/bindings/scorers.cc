#include "bindings/scorers.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "engine/grouping.h"
#include "predict/scorers.h"

namespace sluice::bindings {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::vector<T> table(const py::dict& tables, const char* name) {
  const auto array = field<Array<T>>(tables, name);
  return {array.data(), array.data() + array.size()};
}

std::unique_ptr<Scorer> gate_scorer(const py::dict& tables) {
  return make_gate_scorer({.num_layers = field<std::int32_t>(tables, "num_layers"),
                           .num_experts = field<std::int32_t>(tables, "num_experts"),
                           .width = field<std::int32_t>(tables, "width"),
                           .max_layers = field<std::int32_t>(tables, "max_layers"),
                           .top_k = field<std::int32_t>(tables, "top_k"),
                           .gate = table<float>(tables, "gate"),
                           .bias = table<float>(tables, "bias"),
                           .correction = table<float>(tables, "correction"),
                           .scale = table<float>(tables, "scale"),
                           .shift = table<float>(tables, "shift"),
                           .sigmoid = table<std::uint8_t>(tables, "sigmoid"),
                           .centred = table<std::uint8_t>(tables, "centred"),
                           .ids = table<std::int64_t>(tables, "ids"),
                           .means = table<std::uint16_t>(tables, "means"),
                           .curves = table<float>(tables, "curves")});
}

ForecastHeadTables head_tables(const py::dict& tables) {
  return {.hidden = field<std::int32_t>(tables, "hidden"),
          .units = field<std::int32_t>(tables, "units"),
          .prefix = table<float>(tables, "prefix"),
          .own = table<float>(tables, "own"),
          .bias = table<float>(tables, "bias"),
          .place = table<float>(tables, "place"),
          .position = table<float>(tables, "position"),
          .place_bias = table<float>(tables, "place_bias"),
          .certain = table<float>(tables, "certain"),
          .gate = table<float>(tables, "gate"),
          .expert_in = table<float>(tables, "expert_in"),
          .expert_in_bias = table<float>(tables, "expert_in_bias"),
          .out = table<float>(tables, "out"),
          .out_bias = table<float>(tables, "out_bias"),
          .expert_out = table<float>(tables, "expert_out"),
          .expert_out_bias = table<float>(tables, "expert_out_bias")};
}

std::unique_ptr<Scorer> forecast_scorer(const py::dict& tables) {
  return make_forecast_scorer(
      {.num_layers = field<std::int32_t>(tables, "num_layers"),
       .num_experts = field<std::int32_t>(tables, "num_experts"),
       .top_k = field<std::int32_t>(tables, "top_k"),
       .window = field<std::int32_t>(tables, "window"),
       .prompt_tokens = field<std::int32_t>(tables, "prompt_tokens"),
       .usage = {.half_lives = table<float>(tables, "half_lives"),
                 .never = field<float>(tables, "never")},
       .memory = {.routes = table<std::int16_t>(tables, "memory.routes"),
                  .sequence = table<std::int64_t>(tables, "memory.sequence"),
                  .recent = field<std::int32_t>(tables, "recent"),
                  .running = field<float>(tables, "running"),
                  .previous = field<float>(tables, "previous"),
                  .fade = field<float>(tables, "fade"),
                  .floor = field<float>(tables, "floor")},
       .discounts = table<float>(tables, "discounts"),
       .context = table<std::int32_t>(tables, "context"),
       .head = head_tables(tables)});
}

/// A scorer on its own, for tests and to look at.
class BareScorer {
 public:
  BareScorer(const std::string& kind, const py::dict& tables)
      : scorer_(make_scorer(kind, tables)) {}

  void begin_step(const Array<std::int64_t>& requests, std::int64_t tokens,
                  const Array<std::int64_t>& token_ids) {
    scorer_->begin_step(
        {.requests = {requests.data(), static_cast<std::size_t>(requests.size())},
         .tokens = tokens,
         .token_ids = {token_ids.data(), static_cast<std::size_t>(token_ids.size())}});
  }

  py::tuple layer(std::int32_t layer, const Array<std::int64_t>& ids, const Array<float>& weights,
                  const Array<float>& hidden) {
    const Scorer::Shape shape = scorer_->shape();
    require<ConfigError>(
        ids.ndim() == 2 && layer >= 0 && layer < shape.num_layers && weights.size() == ids.size() &&
            hidden.size() == ids.shape(0) * shape.width,
        [&] {
          return "scorer: got layer " + std::to_string(layer) + ", " + std::to_string(ids.ndim()) +
                 " dimensions of ids, " + std::to_string(weights.size()) + " weights and " +
                 std::to_string(hidden.size()) + " values of states, expected those of one call";
        });
    const ForwardArgs args{.layer = LayerIdx{layer},
                           .num_tokens = ids.shape(0),
                           .top_k = ids.shape(1),
                           .activations = DType::kF32,
                           .weights_dtype = DType::kF32,
                           .hidden = hidden.data(),
                           .expert_ids = ids.data(),
                           .weights = weights.data(),
                           .out = nullptr,
                           .stream = {}};
    Grouping grouping;
    grouping.assign(args, shape.num_experts);
    const LayerScores ranked = scorer_->rank(args);
    const auto rows =
        static_cast<py::ssize_t>(ranked.scores.size()) / std::max(shape.num_experts, 1);
    Array<float> scores({rows, static_cast<py::ssize_t>(shape.num_experts)});
    std::copy(ranked.scores.begin(), ranked.scores.end(), scores.mutable_data());
    std::vector<LayerGuess> guesses;
    scorer_->guess(args, grouping, guesses);
    std::vector<std::tuple<std::int32_t, std::int32_t, float, std::int32_t>> found;
    for (const LayerGuess& each : guesses) {
      found.emplace_back(to_int(each.key.layer), to_int(each.key.expert), each.probability,
                         each.layers_ahead);
    }
    return py::make_tuple(to_int(ranked.first_layer), scores, found);
  }

 private:
  std::unique_ptr<Scorer> scorer_;
};

}  // namespace

std::unique_ptr<Scorer> make_scorer(const std::string& kind, const py::dict& tables) {
  if (kind == "pairs") {
    return make_pair_scorer(table<float>(tables, "pairs"),
                            field<std::int32_t>(tables, "num_layers"),
                            field<std::int32_t>(tables, "num_experts"));
  }
  if (kind == "gates") return gate_scorer(tables);
  require<ConfigError>(kind == "forecast", [&] {
    return "scorer: got kind \"" + kind + "\", expected \"pairs\", \"gates\" or \"forecast\"";
  });
  return forecast_scorer(tables);
}

void bind_scorers(py::module_& m) {
  py::class_<BareScorer>(m, "Scorer", "What guesses and ranks inside of forwards, without one.")
      .def(py::init<const std::string&, const py::dict&>(), py::arg("kind"), py::arg("tables"))
      .def("begin_step", &BareScorer::begin_step, py::arg("requests"), py::arg("tokens"),
           py::arg("token_ids"),
           "The rows of the layers that follow: int64 [B], tokens of each, int64 [B x tokens] or "
           "empty.")
      .def("layer", &BareScorer::layer, py::arg("layer"), py::arg("ids"), py::arg("weights"),
           py::arg("hidden"),
           "One call of int64 [T, K], float32 [T, K] and float32 [T, H] or empty: first layer and "
           "float32 [n, E] of keep-scores; guesses as (layer, expert, probability, layers ahead).");
}

}  // namespace sluice::bindings
