// Collectives that only move bytes.
#include "blocks.h"
#include "direct.h"
#include "rounds.h"

namespace fcomm {
namespace {

// How many bytes each rank intends to send to each and receive from each, and whether its blocks are contiguous: two
// rows and a word of every rank's slot.
struct Sizes {
  const std::uint64_t *of;
  int size;
  std::uint64_t sent(int to) const { return of[to]; }
  std::uint64_t received(int from) const { return of[size + from]; }
  bool contiguous() const { return of[2 * size]; }
};

struct Agreed {
  std::size_t most = 0;      // bytes of the longest message, as claimed by the peers
  bool contiguous = true;    // all blocks of all ranks
  std::size_t at[FCOMM_MAX_RANKS];  // where in rank p's result this rank's block begins, if contiguous
};

// One round in which all ranks announce all their sizes, and each checks all pairs, so that all reach the same verdict.
// What the peers claim bounds how many rounds follow, never what is read or written here.
fcomm_status agree_on_sizes(fcomm_comm &c, std::uint64_t print, const Blocks &sent, const Blocks &received,
                            Agreed &agreed) {
  int culprit = -1;
  const fcomm_status s = rounds(
      c, print, 1, sizeof(std::uint64_t) * (2 * std::size_t(c.size) + 1),
      [&](std::size_t) {
        auto *mine = reinterpret_cast<std::uint64_t *>(c.slot(c.rank, filling(c)));
        for (int p = 0; p < c.size; ++p) mine[p] = sent[p].nbytes(), mine[c.size + p] = received[p].nbytes();
        mine[2 * c.size] = sent.contiguous() && received.contiguous();
      },
      [&](std::size_t) {
        const auto sizes = [&](int p) {
          return Sizes{reinterpret_cast<const std::uint64_t *>(c.slot(p, c.round)), c.size};
        };
        for (int to = 0; to < c.size; ++to) {
          agreed.contiguous = agreed.contiguous && sizes(to).contiguous();
          agreed.at[to] = 0;
          for (int from = 0; from < c.size; ++from) {
            const std::uint64_t nbytes = sizes(from).sent(to);
            if (nbytes != sizes(to).received(from) && culprit < 0) culprit = to;
            agreed.most = std::max(agreed.most, std::size_t(nbytes));
            if (from < c.rank) agreed.at[to] += nbytes;
          }
        }
      });
  if (s) return s;
  return culprit < 0 ? FCOMM_OK : poison(c, FCOMM_MISMATCH, culprit, c.round);
}

// Write sent(p) to rank p's result, at the place that here(p) has in ours; our own block by an ordinary copy.
template <class Sent, class Here>
fcomm_status write_to_all(fcomm_comm &c, Direct &direct, const Sent &sent, const Here &here, const Block &own,
                          bool stream) {
  for (int i = 1; i < c.size; ++i) {
    const int p = (c.rank + i) % c.size;  // so that not all ranks write to the same peer
    if (const fcomm_status s = direct.write(p, here(p), sent(p))) return s;
  }
  transfer(own, 0, sent(c.rank), 0, own.nbytes(), stream);
  stream_fence();
  return next_round(c);
}

// Each slot is cut into one part for each destination. agreed: what the ranks announced about uneven blocks, in the
// first round of the call.
fcomm_status exchange(fcomm_comm &c, std::uint64_t print, const Blocks &sent, const Blocks &received, void *out,
                      const Agreed *agreed) {
  const std::size_t most = agreed ? agreed->most : sent.most();
  const bool stream = past_caches(c, sent.total() + received.total());
  bool opened = agreed;
  Direct direct(c, out);
  const bool could = agreed ? agreed->contiguous && Direct::pays(most, most)
                            : Direct::pays(most, std::min(sent.row(), received.row()));
  const bool receives = received.total() > received[c.rank].nbytes();
  if (const fcomm_status s = direct.agree(print, int(Kind::kAllToAll), sent.total(), could, receives, opened)) return s;
  if (direct.agreed()) {
    const auto here = [&](int p) {
      return agreed ? contiguous(static_cast<char *>(out) + agreed->at[p], sent[p].nbytes()) : received[c.rank];
    };
    const auto from = [&](int p) { return sent[p]; };
    return direct.end(write_to_all(c, direct, from, here, received[c.rank], stream));
  }
  const std::size_t part = part_bytes(c, most * std::size_t(c.size));
  const auto part_for = [&](int to, int from, std::uint32_t r) {
    return c.slot(from, r) + std::size_t(to) * part;
  };
  const fcomm_status s = rounds(
      c, print, pieces(most, part), part * std::size_t(c.size),
      [&](std::size_t k) {
        for (int p = 0; p < c.size; ++p) {
          const Span s = span(sent[p].nbytes(), part, k);
          if (p != c.rank) transfer_in(c, part_for(p, c.rank, filling(c)), sent[p], s.at, s.nbytes);
        }
      },
      [&](std::size_t k) {
        for (int i = 0; i < c.size; ++i) {
          const int p = (c.rank + i) % c.size;  // own first, and not all ranks on the same peer
          const Span s = span(received[p].nbytes(), part, k);
          if (p == c.rank)
            transfer(received[p], s.at, sent[p], s.at, s.nbytes, stream);
          else
            transfer(received[p], s.at, contiguous(part_for(c.rank, p, c.round), part), 0, s.nbytes, stream);
        }
      },
      opened);
  stream_fence();
  return direct.end(s);
}

// all_gather, and gather if `root` is not -1 and only it receives: all ranks' bytes in chunks of whole slots.
fcomm_status collect(fcomm_comm &c, std::uint64_t print, const void *in, void *out, const Blocks &received, int root) {
  const std::size_t chunk = chunk_bytes(received.most());
  const Block own = contiguous(in, received[c.rank].nbytes());
  const bool stream = past_caches(c, own.nbytes() + received.total());
  const bool receives = root < 0 || root == c.rank, sends = root != c.rank;
  bool opened = false;
  Direct direct(c, out);
  const Kind kind = root < 0 ? Kind::kAllGather : Kind::kGather;
  const bool could = Direct::pays(received.most(), received.row());
  if (const fcomm_status s = direct.agree(print, int(kind), received.total(), could, receives, opened)) return s;
  if (direct.agreed()) {
    // Send nothing to a rank that receives nothing.
    const auto from = [&](int p) { return root < 0 || root == p ? own : contiguous(in, 0); };
    const Block &here = received[c.rank];
    const Block mine = receives ? here : contiguous(nullptr, 0);
    return direct.end(write_to_all(c, direct, from, [&](int) { return here; }, mine, stream));
  }
  const fcomm_status s = rounds(
      c, print, pieces(received.most(), chunk), std::min(chunk, received.most()),
      [&](std::size_t k) {
        const Span s = span(own.nbytes(), chunk, k);
        if (sends) copy_in(c, c.slot(c.rank, filling(c)), own.base + s.at, s.nbytes);
      },
      [&](std::size_t k) {
        for (int i = 0; receives && i < c.size; ++i) {
          const int p = (c.rank + i) % c.size;
          const Span s = span(received[p].nbytes(), chunk, k);
          if (p == c.rank)
            transfer(received[p], s.at, own, s.at, s.nbytes, stream);
          else
            transfer(received[p], s.at, contiguous(c.slot(p, c.round), chunk), 0, s.nbytes, stream);
        }
      },
      opened);
  stream_fence();
  return direct.end(s);
}

// broadcast and permute: every rank has at most one source, -1 for none, and nbytes is the same on all. destination is
// for permutations, -1 for none.
fcomm_status pass_on(fcomm_comm &c, std::uint64_t print, Kind kind, const void *in_, void *out_, std::size_t nbytes,
                     int source, bool sends, int destination) {
  const char *in = static_cast<const char *>(in_);
  char *out = static_cast<char *>(out_);
  const std::size_t chunk = chunk_bytes(nbytes);
  const bool stream = past_caches(c, 2 * nbytes);
  const bool receives = source != -1 && source != c.rank;
  bool opened = false;
  Direct direct(c, out);
  const bool could = kind == Kind::kPermute && Direct::pays(nbytes, nbytes);
  if (const fcomm_status s = direct.agree(print, int(kind), nbytes, could, receives, opened)) return s;
  if (direct.agreed()) {
    const Block whole = contiguous(out, nbytes);
    if (destination != -1 && destination != c.rank)
      if (const fcomm_status s = direct.write(destination, whole, contiguous(in, nbytes))) return direct.end(s);
    if (source == c.rank) copy(out, in, nbytes, stream);
    if (source == -1) std::memset(out, 0, nbytes);
    stream_fence();
    return direct.end(next_round(c));
  }
  const fcomm_status s = rounds(
      c, print, pieces(nbytes, chunk), std::min(chunk, nbytes),
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        if (sends) copy_in(c, c.slot(c.rank, filling(c)), in + s.at, s.nbytes);
      },
      [&](std::size_t k) {
        const Span s = span(nbytes, chunk, k);
        if (source >= 0)
          copy(out + s.at, source == c.rank ? in + s.at : c.slot(source, c.round), s.nbytes, stream);
        else if (s.nbytes)
          std::memset(out + s.at, 0, s.nbytes);
      },
      opened);
  stream_fence();
  return direct.end(s);
}

}  // namespace
}  // namespace fcomm

using namespace fcomm;

fcomm_status fcomm_all_gather(const void *in, void *out, fcomm_blocks matrix, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  const Blocks received(out, matrix, comm->size);
  return collect(*comm, fingerprint(Kind::kAllGather, tag, received.total()), in, out, received, -1);
}

fcomm_status fcomm_gather(const void *in, void *out, fcomm_blocks matrix, int root, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (!is_rank(*comm, root)) return FCOMM_INVALID;
  const Blocks received(out, matrix, comm->size);
  return collect(*comm, fingerprint(Kind::kGather, tag, received.total(), 0, 0, root), in, out, received, root);
}

fcomm_status fcomm_scatter(const void *in, fcomm_blocks matrix, void *out, int root, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  if (!is_rank(c, root)) return FCOMM_INVALID;
  const Blocks sent(in, matrix, c.size);
  const Block own = contiguous(out, sent[c.rank].nbytes());
  const std::size_t part = part_bytes(c, sent.most() * std::size_t(c.size));
  const bool stream = past_caches(c, 2 * own.nbytes());
  const std::uint64_t print = fingerprint(Kind::kScatter, tag, sent.total(), 0, 0, root);
  bool opened = false;
  Direct direct(c, out);
  const bool could = Direct::pays(sent.most(), sent.row());
  const int what = int(Kind::kScatter);
  if (const fcomm_status s = direct.agree(print, what, sent.total(), could, c.rank != root, opened)) return s;
  if (direct.agreed()) {
    if (c.rank != root) return direct.end(next_round(c));
    const auto here = [&](int p) { return contiguous(out, sent[p].nbytes()); };
    return direct.end(write_to_all(c, direct, [&](int p) { return sent[p]; }, here, own, stream));
  }
  const fcomm_status s = rounds(
      c, print, pieces(sent.most(), part),
      part * std::size_t(c.size),
      [&](std::size_t k) {
        for (int p = 0; c.rank == root && p < c.size; ++p) {
          const Span s = span(sent[p].nbytes(), part, k);
          char *to = c.slot(root, filling(c)) + std::size_t(p) * part;
          if (p != root) transfer_in(c, to, sent[p], s.at, s.nbytes);
        }
      },
      [&](std::size_t k) {
        const Span s = span(own.nbytes(), part, k);
        if (c.rank == root)
          transfer(own, s.at, sent[root], s.at, s.nbytes, stream);
        else
          copy(own.base + s.at, c.slot(root, c.round) + std::size_t(c.rank) * part, s.nbytes, stream);
      },
      opened);
  stream_fence();
  return direct.end(s);
}

fcomm_status fcomm_all_to_all(const void *in, fcomm_blocks to, void *out, fcomm_blocks from, int uneven, uint64_t tag,
                              fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  const Blocks sent(in, to, c.size), received(out, from, c.size);
  if (!uneven) {
    if (sent.most() != received.most() || sent.total() != received.total()) return FCOMM_INVALID;
    return exchange(c, fingerprint(Kind::kAllToAll, tag, sent.total()), sent, received, out, nullptr);
  }
  const std::uint64_t print = fingerprint(Kind::kAllToAllv, tag, 0);
  Agreed agreed;
  if (const fcomm_status s = agree_on_sizes(c, print, sent, received, agreed)) return s;
  return exchange(c, print, sent, received, out, &agreed);
}

fcomm_status fcomm_broadcast(const void *in, void *out, size_t nbytes, int root, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (!is_rank(*comm, root)) return FCOMM_INVALID;
  return pass_on(*comm, fingerprint(Kind::kBroadcast, tag, nbytes, 0, 0, root), Kind::kBroadcast, in, out, nbytes, root,
                 comm->rank == root, -1);
}

fcomm_status fcomm_permute(const void *in, void *out, size_t nbytes, int source, int destination, uint64_t tag,
                           fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (source < -1 || source >= comm->size || destination < -1 || destination >= comm->size) return FCOMM_INVALID;
  return pass_on(*comm, fingerprint(Kind::kPermute, tag, nbytes), Kind::kPermute, in, out, nbytes, source,
                 destination != -1, destination);
}

fcomm_status fcomm_barrier(uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  const auto nothing = [](std::size_t) {};
  return rounds(*comm, fingerprint(Kind::kBarrier, tag, 0), 1, 0, nothing, nothing);
}
