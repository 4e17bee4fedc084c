// The shared-memory engine's C interface, shaped like NCCL's: a communicator, and one function per collective.
// Every buffer is contiguous, every count is in elements, every size named *_bytes or `width` is in bytes. Inputs are
// never written, inputs and outputs never overlap. All functions are safe to call from any thread; calls on one
// communicator are serialised. If a function returns anything other than FCOMM_OK, the contents of `out` are
// meaningless.
// The implementation, in the order to read it:
//
//   layout.h            the shared region, and the one protocol: rounds of two slots
//   comm.h, comm.cpp    a rank's own view of it; opening, waiting, failing, closing
//   rounds.h            a collective is rounds of filling and draining
//   reduce.cpp          all_reduce, reduce, scan, reduce_scatter     kernels.*   their arithmetic, per instruction set
//   move.cpp            the collectives that only move bytes         blocks.h    blocks in the rows of a matrix
//   ring.cpp            send and recv
//   direct.*            large blocks straight into a peer's result
//   pool.*              memory of results
//   binding.cpp         these functions for Python
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)  // everything else in the library is hidden

#define FCOMM_ABI 2
#define FCOMM_MAX_RANKS 240  // one SCM_RIGHTS message carries at most 253 descriptors, one per peer's life
#define FCOMM_TEXT_BYTES 1024
#define FCOMM_MAX_DIMS 16

typedef struct fcomm_comm fcomm_comm;

typedef enum {
  FCOMM_OK = 0,
  FCOMM_DIED = 1,         // a peer's process ended before it took part
  FCOMM_LEFT = 2,         // a peer closed the group before it took part
  FCOMM_TIMEOUT = 3,      // no progress within the deadline
  FCOMM_MISMATCH = 4,     // the ranks ask for different things
  FCOMM_INTERRUPTED = 5,  // the interrupt hook asked to stop (Ctrl-C)
  FCOMM_POISONED = 6,     // an earlier call failed
  FCOMM_CLOSED = 7,
  FCOMM_FORKED = 8,   // this process is a fork of the one that opened the group
  FCOMM_INVALID = 9,  // arguments
  FCOMM_SYSTEM = 10,  // a system call failed; errno says why
} fcomm_status;

typedef enum {
  FCOMM_BOOL,
  FCOMM_UINT8,
  FCOMM_INT8,
  FCOMM_INT16,
  FCOMM_UINT16,
  FCOMM_INT32,
  FCOMM_UINT32,
  FCOMM_INT64,
  FCOMM_UINT64,
  FCOMM_FLOAT16,
  FCOMM_BFLOAT16,
  FCOMM_FLOAT32,
  FCOMM_FLOAT64,
  FCOMM_COMPLEX64,
  FCOMM_COMPLEX128,
  FCOMM_FLOAT8_E4M3FN,
  FCOMM_FLOAT8_E5M2,
  FCOMM_DTYPES,
} fcomm_dtype;

typedef enum {
  FCOMM_SUM,
  FCOMM_MEAN,
  FCOMM_MAX,
  FCOMM_MIN,
  FCOMM_PROD,
  FCOMM_BAND,
  FCOMM_BOR,
  FCOMM_BXOR,
  FCOMM_OPS,
} fcomm_op;

// size blocks side by side along one dimension: a matrix of `rows` rows, block j taking widths[j] bytes of each row.
// With widths == NULL every block takes `width`.
typedef struct {
  size_t rows;
  size_t width;
  const size_t *widths;
} fcomm_blocks;

// What a message between two ranks is, besides its bytes.
typedef struct {
  int32_t dtype;
  int32_t ndim;
  int64_t dims[FCOMM_MAX_DIMS];
} fcomm_signature;

typedef struct {
  int32_t reason;    // the fcomm_status that broke the group
  int32_t culprit;   // the rank at fault
  int32_t reporter;  // the rank that noticed first
  uint32_t round;
} fcomm_failure;

typedef struct {
  size_t in_use_bytes, idle_bytes, limit_bytes;
  size_t hits, misses, blocks_in_use;
} fcomm_pool_report;

// Opening. Rank 0 formats a region of fcomm_region_bytes(size) bytes and passes its descriptor on; every rank opens
// it. life_fds[p] becomes readable or hangs up when rank p's process ends (a pidfd, or a pipe); the communicator owns
// these descriptors and that of the region. first_round is where the 32-bit round counter starts (tests start it near
// its end).
size_t fcomm_region_bytes(int size);
fcomm_status fcomm_format(int fd, int size, uint64_t nonce, uint32_t first_round);
fcomm_status fcomm_open(int fd, int rank, int size, const int *life_fds, uint64_t nonce, double timeout_s,
                        fcomm_comm **comm);
// The same over memory that is already mapped: ranks as threads of one process, for ThreadSanitizer.
fcomm_status fcomm_attach(void *region, int rank, int size, const int *life_fds, uint64_t nonce, double timeout_s,
                          fcomm_comm **comm);
// close() sends what is still buffered, tells the peers and unmaps; free() releases the handle. Both are idempotent
// as long as the handle lives.
fcomm_status fcomm_close(fcomm_comm *comm);
void fcomm_free(fcomm_comm *comm);

// Collectives. tag is the caller's fingerprint of what the engine cannot see (shape, permutation); equal on all ranks.
// In reduce and gather only the root uses `out`, in broadcast and scatter only the root uses `in`; on other ranks it
// may be NULL and is left as it is.
fcomm_status fcomm_all_reduce(const void *in, void *out, size_t count, int dtype, int op, uint64_t tag, fcomm_comm *);
fcomm_status fcomm_reduce(const void *in, void *out, size_t count, int dtype, int op, int root, uint64_t tag,
                          fcomm_comm *);
fcomm_status fcomm_scan(const void *in, void *out, size_t count, int dtype, int op, int exclusive, int reverse,
                        uint64_t tag, fcomm_comm *);
fcomm_status fcomm_reduce_scatter(const void *in, fcomm_blocks, void *out, int dtype, int op, uint64_t tag,
                                  fcomm_comm *);
fcomm_status fcomm_all_gather(const void *in, void *out, fcomm_blocks, uint64_t tag, fcomm_comm *);
fcomm_status fcomm_gather(const void *in, void *out, fcomm_blocks, int root, uint64_t tag, fcomm_comm *);
fcomm_status fcomm_scatter(const void *in, fcomm_blocks, void *out, int root, uint64_t tag, fcomm_comm *);
// uneven: compare every rank's send widths with its peers' receive widths first (one more round).
fcomm_status fcomm_all_to_all(const void *in, fcomm_blocks sent, void *out, fcomm_blocks received, int uneven,
                              uint64_t tag, fcomm_comm *);
fcomm_status fcomm_broadcast(const void *in, void *out, size_t nbytes, int root, uint64_t tag, fcomm_comm *);
// source is the rank whose input becomes this rank's output, -1 for zeros; destination is the rank whose output this
// rank's input becomes, -1 for none.
fcomm_status fcomm_permute(const void *in, void *out, size_t nbytes, int source, int destination, uint64_t tag,
                           fcomm_comm *);
fcomm_status fcomm_barrier(uint64_t tag, fcomm_comm *);
// send() never waits for the receiver: what does not fit into the ring between the two is copied, and sent by later
// calls on any communicator of the process, and by close().
fcomm_status fcomm_send(const void *in, size_t nbytes, const fcomm_signature *, int destination, fcomm_comm *);
fcomm_status fcomm_recv(void *out, size_t nbytes, const fcomm_signature *, int source, fcomm_signature *got,
                        fcomm_comm *);

// After a failure. describe() leaves this rank's description of its call for the peers, and description() waits for a
// peer's; behind() says whether a rank had not yet arrived where the group broke.
fcomm_failure fcomm_last_failure(const fcomm_comm *);
void fcomm_describe(fcomm_comm *, const char *text);
int fcomm_description(fcomm_comm *, int rank, double wait_s, char *text, size_t text_bytes);
int fcomm_behind(const fcomm_comm *, int rank);
int fcomm_pid(const fcomm_comm *, int rank);
uint32_t fcomm_round(const fcomm_comm *);

// A waiting call asks this hook a few times a second whether to give up; 0 means go on.
void fcomm_set_interrupt_hook(int (*hook)(void));

// Outputs: blocks of memory that are kept, page tables and all, when they are returned.
void *fcomm_pool_take(size_t nbytes);
void fcomm_pool_return(void *block);
size_t fcomm_pool_clear(void);
void fcomm_pool_set_limit(size_t idle_bytes);
fcomm_pool_report fcomm_pool_stats(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
