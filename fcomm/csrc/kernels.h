// Arithmetic and copies: the same source compiled once per instruction set, the best one chosen when the library loads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fcomm.h"

namespace fcomm {

// out[i] = in[0][i] op in[1][i] op ... in[n-1][i], in that order; mean divides by `divisor` at the end.
using Reduce = void (*)(void *out, const void *const *in, int n, std::size_t count, int divisor);

// The same for whole lines, to one or two line-aligned places at once: to `past` past the caches and, if `second` is
// not null, also there, either way. n >= 2. Returns how many bytes were done; what is left is less than a line.
using ReducePast = std::size_t (*)(void *past, void *second, bool second_past, const void *const *in, int n,
                                   std::size_t nbytes, int divisor);

struct Kernels {
  const char *name;
  Reduce reduce[FCOMM_DTYPES][FCOMM_OPS];           // null where the operation has no meaning
  ReducePast reduce_past[FCOMM_DTYPES][FCOMM_OPS];  // the common ones: null elsewhere
  // memcpy past the caches; the caller must fence before it tells anyone.
  void (*stream_copy)(void *to, const void *from, std::size_t nbytes);
};

const Kernels &kernels();
const Kernels *kernels_named(const char *name);  // null if this machine cannot run it; for tests
void stream_fence();
std::size_t dtype_bytes(int dtype);

}  // namespace fcomm
