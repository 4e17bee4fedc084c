// Memory for outputs. In page faults, a fresh 64 MB block costs several times as much as a 64 MB collective, so
// returned blocks are kept, page tables and all, up to a limit.
#include <pthread.h>
#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace fcomm {
namespace {

// Below this the C library's allocator keeps pages mapped by itself.
constexpr std::size_t kLeast = 64 << 10;
constexpr std::size_t kHuge = 2 << 20;

struct InUse {
  std::size_t nbytes;
  bool abandoned = false;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<const void *, InUse> in_use;             // by block
  std::unordered_map<std::size_t, std::vector<void *>> idle;  // bytes -> blocks, last in first out: warm in the caches
  fcomm_pool_report report{0, 0, std::size_t(1) << 30, 0, 0, 0};
};

// Never destroyed: storages may be freed after the library's own statics.
Pool &pool() {
  static Pool &it = *new Pool;
  // A thread of the parent may hold the lock while another one forks.
  static const int once = pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                                         [] { pool().mutex.unlock(); });
  (void)once;
  return it;
}

// Eighths of a power of two: at most an eighth is wasted, and few sizes exist.
std::size_t bucket(std::size_t nbytes) {
  return round_up(nbytes, std::max(kPage, std::bit_floor(nbytes - 1) / 8));
}

// Aligned to huge pages: 512 faults become one.
void *map(std::size_t nbytes) {
  const std::size_t room = nbytes + kHuge - kPage;
  void *const got = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  char *const start = static_cast<char *>(got);
  char *const block = start + (0 - reinterpret_cast<std::uintptr_t>(start)) % kHuge;
  if (block > start) munmap(start, std::size_t(block - start));
  if (block + nbytes < start + room) munmap(block + nbytes, std::size_t(start + room - block - nbytes));
  madvise(block, nbytes, MADV_HUGEPAGE);
  return block;
}

// Keep a block that has just come from the system or from its holder. Called with the lock held, as are those below.
void keep(Pool &p, void *block, std::size_t nbytes) {
  p.idle[nbytes].push_back(block);
  p.report.idle_bytes += nbytes;
}

// New blocks of that size: as many as a huge page holds, so that the kernel finds them by one look-up when a peer
// writes. The rest of the page becomes a block too, though perhaps of a size that nobody asks for.
bool more(Pool &p, std::size_t nbytes) {
  const std::size_t room = std::max(nbytes, kHuge);
  char *const page = static_cast<char *>(map(room));
  if (!page) return false;
  const std::size_t used = room / nbytes * nbytes;
  if (used < room) keep(p, page + used, room - used);
  for (std::size_t at = used; at > 0; at -= nbytes) keep(p, page + at - nbytes, nbytes);
  return true;
}

// The largest go first, since the fewest of them must be mapped again.
std::size_t shrink(Pool &p, std::size_t to_bytes) {
  const std::size_t before = p.report.idle_bytes;
  while (p.report.idle_bytes > to_bytes) {
    auto largest = p.idle.begin();
    for (auto i = p.idle.begin(); i != p.idle.end(); ++i)
      if (i->first > largest->first) largest = i;
    munmap(largest->second.back(), largest->first);
    p.report.idle_bytes -= largest->first;
    largest->second.pop_back();
    if (largest->second.empty()) p.idle.erase(largest);
  }
  return before - p.report.idle_bytes;
}

}  // namespace

bool pool_holds(const void *block) {
  Pool &p = pool();
  const std::unique_lock lock(p.mutex);
  return p.in_use.contains(block);
}

void pool_abandon(void *block) {
  Pool &p = pool();
  const std::unique_lock lock(p.mutex);
  if (const auto found = p.in_use.find(block); found != p.in_use.end()) found->second.abandoned = true;
}

}  // namespace fcomm

using namespace fcomm;

void *fcomm_pool_take(size_t nbytes) {
  if (nbytes < kLeast) return std::aligned_alloc(64, round_up(nbytes ? nbytes : 1, 64));
  Pool &p = pool();
  const std::size_t size = bucket(nbytes);
  if (size < nbytes) return nullptr;
  const std::unique_lock lock(p.mutex);
  auto found = p.idle.find(size);
  const bool hit = found != p.idle.end();
  if (!hit) {
    if (!more(p, size) && !(shrink(p, 0) && more(p, size))) return nullptr;
    found = p.idle.find(size);
  }
  ++(hit ? p.report.hits : p.report.misses);
  void *const block = found->second.back();
  found->second.pop_back();
  if (found->second.empty()) p.idle.erase(found);
  p.report.idle_bytes -= size;
  if (!hit) shrink(p, p.report.limit_bytes);
  p.in_use.emplace(block, InUse{size});
  p.report.in_use_bytes += size;
  ++p.report.blocks_in_use;
  return block;
}

void fcomm_pool_return(void *block) {
  if (!block) return;
  Pool &p = pool();
  {
    const std::unique_lock lock(p.mutex);
    const auto found = p.in_use.find(block);
    if (found != p.in_use.end()) {
      const auto [size, abandoned] = found->second;
      p.in_use.erase(found);
      p.report.in_use_bytes -= size;
      --p.report.blocks_in_use;
      if (abandoned) {
        constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
        mmap(block, size, PROT_NONE, kFlags, -1, 0);  // in place of its pages: nothing else is ever mapped here
        return;
      }
      keep(p, block, size);
      shrink(p, p.report.limit_bytes);
      return;
    }
  }
  std::free(block);
}

size_t fcomm_pool_clear(void) {
  Pool &p = pool();
  const std::unique_lock lock(p.mutex);
  return shrink(p, 0);
}

void fcomm_pool_set_limit(size_t idle_bytes) {
  Pool &p = pool();
  const std::unique_lock lock(p.mutex);
  p.report.limit_bytes = idle_bytes;
  shrink(p, idle_bytes);
}

fcomm_pool_report fcomm_pool_stats(void) {
  Pool &p = pool();
  const std::unique_lock lock(p.mutex);
  return p.report;
}
