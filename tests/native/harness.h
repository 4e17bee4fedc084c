// Ranks to test the engine with: threads over one mapping, or forked processes that each map it for themselves.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "fcomm.h"

#define CHECK(condition) \
  do { \
    if (!(condition)) failed(__FILE__, __LINE__, #condition); \
  } while (0)

[[noreturn]] void failed(const char *file, int line, const char *what);

// What the checks that follow are about, for the message of one that fails.
extern thread_local std::string doing;

struct World {
  int size;
  std::uint32_t first_round = 0;
  double timeout_s = 20;
};

using Body = std::function<void(fcomm_comm *, int rank)>;

void as_threads(const World &, const Body &);

// ThreadSanitizer does not follow forks of a process that has had threads: processes become threads there, and what
// forks, kills or stops a process by intent is left to the other builds.
#ifdef __SANITIZE_THREAD__
constexpr bool kForks = false;
#else
constexpr bool kForks = true;
#endif

// Exit status of each rank as wait() gives it; a rank still there after limit_s is killed and fails the test.
struct Ended {
  std::vector<int> status;
  bool all_well() const;
};
Ended as_processes(const World &, const Body &, double limit_s = 60);

// Ranks as threads of one process over several groups at once: comms[g] of group g.
void as_threads_of_groups(const World &, int groups, const std::function<void(std::vector<fcomm_comm *>, int)> &);

// As long as it lives, FCOMM_TEST_DIRECT has that value (fcomm/csrc/direct.cpp).
struct WithDirect {
  explicit WithDirect(const char *value) { setenv("FCOMM_TEST_DIRECT", value, 1); }
  ~WithDirect() { unsetenv("FCOMM_TEST_DIRECT"); }
  WithDirect(const WithDirect &) = delete;
};

double seconds();
fcomm_blocks even(std::size_t rows, std::size_t width);
fcomm_blocks uneven(std::size_t rows, const std::vector<std::size_t> &widths);

// The suites, by name.
void choices_suite();
void kernels_suite();
void collectives_suite();
void rings_suite();
void failures_suite();
void pool_suite();
void stress_suite();
