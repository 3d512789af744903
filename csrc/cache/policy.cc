#include "cache/policy.h"

#include <array>
#include <charconv>
#include <cmath>

#include "cache/policies.h"

namespace sluice {
namespace {

constexpr double kHalfLifeSteps = 16;
constexpr std::string_view kDecayedLfu = "decayed-lfu";

struct Family {
  std::string_view name;
  std::unique_ptr<Policy> (*make)(PolicyShape shape);
};
constexpr std::array kFamilies = {
    Family{kDecayedLfu, [](PolicyShape s) { return make_decayed_lfu_policy(s, kHalfLifeSteps); }},
    Family{"edge", [](PolicyShape s) { return make_edge_policy(s, EdgeFormula::kOurs); }},
    Family{"edge:printed",
           [](PolicyShape s) { return make_edge_policy(s, EdgeFormula::kPrinted); }},
    Family{"fifo", &make_fifo_policy},
    Family{"forecast", [](PolicyShape s) { return make_forecast_policy(s, true); }},
    Family{"forecast:always", [](PolicyShape s) { return make_forecast_policy(s, false); }},
    Family{"least-stale", &make_least_stale_policy},
    Family{"lfru", &make_lfru_policy},
    Family{"lfu", &make_lfu_policy},
    Family{"lru", &make_lru_policy},
    Family{"plec", &make_plec_policy},
    Family{"s3-fifo", &make_s3_fifo_policy},
    Family{"static", &make_static_policy},
};

double parse_half_life(std::string_view name, std::string_view digits) {
  double steps = 0;
  const auto [end, failure] = std::from_chars(digits.data(), digits.data() + digits.size(), steps);
  require<ConfigError>(failure == std::errc() && end == digits.data() + digits.size() &&
                           std::isfinite(steps) && steps >= 1e-3 && steps <= 1e9,
                       [&] {
                         return "policy: got \"" + std::string(name) +
                                "\", expected a half-life between 0.001 and 1e9 steps after the "
                                "colon; write \"decayed-lfu:16\"";
                       });
  return steps;
}

}  // namespace

std::unique_ptr<Policy> make_policy(std::string_view name, PolicyShape shape) {
  require<ConfigError>(shape.num_layers > 0 && shape.max_experts > 0 && shape.num_slots > 0, [&] {
    return "policy: got a model of " + std::to_string(shape.num_layers) + " layers with " +
           std::to_string(shape.max_experts) + " experts and " + std::to_string(shape.num_slots) +
           " slots, expected at least one of each";
  });
  for (const Family& family : kFamilies) {
    if (name == family.name) return family.make(shape);
  }
  if (name.starts_with(kDecayedLfu) && name[kDecayedLfu.size()] == ':')
    return make_decayed_lfu_policy(shape,
                                   parse_half_life(name, name.substr(kDecayedLfu.size() + 1)));
  std::string known;
  for (const std::string& each : policy_names()) known += (known.empty() ? "" : ", ") + each;
  throw ConfigError("policy: got \"" + std::string(name) + "\", expected one of " + known);
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const Family& family : kFamilies) names.emplace_back(family.name);
  return names;
}

}  // namespace sluice
