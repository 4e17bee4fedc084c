// The pool of outputs.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "harness.h"
#include "pool.h"

void pool_suite() {
  constexpr std::size_t kMega = 1 << 20;
  fcomm_pool_clear();
  const fcomm_pool_report before = fcomm_pool_stats();
  char *a = static_cast<char *>(fcomm_pool_take(5 * kMega + 1));
  CHECK(a && std::uintptr_t(a) % (2 * kMega) == 0);
  a[0] = a[5 * kMega] = 1;
  fcomm_pool_report now = fcomm_pool_stats();
  CHECK(now.misses == before.misses + 1 && now.blocks_in_use == before.blocks_in_use + 1);
  CHECK(now.in_use_bytes - before.in_use_bytes >= 5 * kMega + 1 && now.in_use_bytes - before.in_use_bytes < 6 * kMega);
  fcomm_pool_return(a);
  CHECK(fcomm_pool_stats().idle_bytes >= 5 * kMega);
  CHECK(fcomm_pool_take(5 * kMega + 1) == a && fcomm_pool_stats().hits == before.hits + 1);
  fcomm_pool_return(a);
  CHECK(fcomm_pool_clear() >= 5 * kMega && fcomm_pool_stats().idle_bytes == 0);

  fcomm_pool_set_limit(8 * kMega);
  std::vector<void *> blocks;
  for (int k = 0; k < 5; ++k) blocks.push_back(fcomm_pool_take(4 * kMega));
  for (void *b : blocks) fcomm_pool_return(b);
  CHECK(fcomm_pool_stats().idle_bytes == 8 * kMega);
  fcomm_pool_set_limit(0);
  CHECK(fcomm_pool_stats().idle_bytes == 0);
  fcomm_pool_set_limit(before.limit_bytes);

  // Small blocks share a huge page and nothing else; what is left of the page can be used and returned.
  fcomm_pool_clear();
  std::vector<char *> small;
  for (int k = 0; k < 3; ++k) small.push_back(static_cast<char *>(fcomm_pool_take(600 << 10)));
  CHECK(fcomm_pool_stats().idle_bytes == 2 * kMega - 3 * (640 << 10));
  small.push_back(static_cast<char *>(fcomm_pool_take(128 << 10)));
  CHECK(fcomm_pool_stats().idle_bytes == 0);
  for (std::size_t k = 0; k < 4; ++k) std::memset(small[k], int(k), k < 3 ? 640 << 10 : 128 << 10);
  for (std::size_t k = 0; k < 4; ++k) {
    CHECK(std::uintptr_t(small[k]) / (2 * kMega) == std::uintptr_t(small[0]) / (2 * kMega));
    CHECK(std::all_of(small[k], small[k] + (k < 3 ? 640 << 10 : 128 << 10), [&](char b) { return b == char(k); }));
    fcomm_pool_return(small[k]);
  }
  CHECK(fcomm_pool_clear() == 2 * kMega && fcomm_pool_stats().idle_bytes == 0);
  fcomm_pool_set_limit(0);
  char *const only = static_cast<char *>(fcomm_pool_take(100 << 10));
  CHECK(fcomm_pool_stats().idle_bytes == 0);
  only[0] = only[(100 << 10) - 1] = 1;
  fcomm_pool_return(only);
  fcomm_pool_set_limit(before.limit_bytes);

  // An abandoned block is never handed out again, nor are its addresses.
  char *lost = static_cast<char *>(fcomm_pool_take(4 * kMega));
  CHECK(fcomm::pool_holds(lost) && !fcomm::pool_holds(lost + 1) && !fcomm::pool_holds(nullptr));
  fcomm::pool_abandon(lost);
  lost[0] = 1;  // it still belongs to its holder
  fcomm_pool_return(lost);
  CHECK(!fcomm::pool_holds(lost) && fcomm_pool_stats().blocks_in_use == before.blocks_in_use);
  char *other = static_cast<char *>(fcomm_pool_take(4 * kMega));
  CHECK(other != lost && fcomm_pool_stats().idle_bytes == 0);
  fcomm_pool_return(other);
  fcomm_pool_clear();
  CHECK(mmap(lost, 4 * kMega, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != lost);  // where it would lie if free

  for (const std::size_t n : {0, 1, 100, 65535, 65536, 65537}) {
    char *b = static_cast<char *>(fcomm_pool_take(n));
    CHECK(b && std::uintptr_t(b) % 64 == 0);
    for (std::size_t i = 0; i < n; ++i) b[i] = 1;
    fcomm_pool_return(b);
  }
  fcomm_pool_return(nullptr);
  CHECK(fcomm_pool_take(std::size_t(-1)) == nullptr && fcomm_pool_take(std::size_t(1) << 60) == nullptr);

  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([t] {
      for (int k = 0; k < 2000; ++k) {
        const std::size_t n = std::size_t(70'000) * (1 + std::size_t(k * (t + 1)) % 7);
        auto *b = static_cast<char *>(fcomm_pool_take(n));
        b[0] = b[n - 1] = char(t);
        CHECK(b[0] == char(t) && b[n - 1] == char(t));
        fcomm_pool_return(b);
      }
    });
  for (auto &t : threads) t.join();
  CHECK(fcomm_pool_stats().blocks_in_use == before.blocks_in_use);

  fcomm_pool_clear();
  if (!kForks) return;
  const pid_t pid = fork();
  if (pid == 0) {
    fcomm_pool_return(fcomm_pool_take(kMega));
    _exit(0);
  }
  int status = 1;
  CHECK(waitpid(pid, &status, 0) == pid && status == 0);
}
