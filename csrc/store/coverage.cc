#include "store/coverage.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "store/scatter.h"

namespace sluice {
namespace {

struct Range {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

struct Section {
  const char* name;
  Range range;
};

std::string print(Range range) {
  std::string out("[");  // appended: gcc 12 warns wrongly about `"[" + to_string(...)`
  out.append(std::to_string(range.begin)).append(", ").append(std::to_string(range.end));
  return out.append(")");
}

std::vector<Section> sections_of(const ExpertLayout& layout) {
  const auto range = [](std::uint64_t offset, std::uint64_t bytes) {
    return Range{offset, offset + bytes};
  };
  std::vector<Section> sections = {{"w13", range(0, layout.w13_bytes())},
                                   {"w2", range(layout.w2_offset(), layout.w2_bytes())}};
  if (layout.has_bias) {
    sections.push_back(
        {"b13", range(layout.b13_offset(),
                      static_cast<std::uint64_t>(layout.w13_rows()) * sizeof(float))});
    sections.push_back({"b2", range(layout.b2_offset(),
                                    static_cast<std::uint64_t>(layout.hidden) * sizeof(float))});
  }
  return sections;
}

void check_source(const std::string& who, const Piece& piece, std::span<const ReadFile> files) {
  require<CheckpointError>(piece.bytes > 0,
                           [&] { return who + ": got a piece of 0 bytes, expected at least one"; });
  const auto end = checked_add(piece.offset, piece.bytes);
  if (piece.file == FileIdx::kMemory) {
    require<CheckpointError>(piece.offset != 0 && end.has_value(), [&] {
      return who + ": got a null or overflowing address, expected memory";
    });
    return;
  }
  const auto file = static_cast<std::int64_t>(piece.file);
  require<CheckpointError>(file >= 0 && static_cast<std::size_t>(file) < files.size(), [&] {
    return who + ": got file " + std::to_string(file) + ", expected one of " +
           std::to_string(files.size()) + " that were added";
  });
  const ReadFile& source = files[static_cast<std::size_t>(file)];
  require<CheckpointError>(end.has_value() && *end <= source.bytes(), [&] {
    return who + ": got " + std::to_string(piece.bytes) + " bytes at offset " +
           std::to_string(piece.offset) + " of " + source.path() + ", which has " +
           std::to_string(source.bytes()) + "; the file was cut: copy it again";
  });
}

void check_shape(const std::string& who, const Piece& piece, DType layout_dtype) {
  if (piece.transform == Piece::Transform::kWiden) {
    require<CheckpointError>(
        piece.bytes % element_bytes(piece.dtype) == 0 && piece.target_offset % sizeof(float) == 0,
        [&] {
          return who + ": got " + std::to_string(piece.bytes) + " bytes of " +
                 std::string(dtype_name(piece.dtype)) + " for offset " +
                 std::to_string(piece.target_offset) + ", expected whole elements at whole floats";
        });
  }
  if (piece.transform == Piece::Transform::kTranspose) {
    constexpr std::int64_t kMaxSide = INT32_MAX;
    const bool sane =
        piece.rows > 0 && piece.columns > 0 && piece.rows <= kMaxSide && piece.columns <= kMaxSide;
    const auto elements = sane ? checked_mul(static_cast<std::uint64_t>(piece.rows),
                                             static_cast<std::uint64_t>(piece.columns))
                               : std::nullopt;
    const auto bytes = elements ? checked_mul(*elements, element_bytes(layout_dtype)) : elements;
    require<CheckpointError>(bytes.has_value() && *bytes == piece.bytes, [&] {
      return who + ": got a transpose of [" + std::to_string(piece.rows) + ", " +
             std::to_string(piece.columns) + "] from " + std::to_string(piece.bytes) +
             " bytes, expected rows x columns x element";
    });
  }
}

}  // namespace

void check_pieces(const std::string& who, const ExpertLayout& layout, std::size_t slot_bytes,
                  std::span<const Piece> pieces, std::span<const ReadFile> files) {
  std::vector<Range> targets;
  for (const Piece& piece : pieces) {
    check_source(who, piece, files);
    check_shape(who, piece, layout.dtype);
    const std::uint64_t bytes = target_bytes(piece.transform, piece.dtype, piece.bytes);
    const auto end = checked_add(piece.target_offset, bytes);
    require<CheckpointError>(end.has_value() && *end <= slot_bytes, [&] {
      return who + ": got a piece of " + std::to_string(bytes) + " bytes for offset " +
             std::to_string(piece.target_offset) + ", expected it to end within the expert's " +
             std::to_string(slot_bytes);
    });
    targets.push_back({piece.target_offset, *end});
  }
  std::sort(targets.begin(), targets.end(), [](Range a, Range b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < targets.size(); ++i) {
    require<CheckpointError>(targets[i - 1].end <= targets[i].begin, [&] {
      return who + ": got two sources for bytes " +
             print({targets[i].begin, std::min(targets[i - 1].end, targets[i].end)}) +
             ", expected one; a tensor is mapped twice";
    });
  }
  for (const auto& [name, section] : sections_of(layout)) {
    std::uint64_t covered = section.begin;
    for (const Range& target : targets) {
      if (target.begin <= covered && covered < target.end) covered = target.end;
    }
    require<CheckpointError>(covered >= section.end, [&, section_name = name, range = section] {
      return who + ": got no source for bytes from " + std::to_string(covered) + " of " +
             section_name + " " + print(range) + ", expected every byte once; a tensor is missing";
    });
  }
}

}  // namespace sluice
