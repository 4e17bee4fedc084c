// What the engine measures and chooses while a program runs, tested with invented times.
#include "comm.h"

#include <random>

#include "harness.h"

namespace {

// What rank 0 learns about three ways, if the best one changes, and is slow just after a switch from another way.
void the_fastest_way_is_found() {
  doing = "choosing among ways";
  std::mt19937 random(5);
  for (const int n : {2, 3}) {
    fcomm::Ways ways;
    fcomm::Way before = fcomm::kWays;
    int in_turn = 0;
    for (const int fastest : {0, n - 1, 1, 0}) {
      constexpr int kCalls = 4000;
      int right = 0;
      for (int call = 0; call < kCalls; ++call) {
        const fcomm::Way way = ways.next(n);
        CHECK(way < n);
        in_turn = way == before ? in_turn + 1 : 1;
        before = way;
        const double noise = random() % 50 ? 1 + random() % 100 / 1000. : 20;  // a rank was stopped for a while
        ways.learn(way, (way == fastest ? 100 : 125) * noise + (way == fastest && in_turn <= 2 ? 60 : 0));
        right += way == fastest;
      }
      CHECK(ways.best == fastest);
      CHECK(right > kCalls * 3 / 4);
    }
  }
}

// Ordinary stores if the peers' cores share a cache, streaming ones if they do not, whether a message's bytes come from
// a cache or, slower either way, from memory; and a single slow copy changes nothing.
void how_to_write_slots_is_found() {
  doing = "choosing how to write slots";
  fcomm::SlotWriting writing;
  std::int64_t now = 1;
  for (const bool far : {false, true, false}) {
    int right = 0;
    constexpr int kCopies = 20'000;
    for (int copy = 0; copy < kCopies; ++copy) {
      const bool way = writing.next_way(now);
      const bool large = copy % 100 > 50;  // its bytes come from memory
      const double ns_per_kb = (way ? 30 : far ? 140 : 30) + (large ? 100 : 0) + (copy % 1000 == 999 ? 5000 : 0);
      writing.learn(way, ns_per_kb * 64, 64 << 10);
      now += std::int64_t(ns_per_kb * 64 * 2);
      right += way == far;
    }
    CHECK(writing.past == far);
    CHECK(right > kCopies * 9 / 10);
  }
}

}  // namespace

void choices_suite() {
  the_fastest_way_is_found();
  how_to_write_slots_is_found();
}
