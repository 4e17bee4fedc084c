// The layout of the shared region. Every rank derives all offsets from the group's size only; nothing read from a peer
// is ever used as an index or a bound.
//
//   Header | Control[size] | per rank: Slots | per ordered pair: Ring
//
// One protocol serves every collective. A call is a sequence of rounds. In round r a rank fills its own slot, publishes
// r in its control line, waits until every peer has published r, and reads the peers' slots of that round. Two slots
// that do not overlap suffice: a rank that fills one in round r + 2 has seen every peer publish r + 1, and a peer
// publishes r + 1 only after it has read what it needs of round r. The same argument covers the fingerprint beside the
// flag. tests/protocol_model.py walks every interleaving of this protocol.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "fcomm.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace fcomm {

// Two x86 lines (the prefetcher fetches pairs) and one line of the aarch64 machines that have large ones.
constexpr std::size_t kLine = 128;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kChunkBytes = 512 << 10;           // the most of a message that one round takes
constexpr std::size_t kSlotBytes = kChunkBytes * 3 / 2;  // with this rank's share of the previous chunk
constexpr std::size_t kSmallSlotBytes = 4 << 10;
constexpr std::size_t kSlotsBytes = 3 << 20;  // a few second-level caches
constexpr std::uint64_t kMagic = 0x31304d4d4f4346ull;  // "FCOMM01"

constexpr int kRingPieces = 4;
constexpr std::size_t kPieceBytes = 64 << 10;

using Flag = std::atomic<std::uint32_t>;  // 32 bits: a futex word
static_assert(Flag::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free,
              "shared flags must not hide a lock");

struct Header {
  std::uint64_t magic, layout, nonce;
  std::uint32_t size, first_round;
  // reason 8, culprit 12, reporter 12, round 32 bits: one word, so that the first writer wins it whole.
  alignas(kLine) std::atomic<std::uint64_t> poison;
};

// A rank that closes the group takes part in no further collective and receives nothing more (kLeaving), but first
// delivers what it still has to send; then it is gone (kGone).
constexpr std::uint32_t kStays = 0, kLeaving = 1, kGone = 2;

struct Control {
  alignas(kLine) Flag round;     // the last round published; it wraps, so compare by signed difference
  std::uint64_t fingerprint[2];  // of the call that the round of this parity opened
  std::uint64_t offer[2];        // an address in this rank's memory, see direct.h
  alignas(kLine) Flag waiters;   // ranks asleep on `round`
  Flag left;                     // kStays, kLeaving or kGone
  std::int32_t pid;
  alignas(kLine) Flag described;
  char description[FCOMM_TEXT_BYTES - sizeof(Flag)];
};

struct Piece {
  std::uint64_t message_nbytes;  // with the signature, on a message's first piece
  fcomm_signature signature;
  alignas(kLine) char data[kPieceBytes];
};

// One writer, one reader: pieces tail .. head - 1 are full.
struct Ring {
  alignas(kLine) Flag head;     // the writer's
  alignas(kLine) Flag tail;     // the reader's
  Flag reading;                 // the reader is inside recv(): worth waiting for
  alignas(kLine) Flag waiters;  // readers asleep on `head`
  alignas(kPage) Piece pieces[kRingPieces];
};

constexpr std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// A rank's share of an all_reduce chunk: whole lines of 64 bytes, so that shares hold whole elements.
constexpr std::size_t share_bytes(std::size_t chunk, int size) {
  return round_up((chunk + std::size_t(size) - 1) / std::size_t(size), 64);
}

// Where the slots of the last two rounds lie in each rank's kSlotsBytes. It is the same on all ranks, since they make
// the same rounds of the same sizes. Slots walk through all of it, because a line that the peer read last is five times
// slower to write than one that has left the peer's cache in the meantime (notes/0031). Small ones stay in one place:
// they are bound by latency.
class Slots {
 public:
  void open(std::uint32_t round, std::size_t nbytes) {
    if (nbytes <= kSmallSlotBytes) {
      at_[round & 1] = (round & 1) * kSmallSlotBytes;
      return;
    }
    // After wrapping to the start, the previous slot begins at least a slot's length from there.
    if (end_ + nbytes > kSlotsBytes) end_ = 2 * kSmallSlotBytes;
    at_[round & 1] = end_;
    end_ = round_up(end_ + nbytes, kLine);
  }
  std::size_t operator[](std::uint32_t round) const { return at_[round & 1]; }

 private:
  std::size_t at_[2] = {0, kSmallSlotBytes}, end_ = 2 * kSmallSlotBytes;
};
static_assert(kSlotsBytes >= 3 * (kSlotBytes + kLine) + 2 * kSmallSlotBytes);

struct Layout {
  int size;
  constexpr std::size_t control() const { return round_up(sizeof(Header), kPage); }
  constexpr std::size_t slots() const { return control() + round_up(sizeof(Control) * std::size_t(size), kPage); }
  constexpr std::size_t rings() const { return slots() + std::size_t(size) * kSlotsBytes; }
  constexpr std::size_t bytes() const { return rings() + std::size_t(size) * std::size_t(size) * sizeof(Ring); }
  // Differs between builds that would disagree about any offset.
  constexpr std::uint64_t hash() const {
    return (((sizeof(Header) * 31 + sizeof(Control)) * 31 + sizeof(Ring)) * 31 + kSlotsBytes) * 31 + FCOMM_ABI;
  }
};

static_assert(sizeof(Header) == 2 * kLine && offsetof(Header, poison) == kLine);
static_assert(offsetof(Control, fingerprint) == 8 && offsetof(Control, waiters) == kLine);
static_assert(offsetof(Control, described) == 2 * kLine && sizeof(Control) == 2 * kLine + FCOMM_TEXT_BYTES);
static_assert(offsetof(Ring, pieces) == kPage && sizeof(Piece) == round_up(sizeof(Piece), kLine));

}  // namespace fcomm
