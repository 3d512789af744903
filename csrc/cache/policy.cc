#include "cache/policy.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <numeric>

#include "cache/policies.h"

namespace sluice {
namespace {

constexpr double kHalfLifeSteps = 16;
constexpr std::string_view kDecayedLfu = "decayed-lfu";
constexpr std::array<std::string_view, 5> kNames = {"decayed-lfu", "edge", "edge:printed", "lru",
                                                    "static"};

/// Levenshtein's distance, for "did you mean".
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

std::string_view nearest_name(std::string_view name) {
  // The name comes from the user: a long one must not cost a long search.
  const std::string_view head = name.substr(0, 64);
  return *std::min_element(kNames.begin(), kNames.end(), [&](auto a, auto b) {
    return edit_distance(head, a) < edit_distance(head, b);
  });
}

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
  throw ConfigError("policy: got \"" + std::string(name) + "\", expected one of " + known +
                    "; did you mean \"" + std::string(nearest_name(name)) + "\"?");
}

std::vector<std::string> policy_names() { return {kNames.begin(), kNames.end()}; }

}  // namespace sluice
