// When something goes wrong, every rank soon gets the same reason and the same culprit.
#include <sched.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <new>
#include <thread>

#include "harness.h"

namespace {

fcomm_status any_collective(fcomm_comm *c, int kind, int rank, int size, std::vector<char> &in, std::vector<char> &out) {
  const std::size_t n = in.size() / std::size_t(size) / 4 * 4;
  switch (kind) {
    case 0: return fcomm_all_reduce(in.data(), out.data(), n, FCOMM_UINT8, FCOMM_SUM, 0, c);
    case 1: return fcomm_all_gather(in.data(), out.data(), even(1, n), 0, c);
    case 2: return fcomm_reduce_scatter(in.data(), even(4, n / 4), out.data(), FCOMM_UINT8, FCOMM_SUM, 0, c);
    case 3: return fcomm_all_to_all(in.data(), even(1, n), out.data(), even(1, n), 1, 0, c);
    case 4: return fcomm_broadcast(in.data(), out.data(), n, 1, 0, c);
    case 5: return fcomm_permute(in.data(), out.data(), n, (rank + 1) % size, (rank + size - 1) % size, 0, c);
    default: return fcomm_barrier(0, c);
  }
}
constexpr int kKinds = 7;

void check_poisoned(fcomm_comm *c) {
  const double start = seconds();
  CHECK(fcomm_barrier(0, c) == FCOMM_POISONED);
  CHECK(seconds() - start < 10);
}

// One rank is struck at a protocol step; the others must name it.
void struck(const char *point, const char *action, int victim, int size, int kind, std::size_t nbytes) {
  const std::string fault = std::string(point) + ":" + std::to_string(victim) + ":" + action + ":3";
  doing = "FCOMM_TEST_FAULT=" + fault + ", collective " + std::to_string(kind) + ", " + std::to_string(nbytes) + " bytes, " +
          std::to_string(size) + " ranks";
  setenv("FCOMM_TEST_FAULT", fault.c_str(), 1);
  const bool stop = !std::strcmp(action, "stop");
  World world{size};
  world.timeout_s = stop ? 1 : 20;
  const Ended ended = as_processes(world, [&](fcomm_comm *c, int rank) {
    std::vector<char> in(nbytes, 1), out(nbytes * std::size_t(size), 1);
    fcomm_status s = FCOMM_OK;
    for (int k = 0; s == FCOMM_OK && k < 10; ++k) s = any_collective(c, kind, rank, size, in, out);
    if (!std::strcmp(action, "delay")) {
      CHECK(s == FCOMM_OK);
      return;
    }
    CHECK(s == (stop ? FCOMM_TIMEOUT : FCOMM_DIED));
    CHECK(fcomm_last_failure(c).culprit == victim);
    check_poisoned(c);
  });
  unsetenv("FCOMM_TEST_FAULT");
  for (int r = 0; r < size; ++r) {
    const int status = ended.status[std::size_t(r)];
    if (r == victim && std::strcmp(action, "delay"))
      CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    else
      CHECK(status == 0);
  }
}

void every_step() {
  for (const int size : {2, 3})
    for (const char *point : {"fill", "publish", "wait", "drain"})
      for (int kind = 0; kind < kKinds; ++kind) struck(point, "kill", (kind + size) % size, size, kind, kind % 2 ? 64 : 200'000);
  struck("publish", "kill", 2, 4, 0, 1 << 20);
  for (const char *point : {"fill", "wait", "drain"}) struck(point, "delay", 1, 3, 0, 200'000);
  for (const char *point : {"fill", "drain"}) struck(point, "stop", 1, 3, 2, 200'000);
}

// If Yama or filters of system calls refuse this, the engine uses slots.
bool processes_may_write_to_each_other() {
  int word = 0, one = 1;
  const pid_t parent = getpid(), child = fork();
  if (child == 0) {
    const iovec here{&one, sizeof one}, there{&word, sizeof word};
    _exit(process_vm_writev(parent, &here, 1, &there, 1, 0) == sizeof one ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && (status != 0 || word == 1));
  if (status) std::fprintf(stderr, "failures: writes into results are not tried, the kernel refuses them here\n");
  return status == 0;
}

void every_step_of_writing() {
  const WithDirect always("always");
  for (const int size : {2, 3})
    for (const char *point : {"publish", "wait", "write"})
      for (const int kind : {0, 1, 3, 5}) struck(point, "kill", (kind + size) % size, size, kind, kind % 3 ? 3000 : 200'000);
  for (const char *action : {"stop", "delay"}) struck("write", action, 1, 3, 1, 200'000);
}

// Rank 1 is stopped just before it writes, and goes on when rank 0 has given up and its block belongs to another.
void a_late_writer() {
  doing = "a rank writes after its peer has given up";
  setenv("FCOMM_TEST_FAULT", "write:1:stop:1", 1);
  World world{2};
  world.timeout_s = 1;
  CHECK(as_processes(world, [](fcomm_comm *c, int rank) {
    constexpr std::size_t kPart = 1 << 20;
    const std::vector<char> in(kPart, 7);
    char *const out = static_cast<char *>(fcomm_pool_take(2 * kPart));
    CHECK(fcomm_all_gather(in.data(), out, even(1, kPart), 0, c) == FCOMM_TIMEOUT);
    fcomm_pool_return(out);
    if (rank == 1) return;
    std::vector<char *> next;
    for (int k = 0; k < 4; ++k) next.push_back(static_cast<char *>(fcomm_pool_take(2 * kPart)));
    for (char *block : next) std::memset(block, 0, 2 * kPart);
    kill(fcomm_pid(c, 1), SIGCONT);
    usleep(200'000);
    for (char *block : next) CHECK(block != out && std::all_of(block, block + 2 * kPart, [](char b) { return b == 0; }));
  }).all_well());
  unsetenv("FCOMM_TEST_FAULT");
}

using Call = std::function<fcomm_status(fcomm_comm *, bool odd)>;

// The last rank asks for something else: all ranks get an error, which names that rank if there is a majority.
void mismatched(const char *what, int size, int odd, const Call &call) {
  doing = std::string("one rank differs in ") + what + ", " + std::to_string(size) + " ranks";
  as_threads({size}, [&](fcomm_comm *c, int rank) {
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    const double start = seconds();
    CHECK(call(c, rank == odd) == FCOMM_MISMATCH);
    CHECK(seconds() - start < 15);
    const fcomm_failure f = fcomm_last_failure(c);
    CHECK(f.reason == FCOMM_MISMATCH && (size == 2 || f.culprit == odd));
    check_poisoned(c);
    fcomm_describe(c, ("rank " + std::to_string(rank)).c_str());
    char text[64];
    CHECK(fcomm_description(c, f.culprit, 5, text, sizeof text));
    CHECK(text == "rank " + std::to_string(f.culprit));
  });
}

void mismatches() {
  static char in[4096], out[4096 * 4];
  for (const int size : {2, 3, 4})
    for (const int odd : {0, size - 1}) {
      mismatched("the collective", size, odd, [](fcomm_comm *c, bool is) {
        return is ? fcomm_barrier(0, c) : fcomm_all_reduce(in, out, 10, FCOMM_INT32, FCOMM_SUM, 0, c);
      });
      mismatched("the dtype", size, odd, [](fcomm_comm *c, bool is) {
        return fcomm_all_reduce(in, out, 10, is ? FCOMM_FLOAT32 : FCOMM_INT32, FCOMM_SUM, 0, c);
      });
      mismatched("the op", size, odd, [](fcomm_comm *c, bool is) {
        return fcomm_all_reduce(in, out, 10, FCOMM_INT32, is ? FCOMM_MAX : FCOMM_SUM, 0, c);
      });
      mismatched("the count", size, odd, [](fcomm_comm *c, bool is) { return fcomm_permute(in, out, is ? 11 : 10, 0, -1, 0, c); });
      mismatched("the root", size, odd, [](fcomm_comm *c, bool is) { return fcomm_broadcast(in, out, 10, is, 0, c); });
      mismatched("the tag", size, odd, [](fcomm_comm *c, bool is) { return fcomm_all_gather(in, out, even(2, 5), is, c); });
      mismatched("what it expects to receive", size, odd, [=](fcomm_comm *c, bool is) {
        std::vector<std::size_t> sent(std::size_t(size), 8), received(std::size_t(size), 8);
        if (is) received[std::size_t((odd + (size > 2)) % size)] = 16;  // of two ranks, its own block
        return fcomm_all_to_all(in, uneven(1, sent), out, uneven(1, received), 1, 0, c);
      });
    }
}

void deadlines() {
  doing = "a rank comes too late";
  World world{3};
  world.timeout_s = 1.5;
  std::atomic<int> raised{0};
  as_threads(world, [&](fcomm_comm *c, int rank) {
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    if (rank == 1) usleep(200'000);  // late, but not too late
    CHECK(fcomm_barrier(1, c) == FCOMM_OK);
    while (rank == 1 && raised.load() < 2) usleep(1000);
    const fcomm_status s = fcomm_barrier(2, c);
    CHECK(s == FCOMM_TIMEOUT);
    ++raised;
    const fcomm_failure f = fcomm_last_failure(c);
    CHECK(f.culprit == 1 && fcomm_behind(c, 1) && !fcomm_behind(c, 0) && !fcomm_behind(c, 2));
  });
  doing = "nobody sends";
  raised = 0;
  as_threads(world, [&](fcomm_comm *c, int rank) {
    char b[8];
    fcomm_signature s{};
    const double start = seconds();
    if (rank == 0) CHECK(fcomm_recv(b, 8, &s, 2, nullptr, c) == FCOMM_TIMEOUT);
    if (rank == 1) CHECK(fcomm_barrier(0, c) == FCOMM_TIMEOUT);  // waits for 2, just as long
    ++raised;
    while (rank == 2 && raised.load() < 3) usleep(1000);
    if (rank == 2) CHECK(fcomm_barrier(0, c) == FCOMM_TIMEOUT);
    CHECK(seconds() - start < 15);
    CHECK(rank == 1 || fcomm_last_failure(c).reason == FCOMM_TIMEOUT);
  });
}

void departures() {
  doing = "a rank closes the group";
  as_threads({3}, [](fcomm_comm *c, int rank) {
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    if (rank == 2) {
      CHECK(fcomm_close(c) == FCOMM_OK && fcomm_close(c) == FCOMM_OK);
      CHECK(fcomm_barrier(0, c) == FCOMM_CLOSED);
      return;
    }
    const double start = seconds();
    CHECK(fcomm_barrier(1, c) == FCOMM_LEFT);
    CHECK(fcomm_last_failure(c).culprit == 2 && seconds() - start < 15);
  });
  doing = "one thread closes the group while another asks about it";
  as_threads({2}, [](fcomm_comm *c, int) {
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    std::thread asking([c] {
      for (int k = 0; k < 1000; ++k) fcomm_behind(c, 0), fcomm_pid(c, 0), fcomm_round(c), fcomm_last_failure(c);
    });
    CHECK(fcomm_close(c) == FCOMM_OK);
    asking.join();
  });
}

void a_reader_that_dies() {
  doing = "the receiver dies inside recv, and the sender's core is shared";
  setenv("FCOMM_TEST_FAULT", "taken:1:kill", 1);
  const Ended ended = as_processes({2}, [](fcomm_comm *c, int rank) {
    std::vector<char> message(4 << 20);
    fcomm_signature s{};
    s.dtype = FCOMM_UINT8, s.ndim = 1, s.dims[0] = std::int64_t(message.size());
    if (rank == 1) {
      fcomm_recv(message.data(), message.size(), &s, 0, nullptr, c);
      return;
    }
    cpu_set_t core;
    CPU_ZERO(&core);
    CPU_SET(sched_getcpu(), &core);
    sched_setaffinity(0, sizeof core, &core);
    std::atomic<bool> done{false};
    std::vector<std::thread> others;
    for (int k = 0; k < 3; ++k)
      others.emplace_back([&] {
        while (!done.load()) {}
      });
    const double start = seconds();
    CHECK(fcomm_send(message.data(), message.size(), &s, 1, c) == FCOMM_OK);
    CHECK(seconds() - start < 10);
    done = true;
    for (std::thread &t : others) t.join();
  });
  unsetenv("FCOMM_TEST_FAULT");
  CHECK(ended.status[0] == 0 && WIFSIGNALED(ended.status[1]));
}

void forks() {
  doing = "a rank forks";
  CHECK(as_processes({2}, [](fcomm_comm *c, int) {
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
    const pid_t pid = fork();
    if (pid == 0) {
      const bool right = fcomm_barrier(1, c) == FCOMM_FORKED && fcomm_close(c) == FCOMM_FORKED;
      fcomm_free(c);
      _exit(right ? 0 : 1);
    }
    int status = 1;
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    for (int k = 0; k < 100; ++k) CHECK(fcomm_barrier(2, c) == FCOMM_OK);
  }).all_well());
}

std::atomic<double> interrupted{0};  // when

void interrupts() {
  doing = "a rank is interrupted";
  void *page = mmap(nullptr, sizeof(std::atomic<int>), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(page != MAP_FAILED);
  auto *told = new (page) std::atomic<int>{0};
  CHECK(as_processes({2}, [told](fcomm_comm *c, int rank) {
    if (rank == 0) {
      std::signal(SIGALRM, [](int) { interrupted = seconds(); });
      fcomm_set_interrupt_hook([] { return int(interrupted.load() > 0); });
      ualarm(100'000, 0);
      CHECK(fcomm_barrier(0, c) == FCOMM_INTERRUPTED);
      CHECK(seconds() - interrupted.load() < 10);
      *told = 1;
    } else {
      while (!*told) usleep(1000);
      CHECK(fcomm_barrier(0, c) == FCOMM_INTERRUPTED);
    }
    CHECK(fcomm_last_failure(c).culprit == 0);
  }).all_well());
  munmap(page, sizeof(std::atomic<int>));
}

void arguments() {
  doing = "arguments that make no sense";
  as_threads({2}, [](fcomm_comm *c, int rank) {
    char in[64] = {}, out[64];
    fcomm_signature s{};
    // An error at once, without involving the peer, so that the group goes on.
    CHECK(fcomm_all_reduce(in, out, 4, FCOMM_FLOAT32, FCOMM_BOR, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_all_reduce(in, out, 4, FCOMM_DTYPES, FCOMM_SUM, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_all_reduce(in, out, 4, FCOMM_INT32, -1, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_scan(in, out, 4, FCOMM_INT32, FCOMM_MEAN, 0, 0, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_broadcast(in, out, 4, 2, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_permute(in, out, 4, 2, 1, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_permute(in, out, 4, 1, 2, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_send(in, 0, &s, rank, c) == FCOMM_INVALID);
    CHECK(fcomm_recv(out, 0, &s, -1, nullptr, c) == FCOMM_INVALID);
    CHECK(fcomm_all_to_all(in, even(1, 8), out, even(2, 8), 0, 0, c) == FCOMM_INVALID);
    CHECK(fcomm_barrier(0, c) == FCOMM_OK);
  });
}

}  // namespace

void failures_suite() {
  mismatches();
  deadlines();
  departures();
  arguments();
  if (kForks) a_reader_that_dies(), forks(), interrupts(), every_step();
  if (kForks && processes_may_write_to_each_other()) every_step_of_writing(), a_late_writer();
}
