// What the two doubles share: ranks as processes joined by a mesh of loopback sockets, messages, faults, call counts.
//
// A double is a library with a vendor's exported symbols that works on host memory. It is strict where the vendor is
// not: it compares what ranks call, refuses wrong pointers, and completes a send only when it has been received.
#pragma once

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace core {

enum Result { kOk, kRemote, kAborted, kMismatch, kSystem };

// --- faults and counts ----------------------------------------------------------------------------------------------

enum Action { kNone, kStatus, kDelay, kHang, kDeaf, kAsync };
struct Fault {
  Action action = kNone;
  long value = 0;
};

inline std::mutex g_lock;
inline std::map<std::string, long> g_calls;
inline std::map<std::string, std::map<long, Fault>> g_faults;
inline std::atomic<int> g_live{0}, g_aborted{0};
inline thread_local std::string g_error = "no error";

// Counts the call and returns the fault, if any, that was planted for it.
inline Fault enter(const char *symbol) {
  std::lock_guard<std::mutex> hold(g_lock);
  long n = ++g_calls[symbol];
  auto faults = g_faults.find(symbol);
  if (faults == g_faults.end()) return {};
  auto found = faults->second.find(n);
  return found == faults->second.end() ? Fault{} : found->second;
}

inline void sleep_ms(long ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// --- a mesh of sockets ----------------------------------------------------------------------------------------------

struct Header {
  uint32_t magic, kind;
  uint64_t nbytes, tag;
};
constexpr uint32_t kMagic = 0x46434442, kData = 1, kAck = 2;

struct Message {
  uint64_t tag;
  std::vector<char> data;
};

struct Peer {
  int fd = -1;
  bool dead = false;
  std::vector<char> in, out;
  std::deque<Message> inbox;
  long acks = 0;
};

struct Out {
  int peer;
  const void *data;
  size_t nbytes;
  uint64_t tag;
  bool ack;
};
struct In {
  int peer;
  void *data;
  size_t nbytes;
  uint64_t tag;
  bool ack;
};

struct Comm {
  int rank = 0, size = 1;
  bool blocking = true;
  std::string name;
  std::vector<Peer> peers;
  std::atomic<bool> abort{false}, revoked{false};
  std::atomic<int> state{0};  // what the vendor's "asynchronous error" query returns
  std::mutex lock;
  std::condition_variable wake;
  std::deque<std::function<void()>> jobs;
  std::atomic<int> inside{0}, busy{0};  // calls; those that do not wait for a peer
  bool stop = false;
  std::thread worker;

  Comm(int rank_, int size_) : rank(rank_), size(size_), peers(size_) { ++g_live; }
  ~Comm() {
    for (auto &p : peers)
      if (p.fd >= 0) ::close(p.fd);
    --g_live;
  }
};

inline void start_worker(Comm &c) {
  c.worker = std::thread([&c] {
    std::unique_lock<std::mutex> hold(c.lock);
    for (;;) {
      c.wake.wait(hold, [&c] { return c.stop || !c.jobs.empty(); });
      if (c.jobs.empty()) return;
      auto job = std::move(c.jobs.front());
      c.jobs.pop_front();
      hold.unlock();
      job();
      hold.lock();
    }
  });
}

inline void submit(Comm &c, std::function<void()> job) {
  std::lock_guard<std::mutex> hold(c.lock);
  c.jobs.push_back(std::move(job));
  c.wake.notify_one();
}

inline void stop_worker(Comm &c) {
  if (!c.worker.joinable()) return;
  {
    std::lock_guard<std::mutex> hold(c.lock);
    c.stop = true;
    c.wake.notify_one();
  }
  c.worker.join();
}

inline void append(std::vector<char> &to, uint32_t kind, const void *data, size_t nbytes, uint64_t tag) {
  Header h{kMagic, kind, nbytes, tag};
  to.insert(to.end(), reinterpret_cast<char *>(&h), reinterpret_cast<char *>(&h) + sizeof h);
  if (nbytes) to.insert(to.end(), static_cast<const char *>(data), static_cast<const char *>(data) + nbytes);
}

// Split what arrived from a peer into messages; false if it is not this protocol.
inline bool parse(Peer &p) {
  size_t at = 0;
  while (p.in.size() - at >= sizeof(Header)) {
    Header h;
    memcpy(&h, p.in.data() + at, sizeof h);
    if (h.magic != kMagic) return false;
    if (h.kind == kAck) {
      ++p.acks;
      at += sizeof h;
      continue;
    }
    if (p.in.size() - at - sizeof h < h.nbytes) break;
    auto first = p.in.begin() + at + sizeof h;
    p.inbox.push_back({h.tag, std::vector<char>(first, first + h.nbytes)});
    at += sizeof h + h.nbytes;
  }
  p.in.erase(p.in.begin(), p.in.begin() + at);
  return true;
}

inline Result fail(Result result, const std::string &text) {
  g_error = text;
  return result;
}

// All of outs and ins at once, in order for each peer. Every rank reads whatever arrives, so peers may run ahead.
inline Result transfer(Comm &c, const std::vector<Out> &outs, const std::vector<In> &ins) {
  std::vector<long> acks(c.size, 0);
  for (const Out &o : outs) {
    if (o.peer == c.rank) {
      const char *data = static_cast<const char *>(o.data);
      c.peers[c.rank].inbox.push_back({o.tag, std::vector<char>(data, data + o.nbytes)});
    } else {
      append(c.peers[o.peer].out, kData, o.data, o.nbytes, o.tag);
      acks[o.peer] += o.ack;
    }
  }
  std::vector<bool> done(ins.size(), false);
  for (;;) {
    if (c.abort) return fail(kAborted, "the communicator was aborted");
    bool open = false;
    std::vector<bool> waiting(c.size, false);
    for (size_t i = 0; i < ins.size(); ++i) {
      const In &want = ins[i];
      Peer &p = c.peers[want.peer];
      if (done[i]) continue;
      if (waiting[want.peer] || p.inbox.empty()) {
        waiting[want.peer] = open = true;
        continue;
      }
      Message m = std::move(p.inbox.front());
      p.inbox.pop_front();
      if (m.tag != want.tag || m.data.size() != want.nbytes)
        return fail(kMismatch, "rank " + std::to_string(want.peer) + " called something else: " +
                                   std::to_string(m.data.size()) + " bytes, expected " + std::to_string(want.nbytes));
      if (want.nbytes) memcpy(want.data, m.data.data(), want.nbytes);
      if (want.ack && want.peer != c.rank) append(p.out, kAck, nullptr, 0, 0);
      done[i] = true;
    }
    std::vector<pollfd> fds;
    std::vector<int> who;
    for (int r = 0; r < c.size; ++r) {
      Peer &p = c.peers[r];
      if (r == c.rank) continue;
      bool needs = waiting[r] || !p.out.empty() || p.acks < acks[r];
      open = open || needs;
      if (p.dead) {
        if (needs) return fail(kRemote, "rank " + std::to_string(r) + " closed its connection");
        continue;
      }
      fds.push_back({p.fd, static_cast<short>(POLLIN | (p.out.empty() ? 0 : POLLOUT)), 0});
      who.push_back(r);
    }
    if (!open) break;
    if (waiting[c.rank] && fds.empty()) {
      sleep_ms(5);  // a receive from oneself without its send: only abort ends it
      continue;
    }
    if (::poll(fds.data(), fds.size(), 10) < 0 && errno != EINTR) return fail(kSystem, "poll failed");
    for (size_t i = 0; i < fds.size(); ++i) {
      Peer &p = c.peers[who[i]];
      if (fds[i].revents & POLLOUT) {
        ssize_t n = ::send(p.fd, p.out.data(), p.out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) p.out.erase(p.out.begin(), p.out.begin() + n);
        if (n < 0 && errno != EAGAIN && errno != EINTR) p.dead = true;
      }
      if (fds[i].revents & (POLLIN | POLLHUP | POLLERR)) {
        char buffer[1 << 16];
        ssize_t n = ::recv(p.fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (n > 0) p.in.insert(p.in.end(), buffer, buffer + n);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) p.dead = true;
        if (!parse(p)) return fail(kSystem, "bytes of another protocol on the socket");
      }
    }
  }
  for (int r = 0; r < c.size; ++r) c.peers[r].acks -= acks[r];
  return kOk;
}

// --- bootstrap ------------------------------------------------------------------------------------------------------

struct Id {
  char magic[8];
  uint64_t nonce;
  uint16_t port;
};
struct Hello {
  uint64_t nonce;
  int32_t rank, size;
  uint16_t port;
};

inline int listen_loopback(uint16_t *port) {
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t n = sizeof a;
  if (fd < 0 || ::bind(fd, reinterpret_cast<sockaddr *>(&a), n) || ::listen(fd, 64) ||
      ::getsockname(fd, reinterpret_cast<sockaddr *>(&a), &n))
    return -1;
  *port = ntohs(a.sin_port);
  return fd;
}

inline int connect_loopback(uint16_t port) {
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_port = htons(port);
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd < 0 || ::connect(fd, reinterpret_cast<sockaddr *>(&a), sizeof a)) {
    if (fd >= 0) ::close(fd);
    return -1;
  }
  int one = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

inline bool stopped(const std::atomic<bool> *stop, int ticks) { return ticks > 6000 || (stop && *stop); }

inline bool read_all(int fd, void *to, size_t n, const std::atomic<bool> *stop) {
  for (int ticks = 0; n && !stopped(stop, ticks); ++ticks) {
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, 10) <= 0) continue;
    ssize_t got = ::recv(fd, to, n, 0);
    if (got <= 0) return false;
    to = static_cast<char *>(to) + got;
    n -= got;
  }
  return n == 0;
}

inline int accept_one(int fd, const std::atomic<bool> *stop) {
  for (int ticks = 0; !stopped(stop, ticks); ++ticks) {
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, 10) > 0) return ::accept4(fd, nullptr, nullptr, SOCK_CLOEXEC);
  }
  return -1;
}

// As in the vendors' libraries, the process that makes the id runs a thread that introduces the ranks.
inline bool make_id(Id *id) {
  uint16_t port = 0;
  int fd = listen_loopback(&port);
  if (fd < 0) return false;
  std::random_device random;
  *id = Id{{'f', 'c', 'o', 'm', 'm', 'd', 'b', 'l'}, (uint64_t(random()) << 32) | random(), port};
  uint64_t nonce = id->nonce;
  std::thread([fd, nonce] {
    std::vector<int> fds;
    std::vector<Hello> hellos;
    for (size_t size = 1; hellos.size() < size;) {
      int peer = accept_one(fd, nullptr);
      Hello h{};
      if (peer < 0) break;
      if (!read_all(peer, &h, sizeof h, nullptr) || h.nonce != nonce) {
        ::close(peer);
        continue;
      }
      bool twice = std::any_of(hellos.begin(), hellos.end(), [&](const Hello &o) { return o.rank == h.rank; });
      fds.push_back(peer);
      if (twice || (!hellos.empty() && hellos[0].size != h.size)) {
        hellos.clear();
        break;
      }
      hellos.push_back(h);
      size = h.size;
    }
    std::sort(hellos.begin(), hellos.end(), [](const Hello &a, const Hello &b) { return a.rank < b.rank; });
    for (int peer : fds) {
      if (!hellos.empty()) (void)!::send(peer, hellos.data(), hellos.size() * sizeof(Hello), MSG_NOSIGNAL);
      ::close(peer);
    }
    ::close(fd);
  }).detach();
  return true;
}

inline bool is_id(const Id &id) { return !memcmp(id.magic, "fcommdbl", 8); }

inline Result join(Comm &c, const Id &id) {
  uint16_t port = 0;
  int listener = listen_loopback(&port), root = connect_loopback(id.port);
  Hello mine{id.nonce, c.rank, c.size, port};
  std::vector<Hello> all(c.size);
  bool ok = listener >= 0 && root >= 0 && ::send(root, &mine, sizeof mine, MSG_NOSIGNAL) == sizeof mine &&
            read_all(root, all.data(), all.size() * sizeof(Hello), &c.abort);
  if (root >= 0) ::close(root);
  for (int r = 0; ok && r < c.rank; ++r) {
    int32_t me = c.rank;
    c.peers[r].fd = connect_loopback(all[r].port);
    ok = c.peers[r].fd >= 0 && ::send(c.peers[r].fd, &me, sizeof me, MSG_NOSIGNAL) == sizeof me;
  }
  for (int r = c.rank + 1; ok && r < c.size; ++r) {
    int32_t them = -1;
    int fd = accept_one(listener, &c.abort);
    ok = fd >= 0 && read_all(fd, &them, sizeof them, &c.abort) && them > c.rank && them < c.size;
    if (ok) c.peers[them].fd = fd;
  }
  if (listener >= 0) ::close(listener);
  if (c.abort) return fail(kAborted, "aborted while joining");
  return ok ? kOk : fail(kSystem, "the ranks did not find each other: duplicate rank, another size, or a dead root");
}

// --- communicators in use -------------------------------------------------------------------------------------------

inline std::set<Comm *> g_comms;
inline std::atomic<int> g_stale{0};  // look-ups of what is not, or no longer, a communicator

inline Comm *add(Comm *c) {
  std::lock_guard<std::mutex> hold(g_lock);
  g_comms.insert(c);
  return c;
}

// The communicator behind a handle, or null if the handle was never given out or was destroyed.
inline Comm *look_up(const void *handle) {
  std::lock_guard<std::mutex> hold(g_lock);
  auto found = g_comms.find(static_cast<Comm *>(const_cast<void *>(handle)));
  if (handle && found == g_comms.end()) ++g_stale;
  return found == g_comms.end() ? nullptr : *found;
}

// Ends what runs on it and frees it. If a call does not react, the memory is kept, since the call still uses it.
inline void destroy(Comm *c, bool abort) {
  {
    std::lock_guard<std::mutex> hold(g_lock);
    g_comms.erase(c);
  }
  if (abort) {
    c->abort = true;
    ++g_aborted;
    for (auto &p : c->peers)
      if (p.fd >= 0) ::shutdown(p.fd, SHUT_RDWR);
  }
  stop_worker(*c);
  for (int ticks = 0; c->inside && ticks < 100; ++ticks) sleep_ms(10);
  if (!c->inside) delete c;
}

struct Inside {
  Comm *c;
  explicit Inside(Comm *comm) : c(comm) {
    if (c) ++c->inside;
  }
  ~Inside() {
    if (c) --c->inside;
  }
};

// Waits as a fault asks; true if the communicator was aborted meanwhile.
inline bool suffer(Comm *c, Fault fault) {
  if (fault.action == kDelay || fault.action == kDeaf) {
    if (c) ++c->busy;
    sleep_ms(fault.value);
    if (c) --c->busy;
  }
  if (fault.action == kHang)
    for (long ms = 0; ms < fault.value && !(c && c->abort); ms += 5) sleep_ms(5);
  return c && c->abort;
}

// A communicator that is slow to open is not there for an abort in the meantime.
inline void hand_out_late(Fault &fault) {
  if (fault.action != kDelay) return;
  sleep_ms(fault.value);
  fault.action = kNone;
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

inline float from_bf16(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
struct BFloat16 {
  uint16_t bits;
  explicit BFloat16(float f) : bits(to_bf16(f)) {}
  operator float() const { return from_bf16(bits); }
};

enum Op { kSum, kProd, kMax, kMin };

template <class T>
void combine(void *total, const void *with, size_t n, Op op) {
  T *a = static_cast<T *>(total);
  const T *b = static_cast<const T *>(with);
  for (size_t i = 0; i < n; ++i) {
    // Integers wrap like unsigned ones; of a NaN and a number, max and min keep the number, as the vendors do.
    if constexpr (std::is_integral_v<T>) {
      using U = std::conditional_t<sizeof(T) < 4, uint32_t, std::make_unsigned_t<T>>;
      if (op == kSum) a[i] = T(U(a[i]) + U(b[i]));
      if (op == kProd) a[i] = T(U(a[i]) * U(b[i]));
      if (op == kMax) a[i] = std::max(a[i], b[i]);
      if (op == kMin) a[i] = std::min(a[i], b[i]);
    } else {
      using F = std::conditional_t<sizeof(T) == 2, float, T>;
      F x = a[i], y = b[i];
      F z = op == kSum ? x + y : op == kProd ? x * y : y != y ? x : x != x ? y : op == kMax ? std::max(x, y) : std::min(x, y);
      a[i] = T(z);
    }
  }
}

enum Kind { kI8, kU8, kI16, kU16, kI32, kU32, kI64, kU64, kF16, kBF16, kF32, kF64, kOpaque1, kOpaque16 };

inline size_t width(Kind k) {
  switch (k) {
    case kI8: case kU8: case kOpaque1: return 1;
    case kI16: case kU16: case kF16: case kBF16: return 2;
    case kI32: case kU32: case kF32: return 4;
    case kOpaque16: return 16;
    default: return 8;
  }
}

inline bool reduce(void *total, const void *with, size_t n, Kind kind, Op op) {
  switch (kind) {
    case kI8: combine<int8_t>(total, with, n, op); return true;
    case kU8: combine<uint8_t>(total, with, n, op); return true;
    case kI16: combine<int16_t>(total, with, n, op); return true;
    case kU16: combine<uint16_t>(total, with, n, op); return true;
    case kI32: combine<int32_t>(total, with, n, op); return true;
    case kU32: combine<uint32_t>(total, with, n, op); return true;
    case kI64: combine<int64_t>(total, with, n, op); return true;
    case kU64: combine<uint64_t>(total, with, n, op); return true;
    case kF16: combine<_Float16>(total, with, n, op); return true;
    case kBF16: combine<BFloat16>(total, with, n, op); return true;
    case kF32: combine<float>(total, with, n, op); return true;
    case kF64: combine<double>(total, with, n, op); return true;
    default: return false;
  }
}

inline void divide(void *total, size_t n, Kind kind, int by) {
  for (size_t i = 0; i < n; ++i) {
    if (kind == kF32) static_cast<float *>(total)[i] /= float(by);
    if (kind == kF64) static_cast<double *>(total)[i] /= by;
    if (kind == kI32) static_cast<int32_t *>(total)[i] /= by;
    if (kind == kI64) static_cast<int64_t *>(total)[i] /= by;
  }
}

// --- collectives: what each rank sends to and receives from each ----------------------------------------------------

inline uint64_t tag_of(int what, int kind, int op, int root) {
  return (uint64_t(what) << 48) | (uint64_t(kind & 0xff) << 32) | (uint64_t(op & 0xff) << 16) | uint64_t(root & 0xffff);
}

// every[r] is what rank r sends to this one; sent[r] what this one sends to rank r. Lengths in bytes.
inline Result exchange(Comm &c, uint64_t tag, const std::vector<std::pair<const void *, size_t>> &sent,
                       const std::vector<std::pair<void *, size_t>> &every) {
  std::vector<Out> outs;
  std::vector<In> ins;
  for (int r = 0; r < c.size; ++r) {
    if (sent[r].first) outs.push_back({r, sent[r].first, sent[r].second, tag, false});
    if (every[r].first) ins.push_back({r, every[r].first, every[r].second, tag, false});
  }
  return transfer(c, outs, ins);
}

// Fold in rank order what all ranks sent: rank r gets the fold of the blocks at offset r * stride of everybody's send.
inline Result fold(Comm &c, uint64_t tag, const void *send, size_t stride, void *recv, size_t n, Kind kind, Op op,
                   bool mean, int only = -1) {
  size_t nbytes = n * width(kind);
  std::vector<std::vector<char>> rows(c.size, std::vector<char>(nbytes + 1));
  std::vector<std::pair<const void *, size_t>> sent(c.size);
  std::vector<std::pair<void *, size_t>> every(c.size);
  for (int r = 0; r < c.size; ++r) {
    sent[r] = {only >= 0 && r != only ? nullptr : static_cast<const char *>(send) + r * stride, nbytes};
    every[r] = {only >= 0 && c.rank != only ? nullptr : rows[r].data(), nbytes};
  }
  Result result = exchange(c, tag, sent, every);
  if (result != kOk || (only >= 0 && c.rank != only)) return result;
  for (int r = 1; r < c.size; ++r)
    if (!reduce(rows[0].data(), rows[r].data(), n, kind, op)) return fail(kMismatch, "this dtype cannot be reduced");
  if (mean) divide(rows[0].data(), n, kind, c.size);
  memcpy(recv, rows[0].data(), nbytes);
  return kOk;
}

}  // namespace core

// --- what tests call ------------------------------------------------------------------------------------------------

extern "C" {
// The n-th call of symbol from now on (1 is the next) suffers: action 1 status, 2 delay, 3 hang until aborted, 4 hang
// despite an abort, 5 asynchronous error; value is a status, or milliseconds.
__attribute__((visibility("default"), used)) inline void double_fault(const char *symbol, int n, int action, long value) {
  std::lock_guard<std::mutex> hold(core::g_lock);
  core::g_faults[symbol][core::g_calls[symbol] + n] = {static_cast<core::Action>(action), value};
}
__attribute__((visibility("default"), used)) inline void double_clear_faults() {
  std::lock_guard<std::mutex> hold(core::g_lock);
  core::g_faults.clear();
}
__attribute__((visibility("default"), used)) inline long double_calls(const char *symbol) {
  std::lock_guard<std::mutex> hold(core::g_lock);
  return core::g_calls[symbol];
}
__attribute__((visibility("default"), used)) inline int double_live() { return core::g_live; }
__attribute__((visibility("default"), used)) inline int double_aborted() { return core::g_aborted; }
__attribute__((visibility("default"), used)) inline int double_stale() { return core::g_stale; }
}
