#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "base/expert_layout.h"
#include "store/expert_store.h"

namespace sluice {

/// Proves one expert's pieces: each source range lies in its file (or is not null memory), shapes
/// fit lengths, targets lie in the slot and do not overlap, and every byte of every section has a
/// source. Bytes between sections may have one.
/// Errors: CheckpointError that begins with `who`.
void check_pieces(const std::string& who, const ExpertLayout& layout, std::size_t slot_bytes,
                  std::span<const Piece> pieces, std::span<const ReadFile> files);

}  // namespace sluice
