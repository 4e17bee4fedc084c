// engine_speed [ranks]: what a call costs without Python, compared with as many simultaneous memcpys of the same bytes.
//
// Rounds of all measurements interleave; each figure is the median over rounds of the slowest rank's time.
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace {

struct Case {
  const char *what;
  std::size_t nbytes;
};
constexpr const char *kWhat[] = {"copy", "all_reduce", "bf16", "all_gather", "reduce_scatter", "all_to_all", "broadcast"};
constexpr std::size_t kSizes[] = {8, 1 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20};
constexpr int kRounds = 9, kKinds = 7, kLengths = 8;

void once(int what, std::size_t nbytes, const char *in, char *out, fcomm_comm *c, int size) {
  const std::size_t n = std::size_t(size);
  switch (what) {
    case 0: std::memcpy(out, in, nbytes); break;
    case 1: CHECK(!fcomm_all_reduce(in, out, nbytes / 4, FCOMM_FLOAT32, FCOMM_SUM, 0, c)); break;
    case 2: CHECK(!fcomm_all_reduce(in, out, nbytes / 2, FCOMM_BFLOAT16, FCOMM_SUM, 0, c)); break;
    case 3: CHECK(!fcomm_all_gather(in, out, even(1, nbytes / n), 0, c)); break;
    case 4: CHECK(!fcomm_reduce_scatter(in, even(1, nbytes / n / 4 * 4), out, FCOMM_FLOAT32, FCOMM_SUM, 0, c)); break;
    case 5: CHECK(!fcomm_all_to_all(in, even(1, nbytes / n), out, even(1, nbytes / n), 0, 0, c)); break;
    case 6: CHECK(!fcomm_broadcast(in, out, nbytes, 0, 0, c)); break;
  }
}

}  // namespace

int main(int argc, char **argv) {
  const int size = argc > 1 ? std::atoi(argv[1]) : 2;
  auto *times = static_cast<double *>(mmap(nullptr, sizeof(double) * std::size_t(size) * kRounds * kKinds * kLengths,
                                           PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const auto time_of = [&](int rank, int round, int kind, int length) -> double & {
    return times[((rank * kRounds + round) * kKinds + kind) * kLengths + length];
  };
  doing = "measuring";
  CHECK(as_processes({size}, [&](fcomm_comm *c, int rank) {
    cpu_set_t core;  // each rank stays on one core, to measure the engine and not the scheduler
    CPU_ZERO(&core);
    CPU_SET(rank % int(sysconf(_SC_NPROCESSORS_ONLN)), &core);
    sched_setaffinity(0, sizeof core, &core);
    char *const in = static_cast<char *>(std::aligned_alloc(64, 64 << 20));  // as torch has them
    char *const out = static_cast<char *>(fcomm_pool_take(64 << 20));
    std::memset(in, rank + 1, 64 << 20);
    std::memset(out, 1, 64 << 20);
    for (int round = 0; round < kRounds; ++round)
      for (int length = 0; length < kLengths; ++length)
        for (int k = 0; k < kKinds; ++k) {
          const int kind = (k + round) % kKinds;
          const std::size_t nbytes = kSizes[length];
          const int n = int(std::clamp<std::size_t>((32 << 20) / (nbytes + 16384), 1, 1000));
          once(kind, nbytes, in, out, c, size);
          fcomm_barrier(0, c);
          const double start = seconds();
          for (int i = 0; i < n; ++i) once(kind, nbytes, in, out, c, size);
          time_of(rank, round, kind, length) = (seconds() - start) / n;
          fcomm_barrier(0, c);
        }
  }, 120).all_well());
  std::printf("%d ranks, microseconds\n%10s", size, "bytes");
  for (const char *what : kWhat) std::printf("%16s", what);
  for (int length = 0; length < kLengths; ++length) {
    std::printf("\n%10zu", kSizes[length]);
    for (int kind = 0; kind < kKinds; ++kind) {
      std::vector<double> slowest;
      for (int round = 0; round < kRounds; ++round) {
        double t = 0;
        for (int rank = 0; rank < size; ++rank) t = std::max(t, time_of(rank, round, kind, length));
        slowest.push_back(t);
      }
      std::nth_element(slowest.begin(), slowest.begin() + kRounds / 2, slowest.end());
      std::printf("%16.2f", slowest[kRounds / 2] * 1e6);
    }
  }
  std::printf("\n");
}
