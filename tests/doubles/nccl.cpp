// A libnccl.so.2 on host memory. -DDOUBLE_VERSION=22105 builds it as that version, without the symbols that came later.
//
// Stricter than NCCL: ranks that call different things get ncclInvalidUsage instead of a hang, a handle that is not a
// communicator ncclInvalidArgument instead of a crash. Communicators with blocking=0 work in their own thread:
// calls return ncclInProgress, ncclCommGetAsyncError tells how they end, and nothing else may be called meanwhile.
// -DDOUBLE_DEVICE builds it to work as on a device: calls return at once, and what they put on a stream is done later.
#include <limits.h>
#include <stdlib.h>

#include "core.hpp"

#ifndef DOUBLE_VERSION
#define DOUBLE_VERSION 23203
#endif
#define API extern "C" __attribute__((visibility("default"))) int

using namespace core;

enum Code { kSuccess, kCudaError, kSystemError, kInternalError, kInvalidArgument, kInvalidUsage, kRemoteError, kInProgress };

struct UniqueId {
  char internal[128];
};
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking, rest[4];
  const char *net;
  int more[2];
};

static int code_of(Result r) {
  static const int codes[] = {kSuccess, kRemoteError, kInternalError, kInvalidUsage, kSystemError};
  return codes[r];
}

static int refuse(int code, const char *text) {
  g_error = text;
  return code;
}

static const Kind kKinds[] = {kI8, kU8, kI32, kU32, kI64, kU64, kF16, kF32, kF64, kBF16, kOpaque1, kOpaque1};
static const int kTypes = DOUBLE_VERSION >= 22403 ? 12 : 10;

// --- groups of calls ------------------------------------------------------------------------------------------------

struct Call {
  Comm *c;
  void *stream;
  std::function<Result()> run;  // a collective, or
  std::vector<Out> outs;        // one send or receive, which the group joins with the others
  std::vector<In> ins;
  Fault fault;
};
static thread_local int t_depth = 0;
static thread_local std::vector<Call> t_calls;

static int perform(Comm *c, const std::vector<Call> &calls) {
  std::vector<Out> outs;
  std::vector<In> ins;
  int async = 0;
  for (const Call &call : calls) {
    if (suffer(c, call.fault)) return kInternalError;
    if (call.fault.action == kAsync) async = call.fault.value;
    outs.insert(outs.end(), call.outs.begin(), call.outs.end());
    ins.insert(ins.end(), call.ins.begin(), call.ins.end());
  }
  if (async) return async;
  for (const Call &call : calls)
    if (call.run) {
      Result r = call.run();
      if (r != kOk) return code_of(r);
    }
  return code_of(transfer(*c, outs, ins));
}

#ifdef DOUBLE_DEVICE
// What is on the streams and not finished, by the number that it got when it was put there.
static std::mutex g_kernels_lock;
static std::map<long, void *> g_kernels;
static long g_issued = 0;

extern "C" __attribute__((visibility("default"))) long double_issued() {
  std::lock_guard<std::mutex> hold(g_kernels_lock);
  return g_issued;
}

// Whether the stream has finished everything that it had when that number was issued.
API double_reached(void *stream, long number) {
  std::lock_guard<std::mutex> hold(g_kernels_lock);
  for (auto &kernel : g_kernels)
    if (kernel.first <= number && kernel.second == stream) return 0;
  return 1;
}

static int put_on_stream(Comm *c, std::vector<Call> calls) {
  std::lock_guard<std::mutex> hold(g_kernels_lock);
  long number = ++g_issued;
  g_kernels[number] = calls[0].stream;
  submit(*c, [c, number, calls = std::move(calls)] {
    int code = perform(c, calls);
    // A kernel whose peer has gone keeps waiting: nobody tells it.
    while (code == kRemoteError && !c->abort) sleep_ms(2);
    if (code) c->state = code;
    std::lock_guard<std::mutex> hold(g_kernels_lock);
    g_kernels.erase(number);
  });
  return kSuccess;
}
#endif

static int launch(Comm *c, std::vector<Call> calls) {
  if (c->state == kInProgress) return refuse(kInvalidUsage, "the previous call on this communicator is in progress");
  if (c->state) return refuse(kInvalidUsage, "the communicator has failed; abort it");
  if (c->revoked) return refuse(kInvalidUsage, "the communicator was revoked");
  for (const Call &call : calls)
    if (call.fault.action == kDeaf) suffer(c, call.fault);
  if (c->blocking) {
    Inside inside(c);
    int code = perform(c, calls);
    if (code) c->state = code;
    return code;
  }
#ifdef DOUBLE_DEVICE
  if (calls[0].stream) return put_on_stream(c, std::move(calls));
#endif
  c->state = kInProgress;
  submit(*c, [c, calls = std::move(calls)] { c->state = perform(c, calls); });
  return kInProgress;
}

static int issue(Call call) {
  if (t_depth) {
    t_calls.push_back(std::move(call));
    return kSuccess;
  }
  return launch(call.c, {std::move(call)});
}

#define ENTER(symbol)                                  \
  Fault fault = enter(symbol);                         \
  if (fault.action == kStatus) {                       \
    g_error = std::string("planted in ") + symbol;     \
    return static_cast<int>(fault.value);              \
  }
#define ENTER_NOW(symbol, comm) \
  ENTER(symbol)                 \
  if (suffer(comm, fault)) return kInternalError;
#define FIND(c, handle)                                                              \
  Comm *c = look_up(handle);                                                         \
  if (!c) return refuse(kInvalidArgument, handle ? "comm is not a communicator" : "comm argument is NULL");

API ncclGroupStart() {
  ENTER_NOW("ncclGroupStart", nullptr)
  ++t_depth;
  return kSuccess;
}

API ncclGroupEnd() {
  Fault fault = enter("ncclGroupEnd");
  if (!t_depth) return refuse(kInvalidUsage, "ncclGroupEnd without ncclGroupStart");
  if (--t_depth) return kSuccess;
  std::map<Comm *, std::vector<Call>> each;
  std::set<void *> streams;
  for (Call &call : t_calls) {
    streams.insert(call.stream);
    if (each[call.c].empty()) call.fault = fault.action > kStatus ? fault : call.fault;
    each[call.c].push_back(std::move(call));
  }
  t_calls.clear();
  if (fault.action == kStatus) return refuse(fault.value, "planted in ncclGroupEnd");
  if (streams.size() > 1) return refuse(kInvalidUsage, "one group of calls on several streams");
  int result = kSuccess;
  for (auto &pair : each) {
    int code = launch(pair.first, std::move(pair.second));
    if (code && result != kInProgress) result = code;
  }
  return result;
}

// --- about the library ----------------------------------------------------------------------------------------------

API ncclGetVersion(int *version) {
  ENTER_NOW("ncclGetVersion", nullptr)
  if (!version) return refuse(kInvalidArgument, "version argument is NULL");
  *version = DOUBLE_VERSION;
  return kSuccess;
}

extern "C" __attribute__((visibility("default"))) const char *ncclGetErrorString(int code) {
  enter("ncclGetErrorString");
  static const char *texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                "invalid argument", "invalid usage", "remote process exited or there was a network error",
                                "operation in progress", "timeout"};
  return code >= 0 && code < (DOUBLE_VERSION >= 23003 ? 9 : 8) ? texts[code] : "unknown result code";
}

extern "C" __attribute__((visibility("default"))) const char *ncclGetLastError(void *) {
  enter("ncclGetLastError");
  static thread_local std::string copy;
  copy = g_error;
  return copy.c_str();
}

// --- communicators --------------------------------------------------------------------------------------------------

API ncclGetUniqueId(UniqueId *out) {
  ENTER_NOW("ncclGetUniqueId", nullptr)
  if (!out) return refuse(kInvalidArgument, "uniqueId argument is NULL");
  Id id;
  if (!make_id(&id)) return refuse(kSystemError, "no socket on the loopback interface");
  memset(out, 0, sizeof *out);
  memcpy(out, &id, sizeof id);
  return kSuccess;
}

static int open_comm(void **comm, int nranks, const UniqueId &uid, int rank, const Config *config, Fault fault) {
  Id id;
  memcpy(&id, &uid, sizeof id);
  if (!comm) return refuse(kInvalidArgument, "comm argument is NULL");
  *comm = nullptr;
  if (!is_id(id)) return refuse(kInvalidArgument, "the unique id is not one of ncclGetUniqueId (is it passed by value?)");
  if (nranks < 1 || rank < 0 || rank >= nranks) return refuse(kInvalidArgument, "rank is not in 0 .. nranks-1");
  int blocking = 1;
  if (config) {
    static const size_t sizes[] = {48, 72, 80, 88, 96, 120};
    if (config->magic != 0xcafebeef) return refuse(kInvalidArgument, "config has a wrong magic");
    if (std::find(sizes, sizes + 6, config->size) == sizes + 6) return refuse(kInvalidArgument, "config has a wrong size");
    if (config->version < 21403) return refuse(kInvalidArgument, "config has a wrong version");
    if (config->blocking != INT_MIN) blocking = config->blocking;
    if (blocking != 0 && blocking != 1) return refuse(kInvalidArgument, "config.blocking is neither 0 nor 1");
  }
  hand_out_late(fault);
  auto *c = new Comm(rank, nranks);
  c->blocking = blocking;
  add(c);
  *comm = c;
  auto start = [c, id, fault]() -> int {
    if (suffer(c, fault)) return kInternalError;
    if (fault.action == kAsync) return fault.value;
    return code_of(join(*c, id));
  };
  if (!blocking) {
    start_worker(*c);
    c->state = kInProgress;
    submit(*c, [c, start] { c->state = start(); });
    return kInProgress;
  }
  int code = start();
  if (code) {
    *comm = nullptr;
    destroy(c, true);
  }
  return code;
}

API ncclCommInitRank(void **comm, int nranks, UniqueId id, int rank) {
  ENTER("ncclCommInitRank")
  return open_comm(comm, nranks, id, rank, nullptr, fault);
}

API ncclCommInitRankConfig(void **comm, int nranks, UniqueId id, int rank, Config *config) {
  ENTER("ncclCommInitRankConfig")
  return open_comm(comm, nranks, id, rank, config, fault);
}

API ncclCommFinalize(void *comm) {
  ENTER("ncclCommFinalize")
  FIND(c, comm)
  if (c->revoked) return refuse(kInvalidUsage, "the communicator was revoked");
  return launch(c, {Call{c, nullptr, nullptr, {}, {}, fault}});
}

static int end_comm(void *comm, bool abort) {
  if (!comm) return kSuccess;
  FIND(c, comm)
  destroy(c, abort);
  return kSuccess;
}

API ncclCommDestroy(void *comm) {
  ENTER_NOW("ncclCommDestroy", look_up(comm))
  Comm *c = look_up(comm);
  if (c && c->state == kInProgress) return refuse(kInvalidUsage, "a call on this communicator is in progress; abort it");
  return end_comm(comm, false);
}

API ncclCommAbort(void *comm) {
  ENTER_NOW("ncclCommAbort", look_up(comm))
  return end_comm(comm, true);
}

API ncclCommGetAsyncError(void *comm, int *code) {
  ENTER("ncclCommGetAsyncError")
  FIND(c, comm)
  if (!code) return refuse(kInvalidArgument, "asyncError argument is NULL");
  *code = fault.action == kAsync ? int(fault.value) : c->state.load();
  return kSuccess;
}

#define GETTER(symbol, value)                                                       \
  API symbol(void *comm, int *out) {                                                \
    ENTER_NOW(#symbol, look_up(comm))                                               \
    FIND(c, comm)                                                                   \
    if (!out) return refuse(kInvalidArgument, "the result argument is NULL");       \
    *out = value;                                                                   \
    return kSuccess;                                                                \
  }
GETTER(ncclCommCount, c->size)
GETTER(ncclCommUserRank, c->rank)
GETTER(ncclCommCuDevice, 0 * c->rank)

// A communicator of some ranks of another; the first of them makes its id and passes it on.
static int child(Comm *c, const std::vector<int> &members, void **out) {
  auto mine = std::find(members.begin(), members.end(), c->rank);
  int rank = int(mine - members.begin());
  UniqueId uid{};
  Id id{};
  uint64_t tag = tag_of(20, 0, 0, 0);
  std::vector<Out> outs;
  std::vector<In> ins;
  if (rank == 0) {
    if (!make_id(&id)) return kSystemError;
    for (int r : members) outs.push_back({r, &id, sizeof id, tag, false});
  }
  ins.push_back({members[0], &id, sizeof id, tag, false});
  Result r = transfer(*c, outs, ins);
  if (r != kOk) return code_of(r);
  memcpy(&uid, &id, sizeof id);
  return open_comm(out, int(members.size()), uid, rank, nullptr, {});
}

API ncclCommSplit(void *comm, int color, int key, void **out, Config *) {
  ENTER_NOW("ncclCommSplit", look_up(comm))
  FIND(c, comm)
  if (!out || color < -1) return refuse(kInvalidArgument, "newcomm is NULL, or color is negative and not -1");
  *out = nullptr;
  int mine[2] = {color, key};
  std::vector<int> all(2 * c->size);
  std::vector<std::pair<const void *, size_t>> sent(c->size, {mine, sizeof mine});
  std::vector<std::pair<void *, size_t>> every(c->size);
  for (int r = 0; r < c->size; ++r) every[r] = {&all[2 * r], sizeof mine};
  Result r = exchange(*c, tag_of(21, 0, 0, 0), sent, every);
  if (r != kOk || color == -1) return code_of(r);
  std::vector<int> members;
  for (int s = 0; s < c->size; ++s)
    if (all[2 * s] == color) members.push_back(s);
  std::stable_sort(members.begin(), members.end(), [&](int a, int b) { return all[2 * a + 1] < all[2 * b + 1]; });
  return child(c, members, out);
}

#if DOUBLE_VERSION >= 22703
API ncclCommShrink(void *comm, int *exclude, int n, void **out, Config *, int flags) {
  ENTER_NOW("ncclCommShrink", look_up(comm))
  FIND(c, comm)
  if (!exclude || n < 1 || !out || flags < 0 || flags > 1) return refuse(kInvalidArgument, "exclude, count, newcomm or flags");
  std::vector<int> members;
  for (int r = 0; r < c->size; ++r)
    if (std::find(exclude, exclude + n, r) == exclude + n) members.push_back(r);
  return child(c, members, out);
}
#endif

#if DOUBLE_VERSION >= 22807
API ncclCommRevoke(void *comm, int flags) {
  ENTER_NOW("ncclCommRevoke", look_up(comm))
  FIND(c, comm)
  if (flags) return refuse(kInvalidArgument, "flags is not 0");
  c->revoked = true;
  return kSuccess;
}
#endif

// --- memory ---------------------------------------------------------------------------------------------------------

API ncclMemAlloc(void **out, size_t nbytes) {
  ENTER_NOW("ncclMemAlloc", nullptr)
  if (!out) return refuse(kInvalidArgument, "ptr argument is NULL");
  *out = malloc(nbytes);
  return kSuccess;
}
API ncclMemFree(void *p) {
  ENTER_NOW("ncclMemFree", nullptr)
  free(p);
  return kSuccess;
}
API ncclCommRegister(void *comm, void *buffer, size_t nbytes, void **handle) {
  ENTER_NOW("ncclCommRegister", look_up(comm))
  FIND(c, comm)
  if (!buffer || !nbytes || !handle) return refuse(kInvalidArgument, "buffer, size or handle");
  *handle = buffer;
  return kSuccess;
}
API ncclCommDeregister(void *comm, void *handle) {
  ENTER_NOW("ncclCommDeregister", look_up(comm))
  FIND(c, comm)
  return handle ? int(kSuccess) : refuse(kInvalidArgument, "handle is NULL");
}

// --- collectives ----------------------------------------------------------------------------------------------------

static int check_buffer(const void *p, size_t count, int dtype) {
  if (dtype < 0 || dtype >= kTypes) return refuse(kInvalidArgument, "datatype is not one of this version");
  size_t w = width(kKinds[dtype]);
  if (count > (size_t(1) << 46) / w) return refuse(kInvalidArgument, "count is absurd");
  if (count && !p) return refuse(kInvalidArgument, "a buffer is NULL");
  if (reinterpret_cast<uintptr_t>(p) % w) return refuse(kInvalidArgument, "a buffer is not aligned to its datatype");
  return kSuccess;
}

#define CHECK(code) \
  if (int code_ = (code)) return code_;
#define CHECK_OP(op) \
  if (op < 0 || op > 4) return refuse(kInvalidArgument, "op is not ncclSum, Prod, Max, Min or Avg");
#define CHECK_ROOT(root) \
  if (root < 0 || root >= c->size) return refuse(kInvalidArgument, "root is not a rank");

static Op op_of(int op) { return op == 4 ? kSum : static_cast<Op>(op); }
static bool overlap(const void *a, size_t n, const void *b, size_t m) {
  auto p = reinterpret_cast<uintptr_t>(a), q = reinterpret_cast<uintptr_t>(b);
  return n && m && p < q + m && q < p + n;
}

API ncclAllReduce(const void *send, void *recv, size_t n, int dtype, int op, void *comm, void *stream) {
  ENTER("ncclAllReduce")
  FIND(c, comm)
  CHECK(check_buffer(send, n, dtype)) CHECK(check_buffer(recv, n, dtype)) CHECK_OP(op)
  Kind k = kKinds[dtype];
  if (send != recv && overlap(send, n * width(k), recv, n * width(k)))
    return refuse(kInvalidArgument, "send and recv overlap in part");
  return issue({c, stream, [=] { return fold(*c, tag_of(1, dtype, op, 0), send, 0, recv, n, k, op_of(op), op == 4); }, {}, {}, fault});
}

API ncclReduce(const void *send, void *recv, size_t n, int dtype, int op, int root, void *comm, void *stream) {
  ENTER("ncclReduce")
  FIND(c, comm)
  CHECK(check_buffer(send, n, dtype)) CHECK_OP(op) CHECK_ROOT(root)
  if (c->rank == root) CHECK(check_buffer(recv, n, dtype))
  return issue({c, stream, [=] { return fold(*c, tag_of(2, dtype, op, root), send, 0, recv, n, kKinds[dtype], op_of(op), op == 4, root); }, {}, {}, fault});
}

API ncclReduceScatter(const void *send, void *recv, size_t n, int dtype, int op, void *comm, void *stream) {
  ENTER("ncclReduceScatter")
  FIND(c, comm)
  CHECK(check_buffer(send, n * c->size, dtype)) CHECK(check_buffer(recv, n, dtype)) CHECK_OP(op)
  Kind k = kKinds[dtype];
  return issue({c, stream, [=] { return fold(*c, tag_of(3, dtype, op, 0), send, n * width(k), recv, n, k, op_of(op), op == 4); }, {}, {}, fault});
}

// Byte counts of each pair of ranks, the same blocks for send and recv; root >= 0 keeps only its sends, or receives.
static Result blocks(Comm *c, uint64_t tag, const void *send, size_t send_stride, void *recv, size_t recv_stride,
                     size_t nbytes, int from, int to) {
  std::vector<std::pair<const void *, size_t>> sent(c->size);
  std::vector<std::pair<void *, size_t>> every(c->size);
  static char nothing;
  for (int r = 0; r < c->size; ++r) {
    if ((from < 0 || c->rank == from) && (to < 0 || r == to))
      sent[r] = {nbytes ? static_cast<const char *>(send) + r * send_stride : &nothing, nbytes};
    if ((from < 0 || r == from) && (to < 0 || c->rank == to))
      every[r] = {nbytes ? static_cast<char *>(recv) + r * recv_stride : &nothing, nbytes};
  }
  return exchange(*c, tag, sent, every);
}

API ncclBroadcast(const void *send, void *recv, size_t n, int dtype, int root, void *comm, void *stream) {
  ENTER("ncclBroadcast")
  FIND(c, comm)
  CHECK_ROOT(root) CHECK(check_buffer(recv, n, dtype))
  if (c->rank == root) CHECK(check_buffer(send, n, dtype))
  return issue({c, stream, [=] { return blocks(c, tag_of(4, dtype, 0, root), send, 0, recv, 0, n * width(kKinds[dtype]), root, -1); }, {}, {}, fault});
}

API ncclAllGather(const void *send, void *recv, size_t n, int dtype, void *comm, void *stream) {
  ENTER("ncclAllGather")
  FIND(c, comm)
  CHECK(check_buffer(send, n, dtype)) CHECK(check_buffer(recv, n * c->size, dtype))
  size_t nbytes = n * width(kKinds[dtype]);
  return issue({c, stream, [=] { return blocks(c, tag_of(5, dtype, 0, 0), send, 0, recv, nbytes, nbytes, -1, -1); }, {}, {}, fault});
}

#if DOUBLE_VERSION >= 22803
API ncclAlltoAll(const void *send, void *recv, size_t n, int dtype, void *comm, void *stream) {
  ENTER("ncclAlltoAll")
  FIND(c, comm)
  CHECK(check_buffer(send, n * c->size, dtype)) CHECK(check_buffer(recv, n * c->size, dtype))
  size_t nbytes = n * width(kKinds[dtype]);
  if (overlap(send, nbytes * c->size, recv, nbytes * c->size)) return refuse(kInvalidArgument, "in-place is not supported");
  return issue({c, stream, [=] { return blocks(c, tag_of(6, dtype, 0, 0), send, nbytes, recv, nbytes, nbytes, -1, -1); }, {}, {}, fault});
}

API ncclGather(const void *send, void *recv, size_t n, int dtype, int root, void *comm, void *stream) {
  ENTER("ncclGather")
  FIND(c, comm)
  CHECK_ROOT(root) CHECK(check_buffer(send, n, dtype))
  if (c->rank == root) CHECK(check_buffer(recv, n * c->size, dtype))
  size_t nbytes = n * width(kKinds[dtype]);
  return issue({c, stream, [=] { return blocks(c, tag_of(7, dtype, 0, root), send, 0, recv, nbytes, nbytes, -1, root); }, {}, {}, fault});
}

API ncclScatter(const void *send, void *recv, size_t n, int dtype, int root, void *comm, void *stream) {
  ENTER("ncclScatter")
  FIND(c, comm)
  CHECK_ROOT(root) CHECK(check_buffer(recv, n, dtype))
  if (c->rank == root) CHECK(check_buffer(send, n * c->size, dtype))
  size_t nbytes = n * width(kKinds[dtype]);
  return issue({c, stream, [=] { return blocks(c, tag_of(8, dtype, 0, root), send, nbytes, recv, 0, nbytes, root, -1); }, {}, {}, fault});
}
#endif

API ncclSend(const void *buffer, size_t n, int dtype, int peer, void *comm, void *stream) {
  ENTER("ncclSend")
  FIND(c, comm)
  CHECK(check_buffer(buffer, n, dtype)) CHECK_ROOT(peer)
  return issue({c, stream, nullptr, {{peer, buffer, n * width(kKinds[dtype]), tag_of(9, dtype, 0, 0), true}}, {}, fault});
}

API ncclRecv(void *buffer, size_t n, int dtype, int peer, void *comm, void *stream) {
  ENTER("ncclRecv")
  FIND(c, comm)
  CHECK(check_buffer(buffer, n, dtype)) CHECK_ROOT(peer)
  return issue({c, stream, nullptr, {}, {{peer, buffer, n * width(kKinds[dtype]), tag_of(9, dtype, 0, 0), true}}, fault});
}
