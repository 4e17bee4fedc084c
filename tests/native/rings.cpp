// send and recv.
#include <cstring>

#include "harness.h"

namespace {

fcomm_signature signature(std::size_t n) {
  fcomm_signature s{};
  s.dtype = FCOMM_UINT8, s.ndim = 1, s.dims[0] = std::int64_t(n);
  return s;
}

std::vector<unsigned char> message(int from, int to, std::size_t n, int k) {
  std::vector<unsigned char> b(n);
  for (std::size_t i = 0; i < n; ++i) b[i] = static_cast<unsigned char>(i * 7 + i / 251 + std::size_t(from * 31 + to * 17 + k));
  return b;
}

void send(fcomm_comm *c, int from, int to, std::size_t n, int k = 0) {
  const auto b = message(from, to, n, k);
  const auto s = signature(n);
  CHECK(fcomm_send(b.data(), n, &s, to, c) == FCOMM_OK);
}

void receive(fcomm_comm *c, int from, int to, std::size_t n, int k = 0) {
  std::vector<unsigned char> b(n, 0xEE);
  const auto s = signature(n);
  CHECK(fcomm_recv(b.data(), n, &s, from, nullptr, c) == FCOMM_OK);
  CHECK(b == message(from, to, n, k));
}

constexpr std::size_t kSizes[] = {0,     1,          8191,       8192,       8193,        65535,
                                  65536, 65537,      262143,     262144,     262145,      (1 << 20) + 3,
                                  7,     (4 << 20) + 1};

void neighbours(fcomm_comm *c, int rank, int size) {
  const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
  for (const std::size_t n : kSizes) {
    doing = "passing " + std::to_string(n) + " bytes around";
    // All ranks send first: none may wait for its receiver.
    send(c, rank, next, n);
    receive(c, previous, rank, n);
    // A chain: the receiver is there before the message.
    if (rank > 0) receive(c, previous, rank, n, 1);
    if (rank < size - 1) send(c, rank, next, n, 1);
    CHECK(fcomm_barrier(n, c) == FCOMM_OK);
  }
}

void backlog(fcomm_comm *c, int rank, int size) {
  doing = "sending a hundred messages ahead";
  for (int k = 0; k < 100; ++k)
    for (int p = 0; p < size; ++p)
      if (p != rank) send(c, rank, p, std::size_t(k) * 997, k);
  CHECK(fcomm_barrier(0, c) == FCOMM_OK);  // collectives go on meanwhile
  for (int p = size - 1; p >= 0; --p)
    for (int k = 0; k < 100 && p != rank; ++k) receive(c, p, rank, std::size_t(k) * 997, k);
}

// What is still queued when a rank closes the group is still delivered.
void parting(fcomm_comm *c, int rank) {
  doing = "closing with messages in line";
  if (rank == 0) {
    for (int k = 0; k < 3; ++k) send(c, 0, 1, 1 << 20, k);
    CHECK(fcomm_close(c) == FCOMM_OK);
  } else {
    for (int k = 0; k < 3; ++k) receive(c, 0, 1, 1 << 20, k);
  }
}

// A rank waits in one group for a peer that waits for its message in another: the message moves meanwhile.
void of_another_group(const std::vector<fcomm_comm *> &c, int rank, bool closes) {
  doing = "waiting in one group with a message in line in another";
  constexpr std::size_t kMuch = 1 << 20;
  if (rank == 0) {
    send(c[0], 0, 1, kMuch);
    send(c[1], 0, 1, 1);
    if (closes) {
      send(c[1], 0, 1, kMuch);
      CHECK(fcomm_close(c[1]) == FCOMM_OK);
    } else {
      CHECK(fcomm_barrier(0, c[1]) == FCOMM_OK);
    }
  } else {
    receive(c[1], 0, 1, 1);  // by then nobody reads the other message, and it is queued
    receive(c[0], 0, 1, kMuch);
    if (closes)
      receive(c[1], 0, 1, kMuch);
    else
      CHECK(fcomm_barrier(0, c[1]) == FCOMM_OK);
  }
}

// Both leave large messages unreceived: neither waits for the other.
void parting_unread(fcomm_comm *c, int rank) {
  doing = "closing with messages that nobody wants";
  send(c, rank, 1 - rank, 1 << 20);
  const double start = seconds();
  CHECK(fcomm_close(c) == FCOMM_OK);
  CHECK(seconds() - start < 5);
}

void mismatched(fcomm_comm *c, int rank) {
  doing = "receiving what was not sent";
  CHECK(fcomm_barrier(0, c) == FCOMM_OK);
  if (rank == 0) {
    send(c, 0, 1, 12);
    fcomm_status s;
    do s = fcomm_barrier(1, c);
    while (s == FCOMM_OK);
    CHECK(s == FCOMM_MISMATCH);
  } else {
    char b[16];
    fcomm_signature expected = signature(12), got{};
    expected.dtype = FCOMM_INT8;
    CHECK(fcomm_recv(b, 12, &expected, 0, &got, c) == FCOMM_MISMATCH);
    CHECK(got.dtype == FCOMM_UINT8 && got.ndim == 1 && got.dims[0] == 12);
    CHECK(fcomm_recv(b, 12, &expected, 0, &got, c) == FCOMM_POISONED);
  }
  CHECK(fcomm_last_failure(c).culprit == 0);
}

}  // namespace

void rings_suite() {
  for (const int size : {2, 3}) {
    as_threads({size}, [&](fcomm_comm *c, int rank) { neighbours(c, rank, size), backlog(c, rank, size); });
    CHECK(as_processes({size}, [&](fcomm_comm *c, int rank) { neighbours(c, rank, size), backlog(c, rank, size); }).all_well());
  }
  as_threads({2}, parting);
  CHECK(as_processes({2}, parting).all_well());
  for (const bool closes : {false, true})
    as_threads_of_groups({2}, 2, [&](const std::vector<fcomm_comm *> &c, int rank) { of_another_group(c, rank, closes); });
  as_threads({2}, parting_unread);
  as_threads({2}, mismatched);
}
