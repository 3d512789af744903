#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace sluice {

/// Exact, monotonic counters of one session. Python's `sluice.Stats` mirrors it field by field.
struct EngineStats {
  std::int64_t forwards = 0;  ///< calls of MoE layers
  std::int64_t tokens = 0;    ///< Σ T over those calls
  std::int64_t requests = 0;  ///< per event and distinct expert; = hits + late + misses
  std::int64_t hits = 0;      ///< ready when the layer asked
  std::int64_t late = 0;      ///< on its way by a hint when the layer asked
  std::int64_t misses = 0;    ///< neither
  std::int64_t waves = 0;     ///< rounds through the slots; 1 per forward that fits
  std::int64_t evictions = 0;
  std::int64_t hints = 0;               ///< given
  std::int64_t hints_dropped = 0;       ///< refused, expired or cancelled before they were used
  std::int64_t hints_distrusted = 0;    ///< of these, refused because too few came true lately
  std::uint64_t bytes_read_demand = 0;  ///< physical bytes, by reason
  std::uint64_t bytes_read_hint_used = 0;
  std::uint64_t bytes_read_hint_wasted = 0;   ///< evicted, failed or cancelled unused
  std::uint64_t bytes_read_hint_pending = 0;  ///< landed, not asked for yet
  std::uint64_t bytes_read = 0;               ///< the sum of the four
  std::int64_t stall_ns = 0;                  ///< the caller waited for bytes
  std::int64_t demand_ns = 0;   ///< Σ over forwards of last landing − first submission
  std::int64_t compute_ns = 0;  ///< the caller spent in kernels, GEMM and combine
  std::int64_t generic_gate_calls = 0;
  std::uint64_t resident_bytes = 0;  ///< slot bytes in kReady or kLoading now
  std::uint64_t peak_resident_bytes = 0;
  std::uint64_t budget_bytes = 0;
  std::uint64_t slab_bytes = 0;       ///< allocated for slots
  std::uint64_t workspace_bytes = 0;  ///< bounce buffers, scratch, widened rows
  std::uint64_t adopted_bytes = 0;    ///< adopted experts that stay in RAM
  // Of the host tier beside an accelerator, where the bytes by reason above are what its link
  // carried; 0 without one.
  std::int64_t host_hits = 0;           ///< loads whose expert was in the host tier
  std::int64_t host_misses = 0;         ///< loads that the store was read for
  std::uint64_t store_bytes_read = 0;   ///< from files, whatever for
  std::uint64_t host_tier_bytes = 0;    ///< of its slots
  std::uint64_t host_filled_bytes = 0;  ///< of these, with an expert now
  std::uint64_t pinned_bytes = 0;       ///< of these, read by the copy engine without staging
  std::map<std::string, std::int64_t> degradations;  ///< name → count
};

}  // namespace sluice
