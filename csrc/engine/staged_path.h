#pragma once

#include <cstdint>
#include <memory>

#include "engine/host_tier.h"
#include "transfer/copy_link.h"
#include "transfer/transfer_path.h"

namespace sluice {

/// What the two hops of a staged path have moved. Exact, monotonic.
struct StagedCounters {
  std::int64_t host_hits = 0;    ///< loads whose expert the host tier held when they were asked for
  std::int64_t host_misses = 0;  ///< the others: read from the store first
  std::int64_t fill_errors = 0;  ///< experts that could not be read while nobody had asked for them
};

/// Store → host tier → device slots: two transfer engines, one behind the other.
///
/// A load whose expert is in the host tier is queued on the copy engine at once. Another one gets a
/// host slot and is queued on the store's link first; where every host slot is leased or loading it
/// waits for one, best load first. Between loads the tier fills in the order of execution, behind
/// everything that somebody asked for.
///
/// A load is cancelled at once while its bytes are on their way to the host: the read then goes on
/// as far as it has started.
class StagedPath : public TransferPath {
 public:
  [[nodiscard]] virtual StagedCounters counters() const = 0;
  [[nodiscard]] virtual CopyCounters copies() const = 0;
  [[nodiscard]] virtual HostTierProgress host_tier() const = 0;
};

struct StagedPathParts {
  std::shared_ptr<const ExpertStore> store;
  Device& device;
  const Clock& clock;
  std::unique_ptr<HostTier> host;
  std::unique_ptr<Link> store_link;
  std::size_t copy_chunk_bytes = 0;
  /// Null: the device's copy engine.
  std::unique_ptr<CopyLink> copy_link;
};
[[nodiscard]] std::unique_ptr<StagedPath> make_staged_path(StagedPathParts parts);

}  // namespace sluice
