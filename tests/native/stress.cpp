// After a million small collectives, nothing in the process has grown.
#include <cstring>
#include <filesystem>

#include "harness.h"

namespace {

long status_of(const char *field) {
  long value = -1;
  char line[256];
  std::FILE *f = std::fopen("/proc/self/status", "r");
  while (f && std::fgets(line, sizeof line, f))
    if (!std::strncmp(line, field, std::strlen(field))) value = std::atol(line + std::strlen(field));
  if (f) std::fclose(f);
  return value;
}

long descriptors() {
  long n = 0;
  for ([[maybe_unused]] const auto &entry : std::filesystem::directory_iterator("/proc/self/fd")) ++n;
  return n;
}

void many(fcomm_comm *c, int rank, int size, int n) {
  doing = "running " + std::to_string(n) + " small collectives on " + std::to_string(size) + " ranks";
  const std::size_t count = 16;
  std::int64_t in[count], out[count * 8];
  fcomm_signature s{FCOMM_INT64, 1, {std::int64_t(count)}};
  long rss = 0, fds = 0, threads = 0;
  for (int k = 0; k < n; ++k) {
    if (k == n / 10) rss = status_of("VmRSS:"), fds = descriptors(), threads = status_of("Threads:");
    for (std::size_t i = 0; i < count; ++i) in[i] = std::int64_t(i) + rank * 1000 + k;
    const std::int64_t first = k, last = (size - 1) * 1000 + k;
    switch (k % 5) {
      case 0:
        CHECK(!fcomm_all_reduce(in, out, count, FCOMM_INT64, FCOMM_SUM, 0, c));
        CHECK(out[0] == size * (first + last) / 2 && out[1] == out[0] + size);
        break;
      case 1:
        CHECK(!fcomm_all_gather(in, out, even(1, sizeof in), 0, c));
        CHECK(out[0] == first && out[count * std::size_t(size - 1)] == last);
        break;
      case 2:
        CHECK(!fcomm_reduce_scatter(in, even(1, sizeof(std::int64_t)), out, FCOMM_INT64, FCOMM_MAX, 0, c));
        CHECK(out[0] == last + rank);
        break;
      case 3:
        CHECK(!fcomm_broadcast(in, out, sizeof in, size - 1, 0, c));
        CHECK(out[0] == last);
        break;
      default:
        CHECK(!fcomm_send(in, sizeof in, &s, (rank + 1) % size, c));
        CHECK(!fcomm_recv(out, sizeof in, &s, (rank + size - 1) % size, nullptr, c));
        CHECK(out[0] == k + (rank + size - 1) % size * 1000);
    }
  }
  CHECK(status_of("VmRSS:") - rss < 1024 && descriptors() == fds && status_of("Threads:") == threads);
}

}  // namespace

void stress_suite() {
  CHECK(as_processes({2}, [](fcomm_comm *c, int rank) { many(c, rank, 2, 1'000'000); }, 280).all_well());
  CHECK(as_processes({4}, [](fcomm_comm *c, int rank) { many(c, rank, 4, 100'000); }, 280).all_well());
}
