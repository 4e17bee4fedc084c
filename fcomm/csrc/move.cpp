// Collectives that only move bytes.
#include "blocks.h"
#include "rounds.h"

namespace fcomm {
namespace {

// How many bytes each rank means to send to each, and to receive from each: two rows of every rank's slot.
struct Sizes {
  const std::uint64_t *of;
  int size;
  std::uint64_t sent(int to) const { return of[to]; }
  std::uint64_t received(int from) const { return of[size + from]; }
};

// One round in which all ranks tell all their sizes, and each checks all pairs, so that all come to the same verdict.
// most: the longest message, as the peers claim. It bounds how many rounds follow, never what is read or written.
fcomm_status agree_on_sizes(fcomm_comm &c, std::uint64_t print, const Blocks &sent, const Blocks &received,
                            std::size_t &most) {
  int culprit = -1;
  most = 0;
  const fcomm_status s = rounds(
      c, print, 1, 2 * sizeof(std::uint64_t) * std::size_t(c.size),
      [&](std::size_t) {
        auto *mine = reinterpret_cast<std::uint64_t *>(c.slot(c.rank, filling(c)));
        for (int p = 0; p < c.size; ++p) mine[p] = sent[p].nbytes(), mine[c.size + p] = received[p].nbytes();
      },
      [&](std::size_t) {
        const auto sizes = [&](int p) {
          return Sizes{reinterpret_cast<const std::uint64_t *>(c.slot(p, c.round)), c.size};
        };
        for (int from = 0; from < c.size; ++from)
          for (int to = 0; to < c.size; ++to) {
            const std::uint64_t nbytes = sizes(from).sent(to);
            if (nbytes != sizes(to).received(from) && culprit < 0) culprit = to;
            most = std::max(most, std::size_t(nbytes));
          }
      });
  if (s) return s;
  return culprit < 0 ? FCOMM_OK : poison(c, FCOMM_MISMATCH, culprit, c.round);
}

// Each slot is cut into one part for each destination. most: bytes of the longest message among any two ranks.
fcomm_status exchange(fcomm_comm &c, std::uint64_t print, const Blocks &sent, const Blocks &received, std::size_t most,
                      bool opened) {
  const std::size_t part = part_bytes(c, most * std::size_t(c.size));
  const bool stream = past_caches(c, sent.total() + received.total());
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
          const int p = (c.rank + i) % c.size;  // own first, and not all ranks at one peer
          const Span s = span(received[p].nbytes(), part, k);
          if (p == c.rank)
            transfer(received[p], s.at, sent[p], s.at, s.nbytes, stream);
          else
            transfer(received[p], s.at, contiguous(part_for(c.rank, p, c.round), part), 0, s.nbytes, stream);
        }
      },
      opened);
  stream_fence();
  return s;
}

// all_gather, and gather when `out` is some rank's alone: everybody's bytes in chunks of whole slots.
fcomm_status collect(fcomm_comm &c, std::uint64_t print, const void *in, const Blocks &received, bool sends,
                     bool receives) {
  const std::size_t chunk = chunk_bytes(received.most());
  const Block own = contiguous(in, received[c.rank].nbytes());
  const bool stream = past_caches(c, own.nbytes() + received.total());
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
      });
  stream_fence();
  return s;
}

// broadcast and permute: every rank has at most one source, -1 for none, and nbytes are the same on all.
fcomm_status pass_on(fcomm_comm &c, std::uint64_t print, const void *in_, void *out_, std::size_t nbytes, int source,
                     bool sends) {
  const char *in = static_cast<const char *>(in_);
  char *out = static_cast<char *>(out_);
  const std::size_t chunk = chunk_bytes(nbytes);
  const bool stream = past_caches(c, 2 * nbytes);
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
      });
  stream_fence();
  return s;
}

}  // namespace
}  // namespace fcomm

using namespace fcomm;

fcomm_status fcomm_all_gather(const void *in, void *out, fcomm_blocks matrix, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  const Blocks received(out, matrix, comm->size);
  return collect(*comm, fingerprint(Kind::kAllGather, tag, received.total()), in, received, true, true);
}

fcomm_status fcomm_gather(const void *in, void *out, fcomm_blocks matrix, int root, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (!is_rank(*comm, root)) return FCOMM_INVALID;
  const Blocks received(out, matrix, comm->size);
  const bool here = comm->rank == root;
  return collect(*comm, fingerprint(Kind::kGather, tag, received.total(), 0, 0, root), in, received, !here, here);
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
  const fcomm_status s = rounds(
      c, fingerprint(Kind::kScatter, tag, sent.total(), 0, 0, root), pieces(sent.most(), part),
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
      });
  stream_fence();
  return s;
}

fcomm_status fcomm_all_to_all(const void *in, fcomm_blocks to, void *out, fcomm_blocks from, int uneven, uint64_t tag,
                              fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  fcomm_comm &c = *comm;
  const Blocks sent(in, to, c.size), received(out, from, c.size);
  std::size_t most = sent.most();
  std::uint64_t print = 0;
  if (uneven) {
    print = fingerprint(Kind::kAllToAllv, tag, 0);
    if (const fcomm_status s = agree_on_sizes(c, print, sent, received, most)) return s;
  } else {
    if (sent.most() != received.most() || sent.total() != received.total()) return FCOMM_INVALID;
    print = fingerprint(Kind::kAllToAll, tag, sent.total());
  }
  return exchange(c, print, sent, received, most, uneven != 0);
}

fcomm_status fcomm_broadcast(const void *in, void *out, size_t nbytes, int root, uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (!is_rank(*comm, root)) return FCOMM_INVALID;
  return pass_on(*comm, fingerprint(Kind::kBroadcast, tag, nbytes, 0, 0, root), in, out, nbytes, root,
                 comm->rank == root);
}

fcomm_status fcomm_permute(const void *in, void *out, size_t nbytes, int source, int sends, uint64_t tag,
                           fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  if (source < -1 || source >= comm->size) return FCOMM_INVALID;
  return pass_on(*comm, fingerprint(Kind::kPermute, tag, nbytes), in, out, nbytes, source, sends != 0);
}

fcomm_status fcomm_barrier(uint64_t tag, fcomm_comm *comm) {
  Call call(comm);
  if (call.status) return call.status;
  const auto nothing = [](std::size_t) {};
  return rounds(*comm, fingerprint(Kind::kBarrier, tag, 0), 1, 0, nothing, nothing);
}
