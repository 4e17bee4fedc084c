// A rank's own view of a communicator, and the few steps that every collective is made of.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "fcomm.h"
#include "kernels.h"
#include "layout.h"

namespace fcomm {

// A message on its way into a ring; `sent` bytes, and the first piece's signature, are already there. The engine owns
// the bytes of queued messages.
struct Message {
  const char *data;  // from byte `begin` on
  std::size_t begin, nbytes, sent;
  fcomm_signature signature;
  bool started;
};

// How to write a slot. If the ranks' cores share a cache, by ordinary stores: the peer reads from that cache. If they
// do not, a line that the peer has read must be fetched back before it is written, four times slower than memory
// itself, so by stores past the caches. Which of the two holds changes while a program runs (a hypervisor moves its
// cores), so we measure.
struct SlotWriting {
  bool past = false;
  std::int64_t tried = 0;        // when the other way was last tried
  double ns_per_kb[2] = {0, 0};  // of either way, recently

  bool next_way(std::int64_t now) {
    constexpr std::int64_t kEvery = 8'000'000;  // only now and then: the wrong way may be ten times slower
    if (now - tried < kEvery) return past;
    tried = now;
    return !past;
  }
  void learn(bool way, double ns, std::size_t nbytes) {
    const double now = ns / (double(nbytes) / 1024);
    double &lately = ns_per_kb[way];
    lately = lately == 0 ? now : lately + (std::min(now, 2 * lately) - lately) / 4;
    // What is written past the caches is read from memory. That costs the reader 40 to 70 ns per KB if the caches are
    // shared, and nothing if they are not (notes/0031).
    constexpr double kReader = 50;
    past = ns_per_kb[0] != 0 && ns_per_kb[1] != 0 && ns_per_kb[1] + kReader < ns_per_kb[0];
  }
};

// Whether all ranks may write to one another's memory.
enum class Permission { kUnknown, kNo, kYes };

// How a large message goes: straight into the peers' results, through slots, or, for sums between two ranks, through
// slots in one phase (reduce.cpp).
enum Way { kDirect, kSlots, kOnePhase, kWays };
constexpr int kWaysOfMost = kOnePhase;  // all but the last

// Rank 0 times calls of one kind, dtype and size and decides for all: a few calls each way at first, then now and then
// a few of another way. A few, since a single one finds the caches as the other way has left them.
struct Ways {
  Way best = kDirect;
  unsigned calls = 0;
  double ns_per_byte[kWays] = {};  // recently
  Way last = kWays;                // of the call before
  unsigned in_turn = 0;            // calls in a row that went that way

  Way next(int n) {  // one of the first n ways
    constexpr unsigned kEvery = 128;
    const unsigned call = calls++, first = unsigned(n) * kFew;
    if (call < first) return Way(call / kFew);
    const unsigned since = call - first, tried = since / kEvery;
    if (since % kEvery < kEvery - kFew) return best;
    return Way((unsigned(best) + 1 + tried % unsigned(n - 1)) % unsigned(n));
  }
  void learn(Way way, double now) {  // in ns per byte
    constexpr unsigned kCold = 2;  // calls of a way that pay for the previous way
    in_turn = way == last ? in_turn + 1 : 1;
    last = way;
    if (in_turn <= kCold) return;
    double &lately = ns_per_byte[way];
    if (in_turn == kCold + 1)
      lately = now;
    else if (in_turn <= kFew)
      lately = std::min(lately, now);
    else
      lately += (std::min(now, 1.25 * lately) - lately) / 4;  // a single stop of a rank says nothing
    if (in_turn < kFew) return;
    for (int other = 0; other < kWays; ++other) {
      const double theirs = ns_per_byte[other], ours = ns_per_byte[best];
      if (theirs != 0 && (ours == 0 || theirs < 0.95 * ours)) best = Way(other);
    }
  }

 private:
  static constexpr unsigned kFew = 4;
};

}  // namespace fcomm

struct fcomm_comm {
  int rank = 0, size = 0;
  char *base = nullptr;
  bool mapped = false;  // by us, so we must unmap it
  fcomm::Layout layout{};
  std::uint32_t round = 0;  // the last one that this rank published
  std::uint64_t fingerprint = 0;
  std::int64_t timeout_ns = 0;
  int spins = 0;  // number of spins before yielding; it adapts
  fcomm::Slots slots;
  fcomm::SlotWriting writing;
  unsigned fork_generation = 0;
  bool closed = false, broken = false;
  std::atomic<std::int64_t> closing{0};  // when close() was called, perhaps by a thread other than the one that waits
  fcomm_failure failure{};
  mutable std::mutex mutex;
  std::vector<int> life;
  std::vector<std::deque<fcomm::Message>> pending;  // by destination
  int pending_count = 0;
  std::vector<bool> ring_ready;
  fcomm::Permission direct = fcomm::Permission::kUnknown;
  std::uint64_t greeting = 0;  // the peers read it to see whether they can
  std::vector<char> folded;    // a share on its way to the peers' results
  std::map<std::pair<int, int>, fcomm::Ways> ways;  // by the kind of call and the power of two of its bytes

  fcomm::Header &header() const { return *reinterpret_cast<fcomm::Header *>(base); }
  fcomm::Control &control(int r) const {
    return reinterpret_cast<fcomm::Control *>(base + layout.control())[r];
  }
  // Rank r's slot of this round or of the previous one.
  char *slot(int r, std::uint32_t at) const {
    return base + layout.slots() + std::size_t(r) * fcomm::kSlotsBytes + slots[at];
  }
  fcomm::Ring &ring(int from, int to) const {
    return *reinterpret_cast<fcomm::Ring *>(base + layout.rings() +
                                            (std::size_t(from) * std::size_t(size) + std::size_t(to)) *
                                                sizeof(fcomm::Ring));
  }
};

namespace fcomm {

// a is at or after b, on a counter that wraps
inline bool reached(std::uint32_t a, std::uint32_t b) { return std::int32_t(a - b) >= 0; }

// One call on the communicator: it holds the lock, and knows whether it may proceed.
struct Call {
  Call(fcomm_comm *comm);
  fcomm_status status;
  std::unique_lock<std::mutex> lock;
};

// The round that this rank fills next, and the end of filling it: publish, wait for all, and in the first round of a
// call compare fingerprints.
inline std::uint32_t filling(const fcomm_comm &c) { return c.round + 1; }
fcomm_status open_round(fcomm_comm &c, std::uint64_t fingerprint);
fcomm_status next_round(fcomm_comm &c);

fcomm_status look_for_poison(fcomm_comm &c);
fcomm_status poison(fcomm_comm &c, fcomm_status reason, int culprit, std::uint32_t round);

// Move buffered messages forward: those of c, whose lock the caller holds, and of every other communicator of this
// process that no other thread is in. A rank that waits on one group may be awaited on another. True if any are left.
bool progress(fcomm_comm &c);
// Whether any communicator of this process may have buffered messages.
bool in_line();
void count_in_line(int more);

// The list of this process's communicators, from attaching until closing.
void enlist(fcomm_comm &c);
void delist(fcomm_comm &c);

// Copy into a slot of our own, ready to be published.
void copy_in(fcomm_comm &c, char *to, const char *from, std::size_t nbytes);

std::int64_t now_ns();
void wake(Flag &word);
std::uint64_t mix(std::uint64_t a, std::uint64_t b);

// Wait until `word`, which `peer` advances, has reached target: spin, yield, then sleep on it in slices, watching the
// poison word, the lives of the missing ranks, the interrupt hook and the deadline. In a collective every rank that has
// not published `target` is missing; between two ranks only the peer is.
enum class Among { kAll, kTwo };
fcomm_status wait_for(fcomm_comm &c, int peer, Flag &word, Flag &waiters, std::uint32_t target, Among among);

#ifdef FCOMM_TESTING
// FCOMM_TEST_FAULT="point:rank:action[:n]": kill, stop or delay that rank when it passes the point for the n-th time.
void fault(const fcomm_comm &c, const char *point);
#define FCOMM_FAULT(c, point) fault(c, point)
#else
#define FCOMM_FAULT(c, point) static_cast<void>(0)
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace fcomm
