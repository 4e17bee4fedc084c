// Every collective against the plain formula, at the edges of chunks and shares.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "harness.h"
#include "layout.h"
#include "kernels.h"

namespace {

using Bytes = std::vector<unsigned char>;

// What rank r contributes: known to all, so that every rank can check by itself.
Bytes random_bytes(int rank, std::size_t n, unsigned seed) {
  Bytes b(n + 8);
  std::mt19937_64 random(seed * 1000u + unsigned(rank) + 1);
  for (std::size_t i = 0; i < n; i += 8) {
    const std::uint64_t v = random();
    std::memcpy(&b[i], &v, 8);
  }
  b.resize(n);
  return b;
}

// Small whole numbers, so that half types see no overflow; NaNs' bits depend on the order of operands.
Bytes numbers(int rank, std::size_t count, int dtype, unsigned seed) {
  std::mt19937 random(seed * 1000u + unsigned(rank) + 1);
  if (dtype == FCOMM_FLOAT32) {
    Bytes b(count * 4);
    std::uniform_real_distribution<float> any(-2, 2);
    for (std::size_t i = 0; i < count; ++i) {
      const float f = any(random);
      std::memcpy(&b[4 * i], &f, 4);
    }
    return b;
  }
  Bytes b = random_bytes(rank, count * fcomm::dtype_bytes(dtype), seed);
  if (dtype == FCOMM_BFLOAT16)
    for (std::size_t i = 1; i < b.size(); i += 2) b[i] = (b[i] & 0x83) | 0x3C;
  if (dtype == FCOMM_BOOL)
    for (auto &v : b) v &= 1;
  return b;
}

Bytes folded(const std::vector<Bytes> &all, std::vector<int> order, int dtype, int op) {
  std::vector<const void *> in;
  for (const int p : order) in.push_back(all[std::size_t(p)].data());
  Bytes out(all[0].size());
  if (!out.empty())
    fcomm::kernels().reduce[dtype][op](out.data(), in.data(), int(in.size()), out.size() / fcomm::dtype_bytes(dtype),
                                       int(all.size()));
  return out;
}

std::vector<int> first_ranks(int n) {
  std::vector<int> v(static_cast<std::size_t>(n));
  std::iota(v.begin(), v.end(), 0);
  return v;
}

void reductions(fcomm_comm *c, int rank, int size, std::size_t count, int dtype, int op, unsigned seed) {
  doing = "reducing " + std::to_string(count) + " of dtype " + std::to_string(dtype) + " with op " + std::to_string(op) +
          " on " + std::to_string(size) + " ranks";
  const std::size_t n = count * fcomm::dtype_bytes(dtype);
  std::vector<Bytes> all;
  for (int p = 0; p < size; ++p) all.push_back(numbers(p, count, dtype, seed));
  const Bytes expected = folded(all, first_ranks(size), dtype, op);
  const void *in = all[std::size_t(rank)].data();

  Bytes out(n, 0xEE);
  CHECK(fcomm_all_reduce(in, out.data(), count, dtype, op, 7, c) == FCOMM_OK);
  CHECK(out == expected);

  const int root = int(count % std::size_t(size));
  out.assign(n, 0xEE);
  CHECK(fcomm_reduce(in, rank == root ? out.data() : nullptr, count, dtype, op, root, 7, c) == FCOMM_OK);
  CHECK(out == (rank == root ? expected : Bytes(n, 0xEE)));

  for (int way = 0; op == FCOMM_SUM && way < 4; ++way) {
    const bool exclusive = way & 1, reverse = way & 2;
    std::vector<int> order = first_ranks(size);
    if (reverse) std::reverse(order.begin(), order.end());
    order.resize(std::size_t((reverse ? size - 1 - rank : rank) + (exclusive ? 0 : 1)));
    CHECK(fcomm_scan(in, out.data(), count, dtype, op, exclusive, reverse, 7, c) == FCOMM_OK);
    CHECK(out == (order.empty() ? Bytes(n, 0) : folded(all, order, dtype, op)));
  }
}

// Block j of a matrix of blocks, by the definition.
Bytes block_of(const Bytes &matrix, std::size_t rows, const std::vector<std::size_t> &widths, int j) {
  const std::size_t pitch = std::accumulate(widths.begin(), widths.end(), std::size_t(0));
  const std::size_t at = std::accumulate(widths.begin(), widths.begin() + j, std::size_t(0));
  Bytes b;
  for (std::size_t r = 0; r < rows; ++r)
    b.insert(b.end(), matrix.begin() + long(r * pitch + at), matrix.begin() + long(r * pitch + at + widths[std::size_t(j)]));
  return b;
}

Bytes side_by_side(const std::vector<Bytes> &blocks, std::size_t rows) {
  Bytes m;
  for (std::size_t r = 0; r < rows; ++r)
    for (const Bytes &b : blocks) {
      const long width = long(b.size() / rows);
      m.insert(m.end(), b.begin() + long(r) * width, b.begin() + long(r + 1) * width);
    }
  return m;
}

void block_collectives(fcomm_comm *c, int rank, int size, std::size_t rows, const std::vector<std::size_t> &widths,
                       unsigned seed) {
  doing = "moving " + std::to_string(rows) + " rows of " + std::to_string(widths[0]) + ", .. bytes on " +
          std::to_string(size) + " ranks";
  const std::size_t pitch = std::accumulate(widths.begin(), widths.end(), std::size_t(0));
  const bool same = widths == std::vector<std::size_t>(std::size_t(size), widths[0]);
  const fcomm_blocks shape = same ? even(rows, widths[0]) : uneven(rows, widths);
  const int root = int((rows + widths[0]) % std::size_t(size));
  const std::size_t own = rows * widths[std::size_t(rank)];

  std::vector<Bytes> blocks;
  for (int p = 0; p < size; ++p) blocks.push_back(random_bytes(p, rows * widths[std::size_t(p)], seed));
  const Bytes gathered = side_by_side(blocks, rows);
  Bytes out(rows * pitch, 0xEE);
  CHECK(fcomm_all_gather(blocks[std::size_t(rank)].data(), out.data(), shape, 3, c) == FCOMM_OK);
  CHECK(out == gathered);
  out.assign(rows * pitch, 0xEE);
  CHECK(fcomm_gather(blocks[std::size_t(rank)].data(), rank == root ? out.data() : nullptr, shape, root, 3, c) == FCOMM_OK);
  CHECK(out == (rank == root ? gathered : Bytes(rows * pitch, 0xEE)));
  out.assign(own, 0xEE);
  CHECK(fcomm_scatter(rank == root ? gathered.data() : nullptr, shape, out.data(), root, 3, c) == FCOMM_OK);
  CHECK(out == blocks[std::size_t(rank)]);

  std::vector<Bytes> all, mine;
  for (int p = 0; p < size; ++p) all.push_back(random_bytes(p, rows * pitch, seed + 1));
  for (int p = 0; p < size; ++p) mine.push_back(block_of(all[std::size_t(p)], rows, widths, rank));
  out.assign(own, 0xEE);
  CHECK(fcomm_reduce_scatter(all[std::size_t(rank)].data(), shape, out.data(), FCOMM_UINT8, FCOMM_SUM, 3, c) == FCOMM_OK);
  CHECK(out == folded(mine, first_ranks(size), FCOMM_UINT8, FCOMM_SUM));

  // Even: rank r's block p goes to rank p, laid out along another dimension. Uneven: every rank sends widths[p] to p.
  out.assign(own * std::size_t(size), 0xEE);
  const fcomm_blocks received = even(1, own);
  CHECK(fcomm_all_to_all(all[std::size_t(rank)].data(), shape, out.data(), received, !same, 3, c) == FCOMM_OK);
  CHECK(out == side_by_side(mine, 1));
}

void plain_moves(fcomm_comm *c, int rank, int size, std::size_t n, unsigned seed) {
  doing = "moving " + std::to_string(n) + " bytes on " + std::to_string(size) + " ranks";
  const int root = int((n + 1) % std::size_t(size));
  const Bytes in = random_bytes(rank, n, seed);
  Bytes out(n, 0xEE);
  CHECK(fcomm_broadcast(rank == root ? in.data() : nullptr, out.data(), n, root, 5, c) == FCOMM_OK);
  CHECK(out == random_bytes(root, n, seed));

  const int source = (rank + size - 1) % size;
  CHECK(fcomm_permute(in.data(), out.data(), n, source, (rank + 1) % size, 5, c) == FCOMM_OK);
  CHECK(out == random_bytes(source, n, seed));
  // only 0 -> last
  const bool last = rank == size - 1;
  CHECK(fcomm_permute(in.data(), out.data(), n, last ? 0 : -1, rank == 0 ? size - 1 : -1, 6, c) == FCOMM_OK);
  CHECK(out == (last ? random_bytes(0, n, seed) : Bytes(n, 0)));
  CHECK(fcomm_barrier(n, c) == FCOMM_OK);
}

constexpr std::size_t kChunk = 128 << 10, kSlot = fcomm::kChunkBytes;

void everything(fcomm_comm *c, int rank, int size) {
  const std::size_t n = std::size_t(size);
  unsigned seed = 0;
  for (const std::size_t count : {std::size_t(0), std::size_t(1), n - 1, n, n + 1, std::size_t(1021), (32 << 10) / n / 4 * 2,
                                  kChunk / 4 - 1, kChunk / 4, kChunk / 4 + 1, kChunk / 2 + 3, std::size_t(99991)}) {
    reductions(c, rank, size, count, FCOMM_FLOAT32, FCOMM_SUM, ++seed);
    reductions(c, rank, size, count, FCOMM_UINT8, FCOMM_PROD, ++seed);
    reductions(c, rank, size, count, FCOMM_BFLOAT16, FCOMM_MEAN, ++seed);
    plain_moves(c, rank, size, count, ++seed);
  }
  for (const std::size_t nbytes : {kChunk - 1, kChunk, kChunk + 1, kSlot - 1, kSlot, kSlot + 1}) {
    plain_moves(c, rank, size, nbytes, ++seed);
    block_collectives(c, rank, size, 1, std::vector<std::size_t>(n, nbytes), ++seed);
  }
  for (const std::size_t rows : {1, 2, 7, 1000})
    for (const std::size_t width : {0, 1, 4, 63, 640}) {
      block_collectives(c, rank, size, rows, std::vector<std::size_t>(n, width), ++seed);
      std::vector<std::size_t> widths(n, width);
      for (std::size_t j = 0; j < n; ++j) widths[j] = width * j + (j == 1);
      block_collectives(c, rank, size, rows, widths, ++seed);
    }
  for (int dtype = 0; dtype < FCOMM_DTYPES; ++dtype)
    for (int op = 0; op < FCOMM_OPS; ++op)
      if (fcomm::kernels().reduce[dtype][op] && (dtype < FCOMM_FLOAT16 || dtype == FCOMM_FLOAT32))
        reductions(c, rank, size, 4099, dtype, op, ++seed);
}

// Past the caches: the streaming paths, and slots at their full length.
void large(fcomm_comm *c, int rank, int size) {
  const std::size_t count = (9 << 18) + 5;
  reductions(c, rank, size, count, FCOMM_FLOAT32, FCOMM_SUM, 1);
  plain_moves(c, rank, size, 4 * count + 1, 2);
  block_collectives(c, rank, size, 3, std::vector<std::size_t>(std::size_t(size), count + 1), 3);
}

// Different collectives of different sizes in a row without a pause, each rank at its own pace.
void back_to_back(fcomm_comm *c, int rank, int size, int n) {
  doing = "running different collectives back to back";
  std::mt19937 plan(17);  // the same on all ranks
  for (int k = 0; k < n; ++k) {
    const int kind = int(plan() % 4);
    const std::size_t count = plan() % 3 ? plan() % 8 : plan() % 40000;
    std::vector<std::int32_t> in(count), out(count * std::size_t(size));
    for (std::size_t i = 0; i < count; ++i) in[i] = std::int32_t(i) * 3 + rank + k;
    const auto of = [&](int p, std::size_t i) { return std::int32_t(i) * 3 + p + k; };
    if (kind == 0) {
      CHECK(fcomm_all_reduce(in.data(), out.data(), count, FCOMM_INT32, FCOMM_MAX, 0, c) == FCOMM_OK);
      for (std::size_t i = 0; i < count; ++i) CHECK(out[i] == of(size - 1, i));
    } else if (kind == 1) {
      CHECK(fcomm_all_gather(in.data(), out.data(), even(1, count * 4), 0, c) == FCOMM_OK);
      for (int p = 0; p < size; ++p)
        for (std::size_t i = 0; i < count; ++i) CHECK(out[std::size_t(p) * count + i] == of(p, i));
    } else if (kind == 2) {
      CHECK(fcomm_broadcast(in.data(), out.data(), count * 4, k % size, 0, c) == FCOMM_OK);
      for (std::size_t i = 0; i < count; ++i) CHECK(out[i] == of(k % size, i));
    } else {
      CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    }
  }
}

// Slots of any sizes, in any order: each is within its rank's share, none overlaps the previous one; large ones walk.
void slots_of_neighbouring_rounds_are_apart() {
  doing = "laying out slots";
  std::mt19937 random(5);
  fcomm::Slots slots;
  std::size_t last_at = 0, last_nbytes = 0, furthest = 0;
  for (std::uint32_t round = std::uint32_t(-50'000); round != 50'000; ++round) {
    const std::size_t most = round / 64 % 3 == 0 ? fcomm::kSmallSlotBytes : fcomm::kSlotBytes;
    const std::size_t nbytes = random() % 5 ? random() % (most + 1) : most;
    slots.open(round, nbytes);
    const std::size_t at = slots[round];
    CHECK(at % fcomm::kLine == 0 && at + nbytes <= fcomm::kSlotsBytes);
    CHECK(at + nbytes <= last_at || last_at + last_nbytes <= at || nbytes == 0 || last_nbytes == 0);
    CHECK(slots[round - 1] == last_at || round == std::uint32_t(-50'000));
    last_at = at, last_nbytes = nbytes, furthest = std::max(furthest, at + nbytes);
  }
  CHECK(furthest > fcomm::kSlotsBytes - fcomm::kSlotBytes);
}

// Large enough to go straight into results, if these come from the pool: once on all ranks, once on all except one.
void results_of_the_pool(fcomm_comm *c, int rank, int size) {
  doing = "writing into results of the pool on " + std::to_string(size) + " ranks";
  const std::size_t part = (70 << 10) + 64, n = part * std::size_t(size);
  Bytes gathered;
  for (int p = 0; p < size; ++p) {
    const Bytes b = random_bytes(p, part, 9);
    gathered.insert(gathered.end(), b.begin(), b.end());
  }
  Bytes outside(n);
  const auto fresh = static_cast<unsigned char *>(fcomm_pool_take(n));
  for (int k = 0; k < 100; ++k) {
    unsigned char *const out = k % 5 == 0 && rank == k / 5 % size ? outside.data() : fresh;
    std::fill(out, out + n, 0xEE);
    CHECK(fcomm_all_gather(random_bytes(rank, part, 9).data(), out, even(1, part), 0, c) == FCOMM_OK);
    CHECK(std::equal(gathered.begin(), gathered.end(), out));
    // Sums go each of the ways in turn.
    const std::size_t count = n / 4;
    std::vector<std::int32_t> in(count);
    for (std::size_t i = 0; i < count; ++i) in[i] = std::int32_t(i) * (rank + 1) + k;
    std::fill(out, out + n, 0xEE);
    CHECK(fcomm_all_reduce(in.data(), out, count, FCOMM_INT32, FCOMM_SUM, 0, c) == FCOMM_OK);
    const auto *sums = reinterpret_cast<const std::int32_t *>(out);
    for (std::size_t i = 0; i < count; ++i)
      CHECK(sums[i] == std::int32_t(i) * (size * (size + 1) / 2) + k * size);
  }
  fcomm_pool_return(fresh);
}

}  // namespace

void collectives_suite() {
  slots_of_neighbouring_rounds_are_apart();
  for (const int size : {2, 3}) {
    CHECK(as_processes({size}, [&](fcomm_comm *c, int rank) { results_of_the_pool(c, rank, size); }).all_well());
    const WithDirect refused("1");
    CHECK(as_processes({size}, [&](fcomm_comm *c, int rank) { results_of_the_pool(c, rank, size); }).all_well());
  }
  for (const int size : {2, 3, 4}) {
    const WithDirect always("always");
    as_threads({size}, [&](fcomm_comm *c, int rank) { everything(c, rank, size); });
    const World wrapping{size, std::uint32_t(-100)};
    CHECK(as_processes(wrapping, [&](fcomm_comm *c, int rank) { back_to_back(c, rank, size, 1000); }).all_well());
    if (size < 4) as_threads({size}, [&](fcomm_comm *c, int rank) { large(c, rank, size); });
  }
  for (const int size : {2, 3, 4}) {
    const World world{size};
    as_threads(world, [&](fcomm_comm *c, int rank) { everything(c, rank, size); });
    CHECK(as_processes(world, [&](fcomm_comm *c, int rank) { back_to_back(c, rank, size, 3000); }).all_well());
    // The round counter wraps in the middle.
    const World wrapping{size, std::uint32_t(-100)};
    as_threads(wrapping, [&](fcomm_comm *c, int rank) { back_to_back(c, rank, size, 1000); });
    CHECK(as_processes(wrapping, [&](fcomm_comm *c, int rank) { back_to_back(c, rank, size, 1000); }).all_well());
  }
  for (const int size : {2, 3}) as_threads({size}, [&](fcomm_comm *c, int rank) { large(c, rank, size); });
  as_threads({7}, [](fcomm_comm *c, int rank) { plain_moves(c, rank, 7, 70001, 1), reductions(c, rank, 7, 30011, FCOMM_INT16, FCOMM_MEAN, 2); });
  // Two groups of the same ranks, interleaved.
  as_threads_of_groups({3}, 2, [](std::vector<fcomm_comm *> c, int rank) {
    for (unsigned k = 0; k < 20; ++k) {
      reductions(c[k % 2], rank, 3, 1000 + k * 977, FCOMM_INT32, FCOMM_SUM, k);
      plain_moves(c[1 - k % 2], rank, 3, k * 3001, k);
    }
  });
}
