// Every cell of every table against scalar arithmetic that is written differently.
#include "kernels.h"

#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>

#include "harness.h"

namespace {

// A float format by its definition: sign, exponent of E bits, mantissa of M bits.
struct Format {
  int exponent_bits, mantissa_bits;
  bool infinity;  // without one, only the largest code is NaN

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bits() const { return 1 + exponent_bits + mantissa_bits; }
  unsigned top() const { return (1u << (exponent_bits + mantissa_bits)) - 1; }
  unsigned largest() const { return infinity ? top() - (1u << mantissa_bits) : top() - 1; }

  double decode(unsigned code) const {
    const double sign = code >> (bits() - 1) & 1 ? -1 : 1;
    const unsigned magnitude = code & top(), exponent = magnitude >> mantissa_bits;
    const unsigned mantissa = magnitude & ((1u << mantissa_bits) - 1);
    if (magnitude > largest())
      return infinity && mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
    const double whole = exponent ? double(mantissa + (1u << mantissa_bits)) : double(mantissa);
    return sign * std::ldexp(whole, int(exponent ? exponent : 1) - bias() - mantissa_bits);
  }
  unsigned encode(double x) const {  // to nearest, ties to even
    const unsigned sign = std::signbit(x) ? 1u << (bits() - 1) : 0;
    if (std::isnan(x)) return top();
    if (x == 0) return sign;
    const double a = std::fabs(x);
    int e;
    std::frexp(a, &e);
    const int least = 1 - bias(), power = std::max(e - 1, least);
    const double steps = std::isinf(a) ? a : std::nearbyint(std::ldexp(a, mantissa_bits - power));
    if (std::isinf(a) || std::ldexp(steps, power - mantissa_bits) > decode(largest()))
      return sign | (infinity ? largest() + 1 : top());
    // Rounding up to the next power of two carries into the exponent by itself.
    return sign | (unsigned(steps) + (unsigned(power - least) << mantissa_bits));
  }
};

constexpr Format kF16{5, 10, true}, kBf16{8, 7, true}, kE4m3{4, 3, false}, kE5m2{5, 2, true};

template <class T>
T combine(int op, T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    switch (op) {
      case FCOMM_SUM: case FCOMM_MEAN: return T(__int128(a) + __int128(b));
      case FCOMM_PROD: return T((unsigned __int128)(__int128(a)) * (unsigned __int128)(__int128(b)));
      case FCOMM_BAND: return T(a & b);
      case FCOMM_BOR: return T(a | b);
      case FCOMM_BXOR: return T(a ^ b);
      default: break;
    }
  } else {
    if (std::isnan(a)) return a;
    if (std::isnan(b)) return b;
    if (op == FCOMM_SUM || op == FCOMM_MEAN) return a + b;
    if (op == FCOMM_PROD) return a * b;
  }
  return op == FCOMM_MAX ? (a > b ? a : b) : (a < b ? a : b);
}

template <class T>
T finish(int op, T total, int n) {
  if (op != FCOMM_MEAN) return total;
  if constexpr (std::is_integral_v<T>) return T(__int128(total) / n);
  else return total / T(n);
}

template <class T>
bool same(T a, T b) {
  if constexpr (!std::is_integral_v<T>)
    if (std::isnan(a) && std::isnan(b)) return true;
  return std::memcmp(&a, &b, sizeof a) == 0;
}

using Inputs = std::vector<std::vector<unsigned char>>;

template <class T>
T at(const std::vector<unsigned char> &bytes, std::size_t i) {
  T v;
  std::memcpy(&v, &bytes[i * sizeof(T)], sizeof v);
  return v;
}

template <class T>
void check_plain(int op, const Inputs &in, const std::vector<unsigned char> &out, std::size_t count, bool boolean) {
  const int n = int(in.size());
  if (boolean) op = op == FCOMM_SUM || op == FCOMM_MAX ? FCOMM_BOR : op == FCOMM_PROD || op == FCOMM_MIN ? FCOMM_BAND : op;
  for (std::size_t i = 0; i < count; ++i) {
    T total = at<T>(in[0], i);
    for (int k = 1; k < n; ++k) total = combine(op, total, at<T>(in[std::size_t(k)], i));
    CHECK(same(finish(op, total, n), at<T>(out, i)));
  }
}

template <class T>
void check_format(const Format &f, int op, const Inputs &in, const std::vector<unsigned char> &out, std::size_t count) {
  const int n = int(in.size());
  for (std::size_t i = 0; i < count; ++i) {
    float total = float(f.decode(at<T>(in[0], i)));
    for (int k = 1; k < n; ++k) total = combine(op, total, float(f.decode(at<T>(in[std::size_t(k)], i))));
    const unsigned expected = f.encode(double(finish(op, total, n))), got = at<T>(out, i);
    CHECK(expected == got || (std::isnan(f.decode(expected)) && std::isnan(f.decode(got))));
  }
}

template <class R>
void check_complex(int op, const Inputs &in, const std::vector<unsigned char> &out, std::size_t count) {
  const int n = int(in.size());
  for (std::size_t i = 0; i < count; ++i) {
    R re = at<R>(in[0], 2 * i), im = at<R>(in[0], 2 * i + 1);
    for (int k = 1; k < n; ++k) {
      const R c = at<R>(in[std::size_t(k)], 2 * i), d = at<R>(in[std::size_t(k)], 2 * i + 1);
      const R x = op == FCOMM_PROD ? re * c - im * d : re + c, y = op == FCOMM_PROD ? re * d + im * c : im + d;
      re = x, im = y;
    }
    if (op == FCOMM_MEAN) re /= R(n), im /= R(n);
    CHECK(same(re, at<R>(out, 2 * i)) && same(im, at<R>(out, 2 * i + 1)));
  }
}

void check(int dtype, int op, const Inputs &in, const std::vector<unsigned char> &out, std::size_t count) {
  switch (dtype) {
    case FCOMM_BOOL: return check_plain<std::uint8_t>(op, in, out, count, true);
    case FCOMM_UINT8: return check_plain<std::uint8_t>(op, in, out, count, false);
    case FCOMM_INT8: return check_plain<std::int8_t>(op, in, out, count, false);
    case FCOMM_INT16: return check_plain<std::int16_t>(op, in, out, count, false);
    case FCOMM_UINT16: return check_plain<std::uint16_t>(op, in, out, count, false);
    case FCOMM_INT32: return check_plain<std::int32_t>(op, in, out, count, false);
    case FCOMM_UINT32: return check_plain<std::uint32_t>(op, in, out, count, false);
    case FCOMM_INT64: return check_plain<std::int64_t>(op, in, out, count, false);
    case FCOMM_UINT64: return check_plain<std::uint64_t>(op, in, out, count, false);
    case FCOMM_FLOAT32: return check_plain<float>(op, in, out, count, false);
    case FCOMM_FLOAT64: return check_plain<double>(op, in, out, count, false);
    case FCOMM_FLOAT16: return check_format<std::uint16_t>(kF16, op, in, out, count);
    case FCOMM_BFLOAT16: return check_format<std::uint16_t>(kBf16, op, in, out, count);
    case FCOMM_FLOAT8_E4M3FN: return check_format<std::uint8_t>(kE4m3, op, in, out, count);
    case FCOMM_FLOAT8_E5M2: return check_format<std::uint8_t>(kE5m2, op, in, out, count);
    case FCOMM_COMPLEX64: return check_complex<float>(op, in, out, count);
    case FCOMM_COMPLEX128: return check_complex<double>(op, in, out, count);
  }
}

bool has_meaning(int dtype, int op) {
  const bool complex = dtype == FCOMM_COMPLEX64 || dtype == FCOMM_COMPLEX128;
  const bool real = dtype >= FCOMM_FLOAT16;
  if (dtype == FCOMM_BOOL) return op != FCOMM_MEAN;
  if (complex) return op == FCOMM_SUM || op == FCOMM_MEAN || op == FCOMM_PROD;
  return !real || op <= FCOMM_PROD;
}

Inputs draw(std::mt19937_64 &random, int dtype, int n, std::size_t count) {
  Inputs in;
  const std::size_t width = fcomm::dtype_bytes(dtype);
  for (int k = 0; k < n; ++k) {
    std::vector<unsigned char> b(count * width + 8);
    for (std::size_t i = 0; i + 8 <= b.size(); i += 8) {
      const std::uint64_t v = random();
      std::memcpy(&b[i], &v, 8);
    }
    if (dtype == FCOMM_BOOL)
      for (auto &v : b) v &= 1;
    // Random bits are mostly far apart in size; give half of the numbers similar size, so that rounding occurs.
    const bool plain = dtype == FCOMM_FLOAT32 || dtype == FCOMM_FLOAT64 || dtype == FCOMM_COMPLEX64 || dtype == FCOMM_COMPLEX128;
    const bool doubles = dtype == FCOMM_FLOAT64 || dtype == FCOMM_COMPLEX128;
    for (std::size_t i = 0; plain && i < count * width; i += 2 * (doubles ? 8 : 4)) {
      const double d = std::uniform_real_distribution<double>(-2, 2)(random);
      const float f = float(d);
      if (doubles) std::memcpy(&b[i], &d, 8);
      else std::memcpy(&b[i], &f, 4);
    }
    for (std::size_t i = 0; dtype == FCOMM_BFLOAT16 && i < count; ++i)  // both halves of every other word
      if (i / 2 % 2) b[2 * i + 1] = (b[2 * i + 1] & 0x81) | 0x3E;
    b.resize(count * width);
    in.push_back(std::move(b));
  }
  return in;
}

void conversions(const fcomm::Kernels &table) {
  // A sum of one term with minus zero is the identity: every code must come back.
  for (const auto &[dtype, f] : {std::pair{FCOMM_FLOAT16, kF16}, {FCOMM_BFLOAT16, kBf16}, {FCOMM_FLOAT8_E4M3FN, kE4m3},
                                 {FCOMM_FLOAT8_E5M2, kE5m2}}) {
    const std::size_t width = fcomm::dtype_bytes(dtype), count = std::size_t(1) << f.bits();
    Inputs in(2, std::vector<unsigned char>(count * width, 0));
    for (std::size_t i = 0; i < count; ++i) {
      const unsigned minus_zero = 1u << (f.bits() - 1);
      std::memcpy(&in[0][i * width], &i, width);
      std::memcpy(&in[1][i * width], &minus_zero, width);
    }
    std::vector<unsigned char> out(count * width);
    const void *from[] = {in[0].data(), in[1].data()};
    table.reduce[dtype][FCOMM_SUM](out.data(), from, 2, count, 2);
    check(dtype, FCOMM_SUM, in, out, count);
  }
}

void copies(const fcomm::Kernels &table) {
  std::vector<char> from(40'000), to(from.size() + 64);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = char(i * 37);
  for (const std::size_t n : {0, 1, 255, 256, 257, 300, 511, 1024, 4097, 39'001})
    for (std::size_t offset = 0; offset < 33; ++offset) {
      std::fill(to.begin(), to.end(), 99);
      table.stream_copy(&to[offset], &from[offset % 7], n);
      fcomm::stream_fence();
      CHECK(n == 0 || std::memcmp(&to[offset], &from[offset % 7], n) == 0);
      CHECK(to[offset + n] == 99 && (offset == 0 || to[offset - 1] == 99));
    }
}

// The kernels that write past the caches, to one place and to two.
void past(const fcomm::Kernels &table, std::mt19937_64 &random, int dtype, int op) {
  const std::size_t width = fcomm::dtype_bytes(dtype);
  for (const int n : {2, 3, 5})
    for (const std::size_t count : {0, 1, 15, 16, 100, 4096, 20'003}) {
      const Inputs in = draw(random, dtype, n, count);
      std::vector<const void *> from;
      for (const auto &b : in) from.push_back(b.data());
      const std::size_t nbytes = count * width;
      std::vector<unsigned char> room(2 * (nbytes + 128));
      unsigned char *const out = room.data() + (0 - reinterpret_cast<std::uintptr_t>(room.data())) % 64;
      unsigned char *const other = out + (nbytes + 64) / 64 * 64;
      for (const auto &[second, second_past] :
           {std::pair{static_cast<unsigned char *>(nullptr), false}, {other, false}, {other, true}}) {
        std::fill(room.begin(), room.end(), 99);
        const std::size_t done = table.reduce_past[dtype][op](out, second, second_past, from.data(), n, nbytes, n);
        fcomm::stream_fence();
        CHECK(done <= nbytes && nbytes - done < 64 && done % 64 == 0 && out[done] == 99);
        check(dtype, op, in, {out, out + done}, done / width);
        CHECK(other[done] == 99 && (second ? std::equal(out, out + done, second) : other[0] == 99));
      }
    }
}

}  // namespace

void kernels_suite() {
  std::mt19937_64 random(5);
  int tables = 0;
  for (const char *name : {"sse2", "avx2", "avx512", "baseline"}) {
    const fcomm::Kernels *table = fcomm::kernels_named(name);
    if (!table) continue;
    ++tables;
    for (int dtype = 0; dtype < FCOMM_DTYPES; ++dtype)
      for (int op = 0; op < FCOMM_OPS; ++op) {
        doing = std::string(name) + ": dtype " + std::to_string(dtype) + ", op " + std::to_string(op);
        CHECK((table->reduce[dtype][op] != nullptr) == has_meaning(dtype, op));
        if (!table->reduce[dtype][op]) continue;
        if (table->reduce_past[dtype][op]) past(*table, random, dtype, op);
        for (int n : {1, 2, 3, 5})
          for (const std::size_t count : {0, 1, 7, 16, 33, 1023, 1025, 2049}) {
            if (n == 1 && op == FCOMM_MEAN) continue;
            const Inputs in = draw(random, dtype, n, count);
            std::vector<unsigned char> out(count * fcomm::dtype_bytes(dtype));
            std::vector<const void *> from;
            for (const auto &b : in) from.push_back(b.data());
            table->reduce[dtype][op](out.data(), from.data(), n, count, n);
            check(dtype, op, in, out, count);
          }
      }
    conversions(*table);
    copies(*table);
  }
  CHECK(tables > 0);
}
