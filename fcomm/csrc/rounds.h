// Every collective is a number of rounds of filling this rank's slot and draining its peers'.
#pragma once

#include <algorithm>

#include "comm.h"

namespace fcomm {

// What a call asks for, in one word: compared before anybody reads a peer's slot.
enum class Kind : std::uint8_t {
  kAllReduce, kReduce, kScan, kReduceScatter, kAllGather, kGather, kScatter, kAllToAll, kAllToAllv, kBroadcast, kPermute,
  kBarrier,
};

inline bool is_rank(const fcomm_comm &c, int root) { return root >= 0 && root < c.size; }

inline std::uint64_t fingerprint(Kind kind, std::uint64_t tag, std::size_t nbytes, int dtype = 0, int op = 0,
                                 int option = 0) {
  const std::uint64_t what = std::uint64_t(kind) | std::uint64_t(dtype) << 8 | std::uint64_t(op) << 16 |
                             std::uint64_t(std::uint32_t(option)) << 32;
  return mix(mix(tag, what), nbytes);
}

// fill(k) writes slot_bytes, the same at all ranks, of this rank's slot of round filling(c); drain(k) reads the peers'
// slots of round c.round. At least one round runs, so that the ranks meet and compare fingerprints even when there is
// nothing to move.
template <class Fill, class Drain>
fcomm_status rounds(fcomm_comm &c, std::uint64_t fingerprint, std::size_t n, std::size_t slot_bytes, Fill fill,
                    Drain drain, bool opened = false) {
  for (std::size_t k = 0; k == 0 || k < n; ++k) {
    FCOMM_FAULT(c, "fill");
    c.slots.open(filling(c), slot_bytes);
    fill(k);
    if (const fcomm_status s = opened || k ? next_round(c) : open_round(c, fingerprint)) return s;
    FCOMM_FAULT(c, "drain");
    drain(k);
  }
  return FCOMM_OK;
}

// Piece k of n bytes cut into pieces of `piece`.
struct Span {
  std::size_t at, nbytes;
};
inline Span span(std::size_t nbytes, std::size_t piece, std::size_t k) {
  const std::size_t at = std::min(k * piece, nbytes);
  return {at, std::min(piece, nbytes - at)};
}
inline std::size_t pieces(std::size_t nbytes, std::size_t piece) { return (nbytes + piece - 1) / piece; }

// Bytes of a slot that one round of a message uses: long enough to hide the round's synchronisation, short enough that
// copying in, reducing and copying out overlap among the ranks and that slots stay in the second-level cache.
inline std::size_t chunk_bytes(std::size_t nbytes) {
  constexpr std::size_t kLeast = 128 << 10, kRounds = 8;
  return std::clamp(round_up(nbytes / kRounds, 64), kLeast, kChunkBytes);
}

// The same, divided among all ranks: whole lines, so whole elements.
inline std::size_t part_bytes(const fcomm_comm &c, std::size_t total) {
  return chunk_bytes(total) / std::size_t(c.size) / 64 * 64;
}

// Results that no cache would hold until they are read are written past the caches. The caches then keep the slots, and
// a line that is written whole need not be read first. `touched` is how much one rank reads and writes.
bool past_caches(const fcomm_comm &c, std::size_t touched);

}  // namespace fcomm
