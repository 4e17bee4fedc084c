#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace fcomm {

#if defined(__x86_64__)

namespace sse2 {
#define FCOMM_STREAM_BYTES 16
#define FCOMM_STREAM_LOAD(p) _mm_loadu_si128(reinterpret_cast<const __m128i *>(p))
#define FCOMM_STREAM_STORE(p, v) _mm_stream_si128(reinterpret_cast<__m128i *>(p), v)
#include "kernels.inc"
#undef FCOMM_STREAM_BYTES
#undef FCOMM_STREAM_LOAD
#undef FCOMM_STREAM_STORE
constexpr Kernels table = make_table("sse2");
}  // namespace sse2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
namespace avx2 {
#define FCOMM_F16C 1
#define FCOMM_STREAM_BYTES 32
#define FCOMM_STREAM_LOAD(p) _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))
#define FCOMM_STREAM_STORE(p, v) _mm256_stream_si256(reinterpret_cast<__m256i *>(p), v)
#include "kernels.inc"
#undef FCOMM_F16C
#undef FCOMM_STREAM_BYTES
#undef FCOMM_STREAM_LOAD
#undef FCOMM_STREAM_STORE
constexpr Kernels table = make_table("avx2");
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
// Only bfloat16: its conversions gain a tenth to a third from wide vectors, but sums of messages that come from memory
// lose as much; and GCC 12 fuses complex products here, whatever it is told.
namespace avx512 {
#define FCOMM_F16C 1
#define FCOMM_STREAM_BYTES 64
#define FCOMM_STREAM_LOAD(p) _mm512_loadu_si512(p)
#define FCOMM_STREAM_STORE(p, v) _mm512_stream_si512(reinterpret_cast<__m512i *>(p), v)
#include "kernels.inc"
#undef FCOMM_F16C
#undef FCOMM_STREAM_BYTES
#undef FCOMM_STREAM_LOAD
#undef FCOMM_STREAM_STORE
constexpr Kernels make() {
  Kernels t = avx2::table;
  t.name = "avx512";
  bf16_row(t.reduce[FCOMM_BFLOAT16]);
  past_row<Bf16Vector>(t.reduce_past[FCOMM_BFLOAT16]);
  return t;
}
constexpr Kernels table = make();
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static bool has_f16c() {  // clang 14 has no name for it in __builtin_cpu_supports
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

const Kernels *kernels_named(const char *name) {
  if (!std::strcmp(name, "sse2")) return &sse2::table;
  if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && kernels_named("avx2"))
    return &avx512::table;
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && has_f16c())
    return &avx2::table;
  return nullptr;
}

const Kernels &kernels() {
  static const Kernels &best = *[] {
    for (const char *name : {"avx512", "avx2"})
      if (const Kernels *table = kernels_named(name)) return table;
    return &sse2::table;
  }();
  return best;
}

void stream_fence() { _mm_sfence(); }

#else  // aarch64 and others: the baseline already has vectors, and plain stores

namespace baseline {
#include "kernels.inc"
constexpr Kernels table = make_table("baseline");
}  // namespace baseline

const Kernels *kernels_named(const char *name) { return std::strcmp(name, "baseline") ? nullptr : &baseline::table; }
const Kernels &kernels() { return baseline::table; }
void stream_fence() {}

#endif

std::size_t dtype_bytes(int dtype) {
  static constexpr std::uint8_t bytes[FCOMM_DTYPES] = {1, 1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 8, 16, 1, 1};
  return bytes[dtype];
}

}  // namespace fcomm
