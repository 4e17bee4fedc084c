// all_reduce, reduce, scan and reduce_scatter. Every result is a fold in rank order, made by one rank or by every rank
// with the same instructions, so all ranks hold the same bits.
#include "blocks.h"
#include "direct.h"
#include "rounds.h"

namespace fcomm {
namespace {

struct Arithmetic {
  Reduce reduce;
  ReducePast reduce_past;  // may be null
  std::size_t width;       // bytes of an element
  int dtype, divisor;

  void fold(char *out, const void *const *in, int n, std::size_t nbytes) const {
    reduce(out, in, n, nbytes / width, divisor);
  }
  // The same, to one or two places at once, past the caches or not. A place may be NULL.
  struct Place {
    char *to;
    bool stream;
  };
  void fold(Place a, Place b, const void *const *in, int n, std::size_t nbytes) const {
    std::size_t done = 0;
    const auto past = [](Place p) { return p.to && p.stream && reinterpret_cast<std::uintptr_t>(p.to) % 64 == 0; };
    const auto way = [&](Place first, Place second) {
      return past(first) && (!second.to || !second.stream || past(second));
    };
    if (reduce_past && way(a, b))
      done = reduce_past(a.to, b.to, b.stream, in, n, nbytes, divisor);
    else if (reduce_past && way(b, a))
      done = reduce_past(b.to, a.to, a.stream, in, n, nbytes, divisor);
    // The other kernels store to one place by ordinary stores; for the rest, blocks that the first-level cache still
    // holds are copied.
    constexpr std::size_t kBlock = 16 << 10;
    alignas(64) char block[kBlock];
    const void *rest[FCOMM_MAX_RANKS];
    for (std::size_t at = done; at < nbytes; at += kBlock) {
      const std::size_t m = std::min(kBlock, nbytes - at);
      for (int p = 0; p < n; ++p) rest[p] = static_cast<const char *>(in[p]) + at;
      char *const first = a.stream ? block : a.to + at;
      fold(first, rest, n, m);
      if (a.stream) copy(a.to + at, block, m, true);
      if (b.to) copy(b.to + at, first, m, b.stream);
    }
  }
};

bool arithmetic(Arithmetic &a, const fcomm_comm &c, int dtype, int op) {
  if (dtype < 0 || dtype >= FCOMM_DTYPES || op < 0 || op >= FCOMM_OPS) return false;
  a = {kernels().reduce[dtype][op], kernels().reduce_past[dtype][op], dtype_bytes(dtype), dtype, c.size};
  return a.reduce != nullptr;
}

// One phase: every rank reads every slot. out is NULL if the result is not wanted.
fcomm_status one_phase(fcomm_comm &c, std::uint64_t print, const char *in, char *out, std::size_t nbytes,
                       const Arithmetic &a, bool opened) {
  const std::size_t chunk = chunk_bytes(nbytes);
  return rounds(
      c, print, pieces(nbytes, chunk), std::min(chunk, nbytes),
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        copy_in(c, c.slot(c.rank, filling(c)), in + s.at, s.nbytes);
      },
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        if (!out || !s.nbytes) return;
        const void *from[FCOMM_MAX_RANKS];
        for (int p = 0; p < c.size; ++p) from[p] = p == c.rank ? in + s.at : c.slot(p, c.round);
        a.fold(out + s.at, from, c.size, s.nbytes);
      },
      opened);
}

// A message is cut into chunks, and each chunk into one share per rank, which that rank reduces.
struct Shares {
  std::size_t nbytes, chunk;
  int size;

  std::size_t chunks() const { return pieces(nbytes, chunk); }
  Span whole(std::size_t k) const { return span(nbytes, chunk, k); }
  Span operator()(std::size_t k, int p) const {
    const Span all = whole(k), s = span(all.nbytes, share_bytes(all.nbytes, size), std::size_t(p));
    return {all.at + s.at, s.nbytes};
  }
};

// Copy the peers' shares of chunk k into the slot that is being filled.
void fill_for_peers(fcomm_comm &c, const Shares &shares, std::size_t k, const char *in) {
  const Span all = shares.whole(k), own = shares(k, c.rank);
  char *const to = c.slot(c.rank, filling(c));
  const std::size_t before = own.at - all.at, after = before + own.nbytes;
  copy_in(c, to, in + all.at, before);
  copy_in(c, to + after, in + all.at + after, all.nbytes - after);
}

// Fold this rank's share of chunk k from all ranks, which round `round` made readable.
void fold_own(const fcomm_comm &c, const Shares &shares, std::size_t k, std::uint32_t round, const char *in,
              Arithmetic::Place a, Arithmetic::Place b, const Arithmetic &arithmetic) {
  const Span own = shares(k, c.rank);
  const void *from[FCOMM_MAX_RANKS];
  for (int p = 0; p < c.size; ++p)
    from[p] = p == c.rank ? in + own.at : c.slot(p, round) + (own.at - shares.whole(k).at);
  arithmetic.fold(a, b, from, c.size, own.nbytes);
}

// Two phases, a chunk apart: in round k a rank copies in its peers' shares of chunk k, and reduces its own share of
// chunk k - 1, whose slots round k - 1 made readable. After the round all shares of chunk k - 1 are there to copy out.
// In-slots and out-slots are both filled once per round, so the two parities suffice for both.
fcomm_status two_phase(fcomm_comm &c, std::uint64_t print, const char *in, char *out, std::size_t nbytes,
                       const Arithmetic &a, bool opened) {
  const Shares shares{nbytes, chunk_bytes(nbytes), c.size};
  const std::size_t n = shares.chunks(), chunk = shares.chunk;
  const bool stream = past_caches(c, 2 * nbytes);
  return rounds(
      c, print, n + 1, chunk + share_bytes(chunk, c.size),
      [&](std::size_t k) {
        if (k < n) fill_for_peers(c, shares, k, in);
        if (k == 0) return;
        fold_own(c, shares, k - 1, c.round, in, {c.slot(c.rank, filling(c)) + chunk, c.writing.past},
                 {out ? out + shares(k - 1, c.rank).at : nullptr, stream}, a);
        stream_fence();
      },
      [&](std::size_t k) {
        if (k == 0 || !out) return;
        for (int i = 1; i < c.size; ++i) {
          const int p = (c.rank + i) % c.size;  // not all ranks on the same peer
          const Span s = shares(k - 1, p);
          copy(out + s.at, c.slot(p, c.round) + chunk, s.nbytes, stream);
        }
      },
      opened);
}

// The same, but the rank that reduces a share writes it straight into all results.
fcomm_status two_phase_direct(fcomm_comm &c, Direct &direct, const char *in, char *out, std::size_t nbytes,
                              const Arithmetic &a) {
  const Shares shares{nbytes, chunk_bytes(nbytes), c.size};
  const std::size_t n = shares.chunks();
  const bool stream = past_caches(c, 2 * nbytes);
  c.folded.resize(share_bytes(kChunkBytes, 2));
  for (std::size_t k = 0; k <= n; ++k) {
    c.slots.open(filling(c), shares.chunk);
    if (k < n) fill_for_peers(c, shares, k, in);
    if (k > 0) {
      const Span own = shares(k - 1, c.rank);
      fold_own(c, shares, k - 1, c.round, in, {c.folded.data(), false}, {out + own.at, stream}, a);
      stream_fence();
      const Block folded = contiguous(c.folded.data(), own.nbytes);
      for (int i = 1; i < c.size; ++i)
        if (const fcomm_status s = direct.write((c.rank + i) % c.size, contiguous(out + own.at, own.nbytes), folded))
          return s;
    }
    if (const fcomm_status s = next_round(c)) return s;
  }
  return FCOMM_OK;
}

fcomm_status all_reduce(fcomm_comm &c, std::uint64_t print, const void *in_, void *out_, std::size_t nbytes,
                        const Arithmetic &a, Kind kind) {
  const char *in = static_cast<const char *>(in_);
  char *out = static_cast<char *>(out_);
  // One phase reads size * nbytes; two phases read twice nbytes, fold once and wait once more. Between two ranks the
  // second phase is sure to pay off only if the message comes from memory: reading one's own half of it twice would
  // then cost more than waiting. Otherwise rank 0 tries both.
  const std::size_t small = std::max<std::size_t>(4 << 10, (512 << 10) / std::size_t(c.size * c.size));
  const bool either = c.size == 2 && !past_caches(c, 2 * nbytes);
  const std::size_t half_share = nbytes / std::size_t(2 * c.size);  // the other half of the work goes through slots
  const bool could = kind == Kind::kAllReduce && Direct::pays(half_share, half_share);
  Direct direct(c, out);
  bool opened = false;
  const int what = int(kind) | a.dtype << 8;  // half types take longer to fold
  fcomm_status s = direct.agree(print, what, nbytes, could, true, opened, either ? kWays : kWaysOfMost);
  if (s) return s;
  const bool one = nbytes <= small || (direct.asked() ? direct.way() == kOnePhase : either);
  s = direct.agreed() ? two_phase_direct(c, direct, in, out, nbytes, a)
      : one           ? one_phase(c, print, in, out, nbytes, a, opened)
                      : two_phase(c, print, in, out, nbytes, a, opened);
  stream_fence();
  return direct.end(s);
}

}  // namespace
}  // namespace fcomm

using namespace fcomm;

fcomm_status fcomm_all_reduce(const void *in, void *out, size_t count, int dtype, int op, uint64_t tag,
                              fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  Arithmetic a;
  if (!arithmetic(a, *comm, dtype, op)) return FCOMM_INVALID;
  const std::size_t nbytes = count * a.width;
  return all_reduce(*comm, fingerprint(Kind::kAllReduce, tag, nbytes, dtype, op), in, out, nbytes, a,
                    Kind::kAllReduce);
}

fcomm_status fcomm_reduce(const void *in, void *out, size_t count, int dtype, int op, int root, uint64_t tag,
                          fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  Arithmetic a;
  if (!arithmetic(a, *comm, dtype, op) || !is_rank(*comm, root)) return FCOMM_INVALID;
  const std::size_t nbytes = count * a.width;
  // All ranks share the work; only the root copies out.
  return all_reduce(*comm, fingerprint(Kind::kReduce, tag, nbytes, dtype, op, root), in,
                    comm->rank == root ? out : nullptr, nbytes, a, Kind::kReduce);
}

fcomm_status fcomm_scan(const void *in_, void *out_, size_t count, int dtype, int op, int exclusive, int reverse,
                        uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  Arithmetic a;
  // The empty fold is zeros, which is neutral only for the sum; and a mean over prefixes has no single divisor.
  if (!arithmetic(a, c, dtype, op) || op == FCOMM_MEAN || (exclusive && op != FCOMM_SUM)) return FCOMM_INVALID;
  const char *in = static_cast<const char *>(in_);
  char *out = static_cast<char *>(out_);
  const std::size_t nbytes = count * a.width, chunk = chunk_bytes(nbytes);
  const int first = reverse ? c.size - 1 : 0, step = reverse ? -1 : 1;
  const int terms = (c.rank - first) * step + (exclusive ? 0 : 1);
  const bool wanted = c.rank != c.size - 1 - first;
  return rounds(
      c, fingerprint(Kind::kScan, tag, nbytes, dtype, op, exclusive * 2 + reverse), pieces(nbytes, chunk),
      std::min(chunk, nbytes),
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        if (wanted) copy_in(c, c.slot(c.rank, filling(c)), in + s.at, s.nbytes);
      },
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        const void *from[FCOMM_MAX_RANKS];
        for (int i = 0; i < terms; ++i) {
          const int p = first + i * step;
          from[i] = p == c.rank ? in + s.at : c.slot(p, c.round);
        }
        if (terms && s.nbytes)
          a.fold(out + s.at, from, terms, s.nbytes);
        else if (s.nbytes)
          std::memset(out + s.at, 0, s.nbytes);
      });
}

fcomm_status fcomm_reduce_scatter(const void *in, fcomm_blocks matrix, void *out_, int dtype, int op, uint64_t tag,
                                  fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  Arithmetic a;
  if (!arithmetic(a, c, dtype, op)) return FCOMM_INVALID;
  const Blocks sent(in, matrix, c.size);
  const Block &own = sent[c.rank];
  char *out = static_cast<char *>(out_);
  const std::size_t part = part_bytes(c, sent.total());
  const bool stream = past_caches(c, sent.total() + own.nbytes());
  const auto part_of = [&](int owner, int p, std::uint32_t r) { return c.slot(p, r) + std::size_t(owner) * part; };
  const fcomm_status status = rounds(
      c, fingerprint(Kind::kReduceScatter, tag, sent.total(), dtype, op), pieces(sent.most(), part),
      part * std::size_t(c.size),
      [&](std::size_t k) {
        for (int j = 0; j < c.size; ++j) {
          // The kernels read contiguous memory: a strided block of our own goes through the slot like the peers'.
          if (j == c.rank && own.contiguous()) continue;
          const Span s = span(sent[j].nbytes(), part, k);
          transfer_in(c, part_of(j, c.rank, filling(c)), sent[j], s.at, s.nbytes);
        }
      },
      [&](std::size_t k) {
        const Span s = span(own.nbytes(), part, k);
        const void *from[FCOMM_MAX_RANKS];
        for (int p = 0; p < c.size; ++p)
          from[p] = p == c.rank && own.contiguous() ? own.base + s.at : part_of(c.rank, p, c.round);
        a.fold({out + s.at, stream}, {nullptr, false}, from, c.size, s.nbytes);
      });
  stream_fence();
  return status;
}
