// Opening, waiting, failing and closing. The first rank that sees a failure writes the poison word, and all ranks
// report what the word says, so all survivors name the same culprit.
#include "comm.h"

#include "blocks.h"
#include "rounds.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <memory>
#include <new>
#ifdef FCOMM_TESTING
#include <csignal>
#include <cstdlib>
#endif

namespace fcomm {
namespace {

constexpr int kMostSpins = 2000;  // about 50 us
// How long a thread may stay in a call after another one closes the group, for example at the exit of the process.
constexpr std::int64_t kCloseGrace = 1'000'000'000;

std::atomic<unsigned> fork_generation{0};
std::atomic<int (*)(void)> interrupt_hook{nullptr};

void count_forks() {
  static const int once = pthread_atfork(nullptr, nullptr, [] { fork_generation.fetch_add(1); });
  (void)once;
}

void sleep_on(Flag &word, std::uint32_t while_equal, std::int64_t ns) {
  timespec t{time_t(ns / 1'000'000'000), long(ns % 1'000'000'000)};
  // Shared, not FUTEX_PRIVATE: the waker is another process. EINTR and EAGAIN count as a wake-up: the caller checks.
  syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAIT, while_equal, &t, nullptr, 0);
}

std::uint64_t encode(fcomm_status reason, int culprit, int reporter, std::uint32_t round) {
  return std::uint64_t(reason) << 56 | std::uint64_t(culprit) << 44 | std::uint64_t(reporter) << 32 | round;
}

fcomm_status observe(fcomm_comm &c, std::uint64_t word) {
  c.broken = true;
  c.failure = {int(word >> 56), int(word >> 44 & 0xFFF), int(word >> 32 & 0xFFF), std::uint32_t(word)};
  return fcomm_status(c.failure.reason);
}

// How many ranks can run at once here: with more, spinning only delays the awaited one.
int allowed_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set)) return 1;
  int cores = std::max(1, CPU_COUNT(&set));
  if (FILE *f = std::fopen("/sys/fs/cgroup/cpu.max", "re")) {
    double quota, period;
    if (std::fscanf(f, "%lf %lf", &quota, &period) == 2 && period > 0)
      cores = std::min(cores, std::max(1, int(quota / period)));
    std::fclose(f);
  }
  return cores;
}

// Finds a dead or departed rank that will never publish what is awaited. Its last act may have been to publish, so look
// at the flag again.
fcomm_status look_for_the_dead(fcomm_comm &c, int peer, const Flag &word, std::uint32_t target, Among among,
                               std::uint32_t round) {
  pollfd fds[FCOMM_MAX_RANKS];
  for (int p = 0; p < c.size; ++p) fds[p] = {p == c.rank ? -1 : c.life[std::size_t(p)], POLLIN, 0};
  if (poll(fds, nfds_t(c.size), 0) < 0) return FCOMM_OK;  // EINTR: check next time
  for (int p = 0; p < c.size; ++p) {
    if (p == c.rank) continue;
    const bool dead = fds[p].revents & (POLLIN | POLLHUP | POLLERR);
    // Between two ranks, what the peer still delivers while it leaves is valid.
    const bool left = c.control(p).left.load(std::memory_order_acquire) >= (among == Among::kAll ? kLeaving : kGone);
    if (!dead && !left) continue;
    const bool missing = among == Among::kAll ? !reached(c.control(p).round.load(std::memory_order_acquire), target)
                                              : p == peer && !reached(word.load(std::memory_order_acquire), target);
    if (missing) return poison(c, left ? FCOMM_LEFT : FCOMM_DIED, p, round);
  }
  return FCOMM_OK;
}

// Blames the first missing rank; behind() finds the others.
fcomm_status deadline(fcomm_comm &c, int peer, std::uint32_t round, Among among) {
  int culprit = peer;
  for (int p = c.size - 1; among == Among::kAll && p >= 0; --p)
    if (!reached(c.control(p).round.load(std::memory_order_acquire), round)) culprit = p;
  return poison(c, FCOMM_TIMEOUT, culprit, round);
}

// A yield after which no other thread runs is as good as spinning and costs nobody anything. If another thread runs,
// the core is shared, perhaps with the very peer that is awaited, and spinning is waste. So we learn how long to spin.
bool yield_awhile(fcomm_comm &c, const Flag &word, std::uint32_t target) {
  constexpr std::int64_t kAwake = 1'000'000, kTaken = 4'000;
  constexpr int kYields = 20;
  const std::int64_t start = now_ns();
  int taken = 0;
  bool there = false;
  for (std::int64_t before = start; !there && taken < kYields && before - start < kAwake;) {
    sched_yield();
    const std::int64_t after = now_ns();
    taken += after - before > kTaken;
    before = after;
    there = reached(word.load(std::memory_order_acquire), target) || c.header().poison.load(std::memory_order_relaxed);
  }
  c.spins = taken ? c.spins - (c.spins + 3) / 4 : std::min(kMostSpins, c.spins + c.spins / 8 + 10);
  return there;
}

fcomm_status wait_slowly(fcomm_comm &c, int peer, Flag &word, Flag &waiters, std::uint32_t target, Among among) {
  constexpr std::int64_t kFirstSlice = 1'000'000, kLastSlice = 20'000'000, kBusySlice = 200'000;
  const std::uint32_t round = among == Among::kAll ? target : c.round;  // a ring counts pieces, not rounds
  const std::int64_t start = now_ns();
  std::int64_t slice = kFirstSlice;
  if (!in_line()) yield_awhile(c, word, target);
  for (;;) {
    const bool busy = in_line() && progress(c);
    if (reached(word.load(std::memory_order_acquire), target)) return FCOMM_OK;
    if (const fcomm_status s = look_for_poison(c)) return s;
    if (const fcomm_status s = look_for_the_dead(c, peer, word, target, among, round)) return s;
    if (const auto hook = interrupt_hook.load(); hook && hook()) return poison(c, FCOMM_INTERRUPTED, c.rank, round);
    if (const std::int64_t asked = c.closing.load(); asked && now_ns() - asked > kCloseGrace) return FCOMM_CLOSED;
    const std::int64_t left = start + c.timeout_ns - now_ns();
    if (left <= 0) return deadline(c, peer, round, among);
    // Announce, then sleep if the kernel still sees the old value; the peer publishes, then looks for sleepers.
    // Everything is sequentially consistent, so one of the two sees the other. (The wake-up for a poison word may fall
    // between our check of it and the sleep; we then see it at the end of the slice.)
    waiters.fetch_add(1, std::memory_order_seq_cst);
    const std::uint32_t seen = word.load(std::memory_order_seq_cst);
    if (!reached(seen, target) && !c.header().poison.load(std::memory_order_acquire))
      sleep_on(word, seen, std::min(left, busy ? kBusySlice : slice));
    waiters.fetch_sub(1, std::memory_order_seq_cst);
    slice = std::min(2 * slice, kLastSlice);
  }
}

fcomm_status wait_round(fcomm_comm &c, int p, std::uint32_t round) {
  Control &peer = c.control(p);
  return wait_for(c, p, peer.round, peer.waiters, round, Among::kAll);
}

std::uint32_t publish(fcomm_comm &c) {
  Control &me = c.control(c.rank);
  me.round.exchange(++c.round, std::memory_order_seq_cst);
  if (me.waiters.load(std::memory_order_seq_cst)) wake(me.round);
  return c.round;
}

// The odd one out; on a tie the higher rank, which both sides' messages then explain. It waits a moment for late ranks,
// so that all have a vote, but no longer: a late rank may never come.
int minority(const fcomm_comm &c, std::uint32_t round) {
#ifdef FCOMM_TESTING
  constexpr std::int64_t kPatience = 5'000'000'000;  // in tests all do come, but may get no core for a while
#else
  constexpr std::int64_t kPatience = 20'000'000;
#endif
  for (const std::int64_t start = now_ns(); now_ns() - start < kPatience; sched_yield()) {
    int arrived = 0;
    for (int p = 0; p < c.size; ++p) arrived += reached(c.control(p).round.load(std::memory_order_acquire), round);
    if (arrived == c.size || c.header().poison.load(std::memory_order_acquire)) break;
  }
  int culprit = 0, fewest = INT_MAX;
  for (int p = 0; p < c.size; ++p) {
    if (!reached(c.control(p).round.load(std::memory_order_acquire), round)) continue;
    int same = 0;
    for (int q = 0; q < c.size; ++q)
      same += reached(c.control(q).round.load(std::memory_order_acquire), round) &&
              c.control(q).fingerprint[round & 1] == c.control(p).fingerprint[round & 1];
    if (same <= fewest) fewest = same, culprit = p;
  }
  return culprit;
}

// Delivers queued messages to ranks that still receive, for as long as the deadline and Ctrl-C allow.
void hand_out(fcomm_comm &c) {
  constexpr int kNapsPerLook = 100;
  const std::int64_t start = now_ns();
  bool interrupted = false;
  int naps = 0;
  for (int p = 0; p < c.size; ++p) {
    auto &line = c.pending[std::size_t(p)];
    while (!line.empty() && progress(c) && !line.empty()) {
      pollfd life{c.life[std::size_t(p)], POLLIN, 0};
      if (c.control(p).left.load(std::memory_order_acquire) != kStays || poll(&life, 1, 0) > 0 || c.broken ||
          c.header().poison.load(std::memory_order_acquire) || now_ns() - start > c.timeout_ns || interrupted)
        break;
      if (++naps % kNapsPerLook == 0)
        if (const auto hook = interrupt_hook.load(); hook && hook()) interrupted = true;
      const timespec nap{0, 100'000};
      nanosleep(&nap, nullptr);
    }
    c.pending_count -= int(line.size());
    count_in_line(-int(line.size()));
    for (const Message &m : line) fcomm_pool_return(const_cast<char *>(m.data));
    line.clear();
  }
}

}  // namespace

std::int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t x = a * 0x9E3779B97F4A7C15ull ^ b;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

bool past_caches(const fcomm_comm &c, std::size_t touched) {
  // Not sysconf's value for the last level: virtual machines report all sockets together (320 MB instead of 32).
  constexpr std::size_t kLastLevel = 32 << 20;
  return touched >= kLastLevel / std::size_t(c.size);
}

void copy_in(fcomm_comm &c, char *to, const char *from, std::size_t nbytes) {
  constexpr std::size_t kTimed = 16 << 10;  // a microsecond, against a twentieth for the clock
  if (nbytes < kTimed) return copy(to, from, nbytes, false);
  const std::int64_t start = now_ns();
  const bool way = c.writing.next_way(start);
  copy(to, from, nbytes, way);
  if (way) stream_fence();
  c.writing.learn(way, double(now_ns() - start), nbytes);
}

void wake(Flag &word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t *>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

fcomm_status look_for_poison(fcomm_comm &c) {
  const std::uint64_t word = c.header().poison.load(std::memory_order_acquire);
  return word ? observe(c, word) : FCOMM_OK;
}

fcomm_status poison(fcomm_comm &c, fcomm_status reason, int culprit, std::uint32_t round) {
  std::uint64_t word = 0;
  const std::uint64_t mine = encode(reason, culprit, c.rank, round);
  if (!c.header().poison.compare_exchange_strong(word, mine, std::memory_order_acq_rel)) return observe(c, word);
  for (int p = 0; p < c.size; ++p) wake(c.control(p).round);
  for (int p = 0; p < c.size; ++p)
    for (int q = 0; q < c.size; ++q)
      if (p != q) wake(c.ring(p, q).head);
  return observe(c, mine);
}

fcomm_status wait_for(fcomm_comm &c, int peer, Flag &word, Flag &waiters, std::uint32_t target, Among among) {
  if (reached(word.load(std::memory_order_acquire), target)) return FCOMM_OK;
  if (!c.pending_count) {
    for (int k = 0; k < c.spins; ++k) {
      pause();
      if (reached(word.load(std::memory_order_acquire), target)) return FCOMM_OK;
    }
  }
  return wait_slowly(c, peer, word, waiters, target, among);
}

#ifdef FCOMM_TESTING
void fault(const fcomm_comm &c, const char *point) {
  static std::atomic<int> passes{0};
  const char *text = std::getenv("FCOMM_TEST_FAULT");
  char at[32], action[32];
  int rank, n = 1;
  if (!text || std::sscanf(text, "%31[^:]:%d:%31[^:]:%d", at, &rank, action, &n) < 3) return;
  if (rank != c.rank || std::strcmp(at, point) || passes.fetch_add(1) + 1 != n) return;
  if (!std::strcmp(action, "kill")) raise(SIGKILL);
  if (!std::strcmp(action, "stop")) raise(SIGSTOP);
  if (!std::strcmp(action, "delay")) usleep(100'000);
}
#endif

Call::Call(fcomm_comm *c) : status(FCOMM_OK) {
  // Checked before the lock: a thread of the parent may have held it when this process was forked.
  if (c->fork_generation != fork_generation.load(std::memory_order_relaxed)) {
    status = FCOMM_FORKED;
    return;
  }
  lock = std::unique_lock(c->mutex);
  if (c->closed)
    status = FCOMM_CLOSED;
  else if (c->broken)
    status = FCOMM_POISONED;
  else if ((status = look_for_poison(*c)) == FCOMM_OK && in_line())
    progress(*c);
}

fcomm_status open_round(fcomm_comm &c, std::uint64_t fingerprint) {
  c.control(c.rank).fingerprint[filling(c) & 1] = fingerprint;
  FCOMM_FAULT(c, "publish");
  const std::uint32_t round = publish(c);
  FCOMM_FAULT(c, "wait");
  for (int p = 0; p < c.size; ++p) {
    if (p == c.rank) continue;
    if (const fcomm_status s = wait_round(c, p, round)) return s;
    if (c.control(p).fingerprint[round & 1] != fingerprint)
      return poison(c, FCOMM_MISMATCH, minority(c, round), round);
  }
  return FCOMM_OK;
}

fcomm_status next_round(fcomm_comm &c) {
  FCOMM_FAULT(c, "publish");
  const std::uint32_t round = publish(c);
  FCOMM_FAULT(c, "wait");
  for (int p = 0; p < c.size; ++p) {
    if (p == c.rank) continue;
    if (const fcomm_status s = wait_round(c, p, round)) return s;
  }
  return FCOMM_OK;
}

}  // namespace fcomm

using namespace fcomm;

size_t fcomm_region_bytes(int size) { return Layout{size}.bytes(); }

fcomm_status fcomm_format(int fd, int size, uint64_t nonce, uint32_t first_round) {
  if (size < 2 || size > FCOMM_MAX_RANKS) return FCOMM_INVALID;
  const Layout layout{size};
  // Sealed, so that no peer can shrink it while we use it: reading a page that has gone is a SIGBUS.
  if (ftruncate(fd, off_t(layout.bytes())) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
    return FCOMM_SYSTEM;
  void *base = mmap(nullptr, layout.slots(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return FCOMM_SYSTEM;
  auto *header = new (base) Header{};
  header->magic = kMagic, header->layout = layout.hash(), header->nonce = nonce;
  header->size = std::uint32_t(size), header->first_round = first_round;
  auto *controls = reinterpret_cast<Control *>(static_cast<char *>(base) + layout.control());
  for (int p = 0; p < size; ++p) controls[p].round.store(first_round, std::memory_order_release);
  munmap(base, layout.slots());
  return FCOMM_OK;
}

fcomm_status fcomm_attach(void *region, int rank, int size, const int *life_fds, uint64_t nonce, double timeout_s,
                          fcomm_comm **comm) {
  if (size < 2 || size > FCOMM_MAX_RANKS || rank < 0 || rank >= size || !(timeout_s > 0)) return FCOMM_INVALID;
  const auto &header = *static_cast<const Header *>(region);
  const Layout layout{size};
  if (header.magic != kMagic || header.layout != layout.hash() || header.nonce != nonce ||
      header.size != std::uint32_t(size))
    return FCOMM_INVALID;
  count_forks();
  auto c = std::make_unique<fcomm_comm>();
  c->rank = rank, c->size = size, c->layout = layout, c->base = static_cast<char *>(region);
  c->round = header.first_round;
  c->timeout_ns = std::int64_t(std::min(timeout_s, 1e9) * 1e9);
  c->fork_generation = fork_generation.load();
  c->life.assign(life_fds, life_fds + size);
  c->pending.resize(std::size_t(size));
  c->ring_ready.resize(std::size_t(size));
  const bool crowded = size > allowed_cores();
  c->spins = crowded ? 0 : kMostSpins;  // initially
  // Touch our own slots now: a lack of memory is an error here but a SIGBUS later, and on a machine with several memory
  // nodes the pages are placed where their writer runs.
  char *own = c->base + layout.slots() + std::size_t(rank) * kSlotsBytes;
  if (madvise(own, kSlotsBytes, MADV_POPULATE_WRITE) && errno != EINVAL) return FCOMM_SYSTEM;
  c->control(rank).pid = getpid();
  enlist(*c);
  *comm = c.release();
  return FCOMM_OK;
}

fcomm_status fcomm_open(int fd, int rank, int size, const int *life_fds, uint64_t nonce, double timeout_s,
                        fcomm_comm **comm) {
  if (size < 2 || size > FCOMM_MAX_RANKS) return FCOMM_INVALID;
  const std::size_t nbytes = Layout{size}.bytes();
  struct stat about;
  if (fstat(fd, &about)) return FCOMM_SYSTEM;
  const int seals = fcntl(fd, F_GET_SEALS);
  if (std::size_t(about.st_size) != nbytes || seals < 0 || !(seals & F_SEAL_SHRINK)) return FCOMM_INVALID;
  void *base = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return FCOMM_SYSTEM;
  const fcomm_status s = fcomm_attach(base, rank, size, life_fds, nonce, timeout_s, comm);
  if (s) {
    munmap(base, nbytes);
    return s;
  }
  (*comm)->mapped = true;
  close(fd);
  return FCOMM_OK;
}

fcomm_status fcomm_close(fcomm_comm *comm) {
  fcomm_comm &c = *comm;
  if (c.fork_generation != fork_generation.load()) return FCOMM_FORKED;
  std::int64_t before = 0;
  c.closing.compare_exchange_strong(before, now_ns());
  const std::unique_lock lock(c.mutex);
  if (c.closed) return FCOMM_OK;
  c.control(c.rank).left.store(kLeaving, std::memory_order_release);
  hand_out(c);
  delist(c);
  c.closed = true;
  c.control(c.rank).left.store(kGone, std::memory_order_release);
  wake(c.control(c.rank).round);  // sleepers check, and find us gone
  for (int p = 0; p < c.size; ++p)
    if (p != c.rank) wake(c.ring(c.rank, p).head);
  for (const int fd : c.life)
    if (fd >= 0) close(fd);
  if (c.mapped) munmap(c.base, c.layout.bytes());
  c.base = nullptr;
  return FCOMM_OK;
}

void fcomm_free(fcomm_comm *comm) {
  if (fcomm_close(comm) == FCOMM_OK) delete comm;  // in a forked child the lock may be held for ever: leak it
}

fcomm_failure fcomm_last_failure(const fcomm_comm *comm) {
  const std::unique_lock lock(comm->mutex);
  return comm->failure;
}

uint32_t fcomm_round(const fcomm_comm *comm) {
  const std::unique_lock lock(comm->mutex);
  return comm->round;
}

void fcomm_describe(fcomm_comm *comm, const char *text) {
  const std::unique_lock lock(comm->mutex);
  if (comm->closed) return;
  Control &me = comm->control(comm->rank);
  if (me.described.load()) return;  // only once: the first failure counts
  std::strncpy(me.description, text, sizeof me.description - 1);
  me.described.store(1, std::memory_order_release);
}

int fcomm_description(fcomm_comm *comm, int rank, double wait_s, char *text, size_t text_bytes) {
  const std::unique_lock lock(comm->mutex);
  if (comm->closed || rank < 0 || rank >= comm->size || text_bytes == 0) return 0;
  const Control &peer = comm->control(rank);
  const std::int64_t end = now_ns() + std::int64_t(wait_s * 1e9);
  while (!peer.described.load(std::memory_order_acquire)) {
    if (now_ns() > end) return 0;
    const timespec nap{0, 200'000};
    nanosleep(&nap, nullptr);
  }
  const std::size_t n = std::min(text_bytes, sizeof peer.description) - 1;
  std::memcpy(text, peer.description, n);
  text[n] = 0;
  return 1;
}

int fcomm_behind(const fcomm_comm *comm, int rank) {
  const std::unique_lock lock(comm->mutex);
  if (comm->closed || rank < 0 || rank >= comm->size) return 0;
  return !reached(comm->control(rank).round.load(std::memory_order_acquire), comm->failure.round);
}

int fcomm_pid(const fcomm_comm *comm, int rank) {
  const std::unique_lock lock(comm->mutex);
  return comm->closed || rank < 0 || rank >= comm->size ? 0 : comm->control(rank).pid;
}

void fcomm_set_interrupt_hook(int (*hook)(void)) { interrupt_hook.store(hook); }
