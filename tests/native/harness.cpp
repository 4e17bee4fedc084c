#include "harness.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <thread>

thread_local std::string doing;

void failed(const char *file, int line, const char *what) {
  std::fprintf(stderr, "%s:%d: %s\n  while %s\n", file, line, what, doing.c_str());
  std::abort();
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

fcomm_blocks even(std::size_t rows, std::size_t width) { return {rows, width, nullptr}; }
fcomm_blocks uneven(std::size_t rows, const std::vector<std::size_t> &widths) { return {rows, 0, widths.data()}; }

namespace {

constexpr std::uint64_t kNonce = 0x1234;

// A formatted region, and a pipe for each rank whose writing end is held open as long as the rank lives.
struct Setup {
  int region;
  std::vector<int> reading, writing;

  explicit Setup(const World &w) : region(memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    CHECK(fcomm_format(region, w.size, kNonce, w.first_round) == FCOMM_OK);
    for (int p = 0; p < w.size; ++p) {
      int ends[2];
      CHECK(pipe(ends) == 0);
      reading.push_back(ends[0]), writing.push_back(ends[1]);
    }
  }
  std::vector<int> lives(int rank) const {
    std::vector<int> fds;
    for (int p = 0; p < int(reading.size()); ++p) fds.push_back(p == rank ? -1 : dup(reading[std::size_t(p)]));
    return fds;
  }
  ~Setup() {
    close(region);
    for (const int fd : reading) close(fd);
    for (const int fd : writing)
      if (fd >= 0) close(fd);
  }
  Setup(const Setup &) = delete;
};

}  // namespace

void as_threads_of_groups(const World &w, int groups, const std::function<void(std::vector<fcomm_comm *>, int)> &body) {
  std::vector<std::unique_ptr<Setup>> setups;
  std::vector<void *> bases;
  for (int g = 0; g < groups; ++g) {
    setups.push_back(std::make_unique<Setup>(w));
    bases.push_back(mmap(nullptr, fcomm_region_bytes(w.size), PROT_READ | PROT_WRITE, MAP_SHARED, setups.back()->region, 0));
    CHECK(bases.back() != MAP_FAILED);
  }
  const std::string about = doing;
  std::vector<std::thread> threads;
  for (int r = 0; r < w.size; ++r)
    threads.emplace_back([&, r] {
      doing = about;
      std::vector<fcomm_comm *> comms;
      for (int g = 0; g < groups; ++g) {
        comms.push_back(nullptr);
        CHECK(fcomm_attach(bases[std::size_t(g)], r, w.size, setups[std::size_t(g)]->lives(r).data(), kNonce, w.timeout_s,
                           &comms.back()) == FCOMM_OK);
      }
      body(comms, r);
      for (fcomm_comm *c : comms) fcomm_free(c);
    });
  for (auto &t : threads) t.join();
  for (void *base : bases) munmap(base, fcomm_region_bytes(w.size));
}

void as_threads(const World &w, const Body &body) {
  as_threads_of_groups(w, 1, [&](std::vector<fcomm_comm *> comms, int rank) { body(comms[0], rank); });
}

bool Ended::all_well() const {
  for (const int s : status)
    if (s != 0) return false;
  return true;
}

Ended as_processes(const World &w, const Body &body, double limit_s) {
  if (!kForks) {
    as_threads(w, body);
    return {std::vector<int>(std::size_t(w.size), 0)};
  }
  Setup setup(w);
  std::vector<pid_t> pids;
  std::fflush(nullptr);
  for (int r = 0; r < w.size; ++r) {
    const pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      for (int p = 0; p < w.size; ++p)
        if (p != r) close(setup.writing[std::size_t(p)]);
      fcomm_comm *comm = nullptr;
      CHECK(fcomm_open(dup(setup.region), r, w.size, setup.lives(r).data(), kNonce, w.timeout_s, &comm) == FCOMM_OK);
      body(comm, r);
      fcomm_free(comm);
      std::fflush(nullptr);
      _exit(0);
    }
    pids.push_back(pid);
  }
  for (int &fd : setup.writing) close(fd), fd = -1;
  Ended ended{std::vector<int>(std::size_t(w.size), -1)};
  std::vector<pid_t> stopped;
  const double end = seconds() + limit_s;
  for (int left = w.size; left;) {
    for (int r = 0; r < w.size; ++r) {
      int &status = ended.status[std::size_t(r)];
      if (status != -1) continue;
      const bool news = waitpid(pids[std::size_t(r)], &status, WNOHANG | WUNTRACED) == pids[std::size_t(r)];
      if (news && WIFSTOPPED(status)) stopped.push_back(pids[std::size_t(r)]);
      if (news && !WIFSTOPPED(status)) {
        --left;
        continue;
      }
      status = -1;
      if (seconds() > end) {
        std::fprintf(stderr, "rank %d hangs while %s\n", r, doing.c_str());
        kill(pids[std::size_t(r)], SIGKILL);
      }
    }
    if (std::size_t(left) == stopped.size())  // the living have all ended
      for (const pid_t pid : stopped) kill(pid, SIGKILL);
    usleep(500);
  }
  return ended;
}
