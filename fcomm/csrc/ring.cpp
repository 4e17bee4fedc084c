// send and recv: a ring of pieces for each ordered pair of ranks.
// send() never waits for a receiver that is not there, so any order of sends and receives that is correct on paper
// runs. What the ring has no room for is copied and queued; every later call on any communicator moves the queue.
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "comm.h"
#include "rounds.h"

namespace fcomm {
namespace {

// Both ends cut a message into the same pieces; the ring does not say how.
std::size_t piece_bytes(std::size_t nbytes) {
  constexpr std::size_t kLeast = 8 << 10;
  return std::clamp(round_up(nbytes / kRingPieces, 64), kLeast, kPieceBytes);
}

// Puts as many pieces into the ring as it has room for; true when the whole message is in.
bool put(fcomm_comm &c, int to, Message &m) {
  Ring &ring = c.ring(c.rank, to);
  std::uint32_t head = ring.head.load(std::memory_order_relaxed);
  while (!m.started || m.sent < m.nbytes) {
    if (head - ring.tail.load(std::memory_order_acquire) == kRingPieces) return false;
    Piece &piece = ring.pieces[head % kRingPieces];
    if (!m.started) piece.message_nbytes = m.nbytes, piece.signature = m.signature;
    const std::size_t n = std::min(piece_bytes(m.nbytes), m.nbytes - m.sent);
    if (n) std::memcpy(piece.data, m.data + (m.sent - m.begin), n);
    m.started = true, m.sent += n;
    FCOMM_FAULT(c, "piece");
    ring.head.exchange(++head, std::memory_order_seq_cst);
    if (ring.waiters.load(std::memory_order_seq_cst)) wake(ring.head);
  }
  return true;
}

// Goes on for as long as the receiver takes pieces; after a moment in which it takes none, the rest is queued.
bool put_while_read(fcomm_comm &c, int to, Message &m) {
  // Not a number of yields: on shared cores each may take milliseconds, and the reader may have died inside recv().
  constexpr std::int64_t kPatience = 20'000'000;
  const Ring &ring = c.ring(c.rank, to);
  for (std::int64_t since = now_ns(); !put(c, to, m);) {
    if (!ring.reading.load(std::memory_order_acquire)) return false;
    const std::uint32_t full = ring.head.load(std::memory_order_relaxed) - kRingPieces;
    for (int k = 0; k < c.spins && ring.tail.load(std::memory_order_acquire) == full; ++k) pause();
    if (ring.tail.load(std::memory_order_acquire) != full) {
      since = now_ns();
    } else {
      if (now_ns() - since > kPatience) return false;
      sched_yield();
    }
  }
  return true;
}

fcomm_status prepare(fcomm_comm &c, int to) {
  if (c.ring_ready[std::size_t(to)]) return FCOMM_OK;
  Ring &ring = c.ring(c.rank, to);
  // The writer touches the ring now: a lack of memory is an error here but a SIGBUS later.
  if (madvise(&ring, sizeof ring, MADV_POPULATE_WRITE) && errno != EINVAL) return FCOMM_SYSTEM;
  c.ring_ready[std::size_t(to)] = true;
  return FCOMM_OK;
}

// Queued messages move forward while their process waits, on any communicator.
struct Lines {
  std::mutex mutex;
  std::vector<fcomm_comm *> comms;
  std::atomic<int> messages{0};
};

// Never destroyed: communicators may be closed after the library's own statics.
Lines *lines = new Lines;

bool progress_own(fcomm_comm &c) {
  for (int p = 0; p < c.size; ++p) {
    auto &line = c.pending[std::size_t(p)];
    while (!line.empty() && put(c, p, line.front())) {
      fcomm_pool_return(const_cast<char *>(line.front().data));
      line.pop_front();
      --c.pending_count;
      count_in_line(-1);
    }
  }
  return c.pending_count > 0;
}

bool same(const fcomm_signature &a, const fcomm_signature &b) {
  return a.dtype == b.dtype && a.ndim == b.ndim && a.ndim >= 0 && a.ndim <= FCOMM_MAX_DIMS &&
         std::memcmp(a.dims, b.dims, std::size_t(a.ndim) * sizeof a.dims[0]) == 0;
}

}  // namespace

bool progress(fcomm_comm &c) {
  bool left = c.pending_count && progress_own(c);
  const std::unique_lock listed(lines->mutex, std::try_to_lock);
  if (!listed) return true;
  for (fcomm_comm *other : lines->comms) {
    if (other == &c) continue;
    // We never wait for this lock, so the order of locks does not matter: a thread that holds it moves its own queue.
    const std::unique_lock lock(other->mutex, std::try_to_lock);
    if (lock && !other->closed && !other->broken && other->pending_count) left = progress_own(*other) || left;
  }
  return left;
}

bool in_line() { return lines->messages.load(std::memory_order_relaxed) > 0; }

void count_in_line(int more) { lines->messages.fetch_add(more, std::memory_order_relaxed); }

void enlist(fcomm_comm &c) {
  // A forked child has its own communicators, and another thread of the parent may have held the lock.
  static const int once = pthread_atfork(nullptr, nullptr, [] { lines = new Lines; });
  (void)once;
  const std::unique_lock lock(lines->mutex);
  lines->comms.push_back(&c);
}

void delist(fcomm_comm &c) {
  const std::unique_lock lock(lines->mutex);
  std::erase(lines->comms, &c);
}

}  // namespace fcomm

using namespace fcomm;

fcomm_status fcomm_send(const void *in, size_t nbytes, const fcomm_signature *signature, int destination,
                        fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  if (destination < 0 || destination >= c.size || destination == c.rank) return FCOMM_INVALID;
  if (const fcomm_status s = prepare(c, destination)) return s;
  auto &line = c.pending[std::size_t(destination)];
  Message m{static_cast<const char *>(in), 0, nbytes, 0, *signature, false};
  if (line.empty() && put_while_read(c, destination, m)) return FCOMM_OK;
  char *copied = static_cast<char *>(fcomm_pool_take(nbytes - m.sent));
  if (!copied) return FCOMM_SYSTEM;
  if (nbytes > m.sent) std::memcpy(copied, m.data + m.sent, nbytes - m.sent);
  m.data = copied, m.begin = m.sent;
  line.push_back(m);
  ++c.pending_count;
  count_in_line(1);
  return FCOMM_OK;
}

fcomm_status fcomm_recv(void *out_, size_t nbytes, const fcomm_signature *signature, int source, fcomm_signature *got,
                        fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  if (source < 0 || source >= c.size || source == c.rank) return FCOMM_INVALID;
  Ring &ring = c.ring(source, c.rank);
  char *out = static_cast<char *>(out_);
  const std::size_t piece = piece_bytes(nbytes);
  std::uint32_t tail = ring.tail.load(std::memory_order_relaxed);
  fcomm_status status = FCOMM_OK;
  ring.reading.store(1, std::memory_order_release);
  for (std::size_t k = 0; k == 0 || k * piece < nbytes; ++k) {
    status = wait_for(c, source, ring.head, ring.waiters, tail + 1, Among::kTwo);
    if (status) break;
    const Piece &p = ring.pieces[tail % kRingPieces];
    if (k == 0) {
      if (got) *got = p.signature;
      if (p.message_nbytes != nbytes || !same(p.signature, *signature)) {
        status = poison(c, FCOMM_MISMATCH, source, c.round);
        break;
      }
    }
    const Span s = span(nbytes, piece, k);
    if (s.nbytes) std::memcpy(out + s.at, p.data, s.nbytes);
    FCOMM_FAULT(c, "taken");
    ring.tail.store(++tail, std::memory_order_release);
    if (in_line()) progress(c);
  }
  ring.reading.store(0, std::memory_order_release);
  return status;
}
