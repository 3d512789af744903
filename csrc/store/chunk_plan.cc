#include "store/chunk_plan.h"

#include <algorithm>

namespace sluice {
namespace {

class Planner {
 public:
  Planner(DType layout_dtype, std::size_t chunk_bytes, ChunkPlan& plan)
      : layout_dtype_(layout_dtype), chunk_bytes_(chunk_bytes), plan_(plan) {}

  void add(const Piece& piece) {
    std::uint64_t done = 0;
    while (done < piece.bytes) {
      const std::uint64_t at = piece.offset + done;
      if (open() && !joins(piece, at)) finish();
      if (!open()) begin(piece, at);
      std::uint64_t take = fit(piece, done, room(at), false);
      if (take == 0 && chunk_.num_parts > 0) {  // nothing of it fits behind the others
        finish();
        continue;
      }
      // An empty chunk takes at least one element, though it straddle a block.
      if (take == 0) take = fit(piece, done, room(at), true);
      if (take == 0) take = fit(piece, done, chunk_bytes_, true);
      append(piece, done, take);
      done += take;
    }
  }

  void finish() {
    if (chunk_.num_parts > 0) {
      const Scatter& first = plan_.parts[chunk_.first_part];
      chunk_.straight =
          chunk_.file != FileIdx::kMemory && chunk_.num_parts == 1 &&
          first.transform == Piece::Transform::kCopy && chunk_.offset % kDirectAlignment == 0 &&
          chunk_.bytes % kDirectAlignment == 0 && first.target % kDirectAlignment == 0;
      plan_.chunks.push_back(chunk_);
    }
    open_ = false;
  }

 private:
  [[nodiscard]] bool open() const { return open_; }
  [[nodiscard]] bool in_memory() const { return chunk_.file == FileIdx::kMemory; }

  [[nodiscard]] bool joins(const Piece& piece, std::uint64_t at) const {
    if (piece.file != chunk_.file) return false;
    if (in_memory()) return true;
    // Not before its first byte: a piece whose source overlaps the last one's begins anew.
    return at >= chunk_.offset && at < chunk_.offset + chunk_.bytes + kJoinGapBytes;
  }

  void begin(const Piece& piece, std::uint64_t at) {
    chunk_ = ReadChunk{};
    chunk_.file = piece.file;
    chunk_.first_part = plan_.parts.size();
    chunk_.offset = piece.file == FileIdx::kMemory ? 0 : at;
    open_ = true;
  }

  // Source bytes from `at` that the open chunk may still take.
  [[nodiscard]] std::uint64_t room(std::uint64_t at) const {
    if (in_memory()) return chunk_bytes_ - chunk_.payload_bytes;
    const std::uint64_t limit = align_down(chunk_.offset + chunk_bytes_, kDirectAlignment);
    return limit > at ? limit - at : 0;
  }

  // How many of the next bytes of `piece` go into `room`: whole elements; of a transpose whole
  // rows, the rest of a begun one, or (`split_row`) a part of one.
  [[nodiscard]] std::uint64_t fit(const Piece& piece, std::uint64_t done, std::uint64_t room,
                                  bool split_row) const {
    const std::uint64_t left = std::min<std::uint64_t>(piece.bytes - done, room);
    if (piece.transform == Piece::Transform::kCopy) return left;
    const std::size_t element = element_bytes(dtype_of(piece));
    if (piece.transform == Piece::Transform::kWiden) return left - left % element;
    const std::uint64_t row = static_cast<std::uint64_t>(piece.columns) * element;
    const std::uint64_t begun = done % row;
    if (begun != 0) return std::min(left - left % element, row - begun);
    const std::uint64_t whole_rows = left - left % row;
    return whole_rows > 0 || !split_row ? whole_rows : left - left % element;
  }

  [[nodiscard]] DType dtype_of(const Piece& piece) const {
    return piece.transform == Piece::Transform::kWiden ? piece.dtype : layout_dtype_;
  }

  void append(const Piece& piece, std::uint64_t done, std::uint64_t take) {
    Scatter part;
    part.source = piece.offset + done;
    part.bytes = static_cast<std::uint32_t>(take);
    part.transform = piece.transform;
    part.dtype = dtype_of(piece);
    if (piece.transform == Piece::Transform::kTranspose) {
      const std::size_t element = element_bytes(part.dtype);
      const std::uint64_t row_bytes = static_cast<std::uint64_t>(piece.columns) * element;
      const std::uint64_t row = done / row_bytes;
      const std::uint64_t column = done % row_bytes / element;
      const bool whole = take % row_bytes == 0 && column == 0;
      part.rows = whole ? static_cast<std::uint32_t>(take / row_bytes) : 1;
      part.columns = static_cast<std::uint32_t>(whole ? static_cast<std::uint64_t>(piece.columns)
                                                      : take / element);
      part.target_stride = static_cast<std::uint32_t>(piece.rows);
      part.target =
          piece.target_offset + (column * static_cast<std::uint64_t>(piece.rows) + row) * element;
    } else {
      part.target = piece.target_offset + target_bytes(part.transform, part.dtype, done);
    }
    if (!in_memory()) {
      const std::uint64_t end = std::max(chunk_.offset + chunk_.bytes, part.source + take);
      chunk_.bytes = static_cast<std::uint32_t>(end - chunk_.offset);
    }
    chunk_.payload_bytes += part.bytes;
    ++chunk_.num_parts;
    plan_.parts.push_back(part);
  }

  DType layout_dtype_;
  std::uint64_t chunk_bytes_;
  ChunkPlan& plan_;
  ReadChunk chunk_;
  bool open_ = false;
};

}  // namespace

void append_chunks(std::span<const Piece> pieces, DType layout_dtype, std::size_t chunk_bytes,
                   ChunkPlan& plan) {
  std::vector<Piece> ordered(pieces.begin(), pieces.end());
  std::sort(ordered.begin(), ordered.end(), [](const Piece& a, const Piece& b) {
    if (a.file != b.file) return a.file < b.file;
    if (a.file != FileIdx::kMemory && a.offset != b.offset) return a.offset < b.offset;
    return a.target_offset < b.target_offset;  // unique: targets do not overlap
  });
  Planner planner(layout_dtype, chunk_bytes, plan);
  for (const Piece& piece : ordered) planner.add(piece);
  planner.finish();
}

}  // namespace sluice
