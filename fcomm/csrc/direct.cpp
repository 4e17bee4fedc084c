#include "direct.h"

#include <errno.h>
#include <sys/uio.h>

#include <bit>
#include <cstdlib>

#include "pool.h"

namespace fcomm {
namespace {

constexpr int kSegments = 64;
// The most that one system call moves: between calls we check whether a peer has failed.
constexpr std::size_t kMostBytes = 1 << 20;
// What a rank offers if nobody writes to its result, and what rank 0 offers if the call is to go through slots, in two
// phases or in one. All other values are addresses, or 0 for none.
constexpr std::uint64_t kNothing = 1, kThroughSlots = 2, kInOnePhase = 3;

iovec segment(char *at, std::size_t nbytes) { return {at, nbytes}; }

// Bytes [at, at + nbytes) of a block as segments; returns how many bytes the segments that fit hold.
std::size_t segments(const Block &block, std::size_t at, std::size_t nbytes, iovec *to, int &n) {
  if (block.contiguous()) {
    to[0] = segment(block.base + at, nbytes), n = 1;
    return nbytes;
  }
  std::size_t row = at / block.width, column = at % block.width, held = 0;
  for (n = 0; n < kSegments && held < nbytes; ++n, ++row, column = 0) {
    const std::size_t m = std::min(nbytes - held, block.width - column);
    to[n] = segment(block.base + row * block.pitch + column, m);
    held += m;
  }
  return held;
}

void offer(fcomm_comm &c, std::uint64_t word) { c.control(c.rank).offer[filling(c) & 1] = word; }

std::uint64_t offered(const fcomm_comm &c, int p, std::uint32_t round) { return c.control(p).offer[round & 1]; }

std::uint64_t greeting(const fcomm_comm &c, int rank) { return mix(c.header().nonce, std::uint64_t(rank)); }

// Whether we may read and write the memory of the process that calls itself rank p, and whether it is that rank: in
// another namespace, a process id means another process.
bool knows(const fcomm_comm &c, int p, std::uint64_t address) {
  const pid_t pid = c.control(p).pid;
  std::uint64_t word = 0;
  const iovec here = segment(reinterpret_cast<char *>(&word), sizeof word);
  const iovec there = segment(reinterpret_cast<char *>(address), sizeof word), nowhere = segment(nullptr, sizeof word);
  if (process_vm_readv(pid, &here, 1, &there, 1, 0) != sizeof word || word != greeting(c, p)) return false;
  return process_vm_writev(pid, &here, 1, &nowhere, 1, 0) < 0 && errno == EFAULT;  // permitted, if there were memory
}

// FCOMM_TEST_DIRECT: "always" (whatever a message's size and wherever its result lies), or the rank that refuses.
[[maybe_unused]] const char *test_direct() { return std::getenv("FCOMM_TEST_DIRECT"); }

bool always() {
#ifdef FCOMM_TESTING
  return test_direct() && !std::strcmp(test_direct(), "always");
#else
  return false;
#endif
}

bool refused([[maybe_unused]] const fcomm_comm &c) {
#ifdef FCOMM_TESTING
  return test_direct() && !always() && std::atoi(test_direct()) == c.rank;
#else
  return false;
#endif
}

}  // namespace

bool Direct::pays(std::size_t nbytes, std::size_t row_bytes) {
  // Below these a slot is as fast: each row is a segment of its own, whose pages the kernel must look up.
  constexpr std::size_t kLeast = 32 << 10, kLeastRow = 16 << 10;
  return always() || (nbytes >= kLeast && row_bytes >= kLeastRow);
}

fcomm_status Direct::introduce(std::uint64_t fingerprint, bool &opened) {
  fcomm_comm &c = c_;
  c.greeting = greeting(c, c.rank);
  offer(c, reinterpret_cast<std::uint64_t>(&c.greeting));
  if (const fcomm_status s = open_round(c, fingerprint)) return s;
  opened = true;
  bool all = !refused(c);
  for (int p = 0; p < c.size; ++p)
    if (p != c.rank) all = all && knows(c, p, offered(c, p, c.round));
  offer(c, all);
  if (const fcomm_status s = next_round(c)) return s;
  for (int p = 0; p < c.size; ++p) all = all && offered(c, p, c.round);
  c.direct = all ? Permission::kYes : Permission::kNo;
  return FCOMM_OK;
}

fcomm_status Direct::agree(std::uint64_t fingerprint, int what, std::size_t nbytes, bool could, bool receives,
                           bool &opened, int ways) {
  fcomm_comm &c = c_;
  if (!could || c.direct == Permission::kNo) return FCOMM_OK;
  if (c.direct == Permission::kUnknown) {
    if (const fcomm_status s = introduce(fingerprint, opened)) return s;
    if (c.direct == Permission::kNo) return FCOMM_OK;
  }
  const bool may = !receives || pool_holds(result_) || always();
  std::uint64_t word = !may ? 0 : receives ? reinterpret_cast<std::uint64_t>(result_) : kNothing;
  if (c.rank == 0) {
    ways_ = &c.ways[{what, std::bit_width(nbytes)}];
    nbytes_ = nbytes;
    const Way wanted = ways_->next(ways);
    if (!always() && wanted != kDirect) word = wanted == kOnePhase ? kInOnePhase : kThroughSlots;
  }
  offer(c, word);
  if (const fcomm_status s = opened ? next_round(c) : open_round(c, fingerprint)) return s;
  opened = asked_ = true;
  round_ = c.round;
  const std::uint64_t first = offered(c, 0, round_);
  bool all = first != kThroughSlots && first != kInOnePhase;
  for (int p = 0; p < c.size; ++p) all = all && offered(c, p, round_);
  way_ = all ? kDirect : first == kInOnePhase ? kOnePhase : kSlots;
  if (ways_) start_ = now_ns();
  return FCOMM_OK;
}

fcomm_status Direct::write(int p, const Block &here, const Block &from) {
  fcomm_comm &c = c_;
  Block to = here;
  to.base = reinterpret_cast<char *>(offered(c, p, round_)) + (here.base - result_);
  for (std::size_t at = 0; at < from.nbytes();) {
    if (const fcomm_status s = look_for_poison(c)) return s;
    FCOMM_FAULT(c, "write");
    iovec local[kSegments], remote[kSegments];
    int locals, remotes;
    std::size_t n = std::min(kMostBytes, from.nbytes() - at);
    n = segments(from, at, n, local, locals);
    n = segments(to, at, n, remote, remotes);
    segments(from, at, n, local, locals);  // again: the side that ran out of room first decides
    const ssize_t written = process_vm_writev(c.control(p).pid, local, locals, remote, remotes, 0);
    if (written <= 0) {
      // A peer that gave up said so before it took its block away.
      if (const fcomm_status s = look_for_poison(c)) return s;
      return poison(c, errno == ESRCH ? FCOMM_DIED : FCOMM_SYSTEM, p, c.round);
    }
    at += std::size_t(written);
  }
  return FCOMM_OK;
}

fcomm_status Direct::end(fcomm_status status) {
  if (agreed() && status) pool_abandon(result_);
  // Written results end with a round. Slots need none, but would look faster without it.
  if (asked_ && !agreed() && !status) status = next_round(c_);
  if (ways_ && !status) ways_->learn(way_, double(now_ns() - start_) / double(nbytes_ + 1));
  return status;
}

}  // namespace fcomm
