// Shuffles, votes and ldmatrix.

#include <bit>
#include <cstring>
#include <utility>

#include "tests/emulation/block.h"
#include "tests/emulation/checks.h"

namespace simt {
namespace {

struct ShuffleLane {
  std::uint64_t value, result;
  Shuffle kind;
  int argument, width;
  Site site;
};

// PTX ISA, "shfl.sync": a source outside of the lane's segment leaves the lane its own value.
int source_lane(int lane, const ShuffleLane& shuffle) {
  const int first = lane & ~(shuffle.width - 1);
  const int end = first + shuffle.width;
  int source = lane;
  switch (shuffle.kind) {
    case Shuffle::kIndex:
      return first + (shuffle.argument & (shuffle.width - 1));
    case Shuffle::kUp:
      source = lane - shuffle.argument;
      break;
    case Shuffle::kDown:
      source = lane + shuffle.argument;
      break;
    case Shuffle::kXor:
      source = lane ^ shuffle.argument;
      return source < end ? source : lane;  // segments below may be read
  }
  return source < first || source >= end ? lane : source;
}

void exchange(void* const* lanes, unsigned mask) {
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    auto& mine = *static_cast<ShuffleLane*>(lanes[lane]);
    const int source = source_lane(lane, mine);
    if ((mask >> source & 1) == 0) {
      fail(mine.site, [&] {
        return "shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
               ", which is not in the mask";
      });
    }
    mine.result = static_cast<const ShuffleLane*>(lanes[source])->value;
  }
}

struct VoteLane {
  bool predicate;
  unsigned ballot;
};

void count(void* const* lanes, unsigned mask) {
  unsigned ballot = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (static_cast<const VoteLane*>(lanes[lane])->predicate) ballot |= 1u << lane;
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    static_cast<VoteLane*>(lanes[std::countr_zero(rest)])->ballot = ballot;
  }
}

struct MatrixLane {
  Fiber* fiber;
  const void* row;
  std::uint32_t* result;
  bool transpose;
  Site site;
};

void load_matrices(void* const* lanes, unsigned /*mask*/) {
  std::uint16_t matrices[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& payload = *static_cast<const MatrixLane*>(lanes[lane]);
    // The lane that names the address is the one that reads, to the checks and in a report.
    Fiber* const last = std::exchange(current, payload.fiber);
    if (!is_shared(*current->block, payload.row)) {
      fail(payload.site, [&] {
        return "ldmatrix: got " + describe_for_kernel(payload.row) + ", expected shared memory";
      });
    }
    check_alignment("ldmatrix", payload.row, 16, payload.site);
    if (checked()) check_access(payload.row, 16, Access::kRead);
    std::memcpy(matrices[lane / 8][lane % 8], payload.row, 16);
    current = last;
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& payload = *static_cast<const MatrixLane*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m) {
      const auto& matrix = matrices[m];
      const std::uint32_t low = payload.transpose ? matrix[pair][group] : matrix[group][pair];
      const std::uint32_t high =
          payload.transpose ? matrix[pair + 1][group] : matrix[group][pair + 1];
      payload.result[m] = low | high << 16;
    }
  }
}

}  // namespace

std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, int argument, int width,
                      Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(site, [&] {
      return "shuffle: got width " + std::to_string(width) + ", expected a power of two up to 32";
    });
  }
  ShuffleLane lane{.value = value,
                   .result = value,
                   .kind = kind,
                   .argument = argument,
                   .width = width,
                   .site = site};
  meet(Collective::kShuffle, mask, &lane, exchange, site);
  return lane.result;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Site site) {
  VoteLane lane{.predicate = predicate, .ballot = 0};
  meet(Collective::kVote, mask, &lane, count, site);
  switch (kind) {
    case Vote::kBallot:
      return lane.ballot;
    case Vote::kAny:
      return lane.ballot != 0 ? 1 : 0;
    case Vote::kAll:
      return lane.ballot == mask ? 1 : 0;
  }
  return 0;
}

void ldmatrix_x4(std::uint32_t (&rows)[4], const void* address, bool transpose, Site site) {
  MatrixLane lane{
      .fiber = current, .row = address, .result = rows, .transpose = transpose, .site = site};
  meet(Collective::kLdmatrix, ~0u, &lane, load_matrices, site);
}

}  // namespace simt
