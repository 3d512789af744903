#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "engine/scorer.h"

namespace sluice::bindings {

/// A scorer of tables that Python names: "pairs", "gates" or "forecast".
/// Errors: ConfigError on another kind, or naming the table that is missing or does not fit.
[[nodiscard]] std::unique_ptr<Scorer> make_scorer(const std::string& kind,
                                                  const pybind11::dict& tables);

}  // namespace sluice::bindings
