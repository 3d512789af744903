#include "predict/tables.h"

#include <string>
#include <utility>

#include "base/error.h"

namespace sluice {

void check_size(const char* name, std::size_t got, std::int64_t expected) {
  require<ConfigError>(std::cmp_equal(got, expected), [&] {
    return std::string("scorer: got ") + std::to_string(got) + " values of " + name +
           ", expected " + std::to_string(expected);
  });
}

void append_guesses(std::span<const float> not_used, float least, LayerIdx layer,
                    std::int32_t layers_ahead, std::vector<LayerGuess>& guesses) {
  for (std::size_t e = 0; e < not_used.size(); ++e) {
    const float probability = 1.0F - not_used[e];
    if (probability < least) continue;
    guesses.push_back({.key = {layer, ExpertIdx{static_cast<std::int32_t>(e)}},
                       .probability = probability,
                       .layers_ahead = layers_ahead});
  }
}

}  // namespace sluice
