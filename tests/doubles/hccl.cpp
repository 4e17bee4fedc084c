// A libhccl.so on host memory. -DDOUBLE_PART=1 builds only the operators and -DDOUBLE_PART=2 only communicator
// management (libhcomm.so), as newer CANN splits them; without it, one library has both, as older CANN.
//
// Calls work in the caller's thread and return when they are done. HcclCommDestroy from another thread ends those that
// wait for a peer; while others are in progress it returns HCCL_E_AGAIN and destroys nothing, as documented.
// Once a thread has a device (double_set_device), calls from threads that have none are refused, as on an NPU.
// The parts share core.hpp's variables: they are compiled with default visibility, which makes those one per process.
#include "core.hpp"

#define API extern "C" __attribute__((visibility("default"))) int

using namespace core;

enum Code { kSuccess, kPara, kPtr, kMemory, kInternal, kNotSupport, kTcpTransfer = 13, kRuntime = 15, kAgain = 20, kRemoteError = 21 };
using u32 = uint32_t;
using u64 = uint64_t;

struct Config {
  size_t size;
  u32 magic, version;
  u64 reserved;
  u32 buffer_mb, deterministic;
  char name[128], udi[128];
  u32 rest[3];
};

[[maybe_unused]] static int code_of(Result r) {
  static const int codes[] = {kSuccess, kRemoteError, kInternal, kPara, kTcpTransfer};
  return codes[r];
}

[[maybe_unused]] static const Kind kKinds[] = {kI8, kI16, kI32, kF16, kF32, kI64, kU64, kU8, kU16, kU32, kF64, kBF16, kOpaque16,
                              kOpaque1, kOpaque1, kOpaque1, kOpaque1, kOpaque1};

inline std::atomic<bool> g_on_device{false};
inline thread_local bool t_has_device = false;

static Fault enter_with_device(const char *symbol) {
  return g_on_device && !t_has_device ? Fault{kStatus, kRuntime} : enter(symbol);
}

#define ENTER_WITH(symbol, comm)                                         \
  Fault fault = enter_with_device(symbol);                               \
  if (fault.action == kStatus) return static_cast<int>(fault.value);     \
  Inside inside(comm);                                                   \
  if (suffer(comm, fault)) return kInternal;                             \
  if (fault.action == kAsync && comm) static_cast<Comm *>(comm)->state = static_cast<int>(fault.value);
#define NONE static_cast<Comm *>(nullptr)
#define FIND(c, handle)        \
  Comm *c = look_up(handle);   \
  if (!handle) return kPtr;    \
  if (!c) return kPara;

#if !defined(DOUBLE_PART) || DOUBLE_PART == 2
extern "C" __attribute__((visibility("default"))) void double_set_device(int has) {
  g_on_device = true;
  t_has_device = has;
}

constexpr size_t kRootInfoBytes = 4108;

// --- communicators --------------------------------------------------------------------------------------------------

extern "C" __attribute__((visibility("default"))) const char *HcclGetErrorString(int code) {
  enter("HcclGetErrorString");
  static const char *texts[] = {"no error", "parameter error", "empty pointer", "memory error", "internal error",
                                "not supported", "not found", "unavailable", "system call error", "timeout"};
  return code >= 0 && code < 10 ? texts[code] : code == 21 ? "remote error" : "unknown error";
}

API HcclGetRootInfo(char *out) {
  ENTER_WITH("HcclGetRootInfo", NONE)
  if (!out) return kPtr;
  Id id;
  if (!make_id(&id)) return kTcpTransfer;
  memset(out, 0, kRootInfoBytes);
  memcpy(out + kRootInfoBytes - sizeof id, &id, sizeof id);  // at the end, so that a short copy loses it
  return kSuccess;
}

static int open_comm(u32 nranks, const char *root, u32 rank, const char *name, void **comm, Fault fault) {
  if (!root || !comm) return kPtr;
  Id id;
  memcpy(&id, root + kRootInfoBytes - sizeof id, sizeof id);
  if (!is_id(id) || !nranks || rank >= nranks) return kPara;
  hand_out_late(fault);
  auto *c = new Comm(int(rank), int(nranks));
  c->name = name;
  add(c);
  // The handle is given out first: a caller that has waited long enough can end the call by destroying it.
  *comm = c;
  Inside inside(c);
  int code = suffer(c, fault) ? int(kInternal) : code_of(join(*c, id));
  return code;
}

API HcclCommInitRootInfo(u32 nranks, const char *root, u32 rank, void **comm) {
  Fault fault = enter_with_device("HcclCommInitRootInfo");
  if (fault.action == kStatus) return fault.value;
  return open_comm(nranks, root, rank, "hccl_world", comm, fault);
}

API HcclCommInitRootInfoConfig(u32 nranks, const char *root, u32 rank, const Config *config, void **comm) {
  Fault fault = enter_with_device("HcclCommInitRootInfoConfig");
  if (fault.action == kStatus) return fault.value;
  if (!config) return kPtr;
  if (config->magic != 0xf0f0f0f0 || config->reserved || !config->version || config->version > 10) return kPara;
  if (config->size < 300 || (config->version == 5 && config->size != 300 && config->size != 304)) return kPara;
  if (config->deterministic > 1 && config->deterministic != 0xffffffff) return kPara;
  if (!memchr(config->name, 0, 128)) return kPara;
  return open_comm(nranks, root, rank, config->name, comm, fault);
}

API HcclCommDestroy(void *comm) {
  Fault fault = enter_with_device("HcclCommDestroy");
  if (fault.action == kStatus) return fault.value;
  FIND(c, comm)
  if (c->busy) return kAgain;
  if (suffer(c, fault)) return kInternal;
  destroy(c, c->inside > 0 || c->state);
  return kSuccess;
}

#define GETTER(symbol, type, value)               \
  API symbol(void *comm, type *out) {             \
    FIND(c, comm)                                 \
    ENTER_WITH(#symbol, c)                        \
    if (!out) return kPtr;                        \
    *out = value;                                 \
    return kSuccess;                              \
  }
GETTER(HcclGetRankSize, u32, u32(c->size))
GETTER(HcclGetRankId, u32, u32(c->rank))
API HcclGetCommAsyncError(void *comm, int *out) {
  Fault fault = enter_with_device("HcclGetCommAsyncError");
  if (fault.action == kStatus) return fault.value;
  FIND(c, comm)
  if (!out) return kPtr;
  *out = fault.action == kAsync ? int(fault.value) : c->state.load();
  return kSuccess;
}

API HcclGetCommName(void *comm, char *out) {
  FIND(c, comm)
  ENTER_WITH("HcclGetCommName", c)
  if (!out) return kPtr;
  memset(out, 0, 128);
  memcpy(out, c->name.data(), std::min<size_t>(c->name.size(), 127));
  return kSuccess;
}

API HcclCommSuspend(void *comm) {
  FIND(c, comm)
  ENTER_WITH("HcclCommSuspend", c)
  c->revoked = true;
  return kSuccess;
}
API HcclCommResume(void *comm) {
  FIND(c, comm)
  ENTER_WITH("HcclCommResume", c)
  c->revoked = false;
  return kSuccess;
}

static int g_deterministic = 0;
union ConfigValue {
  int32_t value;
};
API HcclSetConfig(int config, ConfigValue value) {
  ENTER_WITH("HcclSetConfig", NONE)
  if (config != 0) return kPara;
  g_deterministic = value.value;
  return kSuccess;
}
API HcclGetConfig(int config, ConfigValue *value) {
  ENTER_WITH("HcclGetConfig", NONE)
  if (!value) return kPtr;
  if (config != 0) return kPara;
  value->value = g_deterministic;
  return kSuccess;
}

#endif
#if !defined(DOUBLE_PART) || DOUBLE_PART == 1
// --- operators ------------------------------------------------------------------------------------------------------

static int check_buffer(const void *p, u64 count, int dtype) {
  if (dtype < 0 || dtype > 17 || dtype == 13) return kPara;
  size_t w = width(kKinds[dtype]);
  if (count > (u64(1) << 46) / w) return kPara;
  if (count && !p) return kPtr;
  return reinterpret_cast<uintptr_t>(p) % std::min<size_t>(w, 8) ? kPara : kSuccess;
}

// As documented for Atlas A2 and A3: no unsigned, no 64-bit float, no prod of int16 and bf16.
static int check_reduction(int dtype, int op) {
  if (op < 0 || op > 3) return kPara;
  bool known = dtype == 0 || dtype == 1 || dtype == 2 || dtype == 3 || dtype == 4 || dtype == 5 || dtype == 11;
  return known && !(op == 1 && (dtype == 1 || dtype == 11)) ? kSuccess : kNotSupport;
}

#define CHECK(code) \
  if (int code_ = (code)) return code_;
#define BEGIN(symbol)                      \
  FIND(c, comm)                            \
  ENTER_WITH(symbol, c)                    \
  if (!stream) return kPtr;                \
  if (c->revoked) return 22;

static int done(Comm *c, Result r) {
  int code = code_of(r);
  if (code) c->state = code;
  return code;
}

static size_t bytes(u64 count, int dtype) { return count * width(kKinds[dtype]); }

API HcclAllReduce(void *send, void *recv, u64 n, int dtype, int op, void *comm, void *stream) {
  BEGIN("HcclAllReduce")
  CHECK(check_buffer(send, n, dtype)) CHECK(check_buffer(recv, n, dtype)) CHECK(check_reduction(dtype, op))
  return done(c, fold(*c, tag_of(1, dtype, op, 0), send, 0, recv, n, kKinds[dtype], Op(op), false));
}

API HcclReduce(void *send, void *recv, u64 n, int dtype, int op, u32 root, void *comm, void *stream) {
  BEGIN("HcclReduce")
  CHECK(check_buffer(send, n, dtype)) CHECK(check_buffer(recv, n, dtype)) CHECK(check_reduction(dtype, op))
  if (root >= u32(c->size)) return kPara;
  return done(c, fold(*c, tag_of(2, dtype, op, root), send, 0, recv, n, kKinds[dtype], Op(op), false, root));
}

API HcclReduceScatter(void *send, void *recv, u64 n, int dtype, int op, void *comm, void *stream) {
  BEGIN("HcclReduceScatter")
  CHECK(check_buffer(send, n * c->size, dtype)) CHECK(check_buffer(recv, n, dtype)) CHECK(check_reduction(dtype, op))
  return done(c, fold(*c, tag_of(3, dtype, op, 0), send, bytes(n, dtype), recv, n, kKinds[dtype], Op(op), false));
}

using Blocks = std::vector<std::pair<size_t, size_t>>;  // offset and length in bytes for each rank; length -1: none
static Blocks regular(Comm *c, size_t stride, size_t nbytes) {
  Blocks b;
  for (int r = 0; r < c->size; ++r) b.push_back({r * stride, nbytes});
  return b;
}
static Blocks listed(Comm *c, const u64 *counts, const u64 *offsets, int dtype) {
  Blocks b;
  for (int r = 0; r < c->size; ++r) b.push_back({bytes(offsets[r], dtype), bytes(counts[r], dtype)});
  return b;
}

static Result exchange_blocks(Comm *c, u64 tag, const void *send, const Blocks &s, void *recv, const Blocks &d) {
  std::vector<std::pair<const void *, size_t>> sent(c->size);
  std::vector<std::pair<void *, size_t>> every(c->size);
  static char nothing;
  for (int r = 0; r < c->size; ++r) {
    if (!s.empty()) sent[r] = {s[r].second ? static_cast<const char *>(send) + s[r].first : &nothing, s[r].second};
    if (!d.empty()) every[r] = {d[r].second ? static_cast<char *>(recv) + d[r].first : &nothing, d[r].second};
  }
  return exchange(*c, tag, sent, every);
}

API HcclReduceScatterV(void *send, const u64 *counts, const u64 *offsets, void *recv, u64 n, int dtype, int op, void *comm,
                       void *stream) {
  BEGIN("HcclReduceScatterV")
  if (!counts || !offsets) return kPtr;
  CHECK(check_buffer(recv, n, dtype)) CHECK(check_reduction(dtype, op))
  if (op == 1 || dtype == 5) return kNotSupport;  // int64: on Atlas A2
  if (counts[c->rank] != n) return kPara;
  std::vector<std::vector<char>> rows(c->size, std::vector<char>(bytes(n, dtype) + 1));
  std::vector<std::pair<const void *, size_t>> sent(c->size);
  std::vector<std::pair<void *, size_t>> every(c->size);
  for (int r = 0; r < c->size; ++r) {
    sent[r] = {static_cast<char *>(send) + bytes(offsets[r], dtype), bytes(counts[r], dtype)};
    every[r] = {rows[r].data(), bytes(n, dtype)};
  }
  Result result = exchange(*c, tag_of(4, dtype, op, 0), sent, every);
  for (int r = 1; result == kOk && r < c->size; ++r) reduce(rows[0].data(), rows[r].data(), n, kKinds[dtype], Op(op));
  if (result == kOk) memcpy(recv, rows[0].data(), bytes(n, dtype));
  return done(c, result);
}

API HcclBroadcast(void *buffer, u64 n, int dtype, u32 root, void *comm, void *stream) {
  BEGIN("HcclBroadcast")
  CHECK(check_buffer(buffer, n, dtype))
  if (root >= u32(c->size)) return kPara;
  Blocks from_root(c->size, {0, 0});
  std::vector<Out> outs;
  std::vector<In> ins;
  u64 tag = tag_of(5, dtype, 0, root);
  if (c->rank == int(root)) {
    for (int r = 0; r < c->size; ++r)
      if (r != c->rank) outs.push_back({r, buffer, bytes(n, dtype), tag, false});
  } else {
    ins.push_back({int(root), buffer, bytes(n, dtype), tag, false});
  }
  return done(c, transfer(*c, outs, ins));
}

API HcclAllGather(void *send, void *recv, u64 n, int dtype, void *comm, void *stream) {
  BEGIN("HcclAllGather")
  CHECK(check_buffer(send, n, dtype)) CHECK(check_buffer(recv, n * c->size, dtype))
  size_t nbytes = bytes(n, dtype);
  return done(c, exchange_blocks(c, tag_of(6, dtype, 0, 0), send, regular(c, 0, nbytes), recv, regular(c, nbytes, nbytes)));
}

API HcclAllGatherV(void *send, u64 n, void *recv, const u64 *counts, const u64 *offsets, int dtype, void *comm,
                   void *stream) {
  BEGIN("HcclAllGatherV")
  if (!counts || !offsets) return kPtr;
  CHECK(check_buffer(send, n, dtype))
  if (counts[c->rank] != n) return kPara;
  return done(c, exchange_blocks(c, tag_of(7, dtype, 0, 0), send, regular(c, 0, bytes(n, dtype)), recv,
                                 listed(c, counts, offsets, dtype)));
}

API HcclScatter(void *send, void *recv, u64 n, int dtype, u32 root, void *comm, void *stream) {
  BEGIN("HcclScatter")
  CHECK(check_buffer(recv, n, dtype))
  if (root >= u32(c->size)) return kPara;
  bool mine = c->rank == int(root);
  if (mine) CHECK(check_buffer(send, n * c->size, dtype))
  std::vector<Out> outs;
  u64 tag = tag_of(8, dtype, 0, root);
  size_t nbytes = bytes(n, dtype);
  if (mine)
    for (int r = 0; r < c->size; ++r) outs.push_back({r, static_cast<char *>(send) + r * nbytes, nbytes, tag, false});
  return done(c, transfer(*c, outs, {{int(root), recv, nbytes, tag, false}}));
}

API HcclAlltoAll(const void *send, u64 n, int dtype, const void *recv, u64 m, int rdtype, void *comm, void *stream) {
  BEGIN("HcclAlltoAll")
  CHECK(check_buffer(send, n * c->size, dtype)) CHECK(check_buffer(recv, m * c->size, rdtype))
  if (n != m || dtype != rdtype || (n && send == recv)) return kPara;
  Blocks b = regular(c, bytes(n, dtype), bytes(n, dtype));
  return done(c, exchange_blocks(c, tag_of(9, dtype, 0, 0), send, b, const_cast<void *>(recv), b));
}

API HcclAlltoAllV(const void *send, const u64 *scounts, const u64 *soffsets, int dtype, const void *recv,
                  const u64 *rcounts, const u64 *roffsets, int rdtype, void *comm, void *stream) {
  BEGIN("HcclAlltoAllV")
  if (!scounts || !soffsets || !rcounts || !roffsets) return kPtr;
  CHECK(check_buffer(send, 0, dtype)) CHECK(check_buffer(recv, 0, rdtype))
  for (int r = 0; r < c->size; ++r) {
    if (scounts[r]) CHECK(check_buffer(send, soffsets[r] + scounts[r], dtype))
    if (rcounts[r]) CHECK(check_buffer(recv, roffsets[r] + rcounts[r], rdtype))
  }
  return done(c, exchange_blocks(c, tag_of(10, dtype, 0, 0), send, listed(c, scounts, soffsets, dtype),
                                 const_cast<void *>(recv), listed(c, rcounts, roffsets, rdtype)));
}

API HcclAlltoAllVC(const void *send, const u64 *matrix, int dtype, const void *recv, int rdtype, void *comm,
                   void *stream) {
  BEGIN("HcclAlltoAllVC")
  if (!matrix) return kPtr;
  CHECK(check_buffer(send, 0, dtype)) CHECK(check_buffer(recv, 0, rdtype))
  std::vector<u64> scounts, soffsets, rcounts, roffsets;
  u64 s = 0, d = 0;
  for (int r = 0; r < c->size; ++r) {
    scounts.push_back(matrix[c->rank * c->size + r]);
    rcounts.push_back(matrix[r * c->size + c->rank]);
    soffsets.push_back(s);
    roffsets.push_back(d);
    s += scounts[r];
    d += rcounts[r];
  }
  return done(c, exchange_blocks(c, tag_of(11, dtype, 0, 0), send, listed(c, scounts.data(), soffsets.data(), dtype),
                                 const_cast<void *>(recv), listed(c, rcounts.data(), roffsets.data(), rdtype)));
}

API HcclSend(void *buffer, u64 n, int dtype, u32 peer, void *comm, void *stream) {
  BEGIN("HcclSend")
  CHECK(check_buffer(buffer, n, dtype))
  if (peer >= u32(c->size) || int(peer) == c->rank) return kPara;
  return done(c, transfer(*c, {{int(peer), buffer, bytes(n, dtype), tag_of(12, dtype, 0, 0), true}}, {}));
}

API HcclRecv(void *buffer, u64 n, int dtype, u32 peer, void *comm, void *stream) {
  BEGIN("HcclRecv")
  CHECK(check_buffer(buffer, n, dtype))
  if (peer >= u32(c->size) || int(peer) == c->rank) return kPara;
  return done(c, transfer(*c, {}, {{int(peer), buffer, bytes(n, dtype), tag_of(12, dtype, 0, 0), true}}));
}

struct Item {
  int kind;
  void *buffer;
  u64 count;
  int dtype;
  u32 peer;
};
static_assert(sizeof(Item) == 32, "the layout of HcclSendRecvItem");

API HcclBatchSendRecv(Item *items, u32 n, void *comm, void *stream) {
  BEGIN("HcclBatchSendRecv")
  if (!items) return kPtr;
  if (!n) return kPara;
  std::vector<Out> outs;
  std::vector<In> ins;
  for (u32 i = 0; i < n; ++i) {
    const Item &x = items[i];
    CHECK(check_buffer(x.buffer, x.count, x.dtype))
    if (x.kind < 0 || x.kind > 1 || x.peer >= u32(c->size) || int(x.peer) == c->rank) return kPara;
    u64 tag = tag_of(12, x.dtype, 0, 0);
    if (x.kind == 0) outs.push_back({int(x.peer), x.buffer, bytes(x.count, x.dtype), tag, true});
    if (x.kind == 1) ins.push_back({int(x.peer), x.buffer, bytes(x.count, x.dtype), tag, true});
  }
  return done(c, transfer(*c, outs, ins));
}

API HcclBarrier(void *comm, void *stream) {
  BEGIN("HcclBarrier")
  char here = 1;
  std::vector<char> all(c->size);
  return done(c, exchange_blocks(c, tag_of(13, 0, 0, 0), &here, regular(c, 0, 1), all.data(), regular(c, 1, 1)));
}
#endif
