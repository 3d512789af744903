#include "cache/policy.h"

#include <array>
#include <charconv>
#include <cmath>

#include "cache/policies.h"

namespace sluice {
namespace {

constexpr double kHalfLifeSteps = 16;
constexpr std::string_view kDecayedLfu = "decayed-lfu";
constexpr std::array<std::string_view, 5> kNames = {"decayed-lfu", "edge", "edge:printed", "lru",
                                                    "static"};

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
  require<ConfigError>(shape.num_layers > 0 && shape.max_experts > 0, [&] {
    return "policy: got a model of " + std::to_string(shape.num_layers) + " layers with " +
           std::to_string(shape.max_experts) + " experts, expected at least one of each";
  });
  if (name == "lru") return make_lru_policy(shape);
  if (name == "static") return make_static_policy(shape);
  if (name == "edge") return make_edge_policy(shape, EdgeFormula::kOurs);
  if (name == "edge:printed") return make_edge_policy(shape, EdgeFormula::kPrinted);
  if (name == kDecayedLfu) return make_decayed_lfu_policy(shape, kHalfLifeSteps);
  if (name.starts_with(kDecayedLfu) && name[kDecayedLfu.size()] == ':')
    return make_decayed_lfu_policy(shape,
                                   parse_half_life(name, name.substr(kDecayedLfu.size() + 1)));
  std::string known;
  for (const std::string_view each : kNames)
    known += (known.empty() ? "" : ", ") + std::string(each);
  throw ConfigError("policy: got \"" + std::string(name) + "\", expected one of " + known);
}

std::vector<std::string> policy_names() { return {kNames.begin(), kNames.end()}; }

}  // namespace sluice
