#include "engine/compute.h"

#include <string>

#include "base/error.h"

namespace sluice {

void call_back(const ExpertCallback& callback, const char* what, const ForwardArgs& args,
               const StoredLayer& layer, std::int64_t rows, std::int64_t in_columns,
               std::int64_t out_columns, const void* in, void* out) {
  const int code = callback(args.layer, args.activations, rows, in_columns, out_columns, in, out);
  require<InternalError>(code == 0, [&] {
    return "forward of " + layer.name + ": the " + what + " gave code " + std::to_string(code) +
           ", expected 0";
  });
}

}  // namespace sluice
