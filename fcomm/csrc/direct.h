// Straight into a peer's result: the kernel copies from one process into another (process_vm_writev, Linux's
// cross-memory attach), once, where a slot needs a copy in and a copy out.
// A call that may go this way begins with a round that moves no data: each rank offers the address of its result in its
// control line. If all do, each writes to its peers, and one more round confirms that all have written. An address that
// a peer offers is only ever passed to the kernel, which looks it up in that peer's memory.
#pragma once

#include "blocks.h"
#include "comm.h"
#include "rounds.h"

namespace fcomm {

// One call's use of this way.
class Direct {
 public:
  // The result must come from the pool, which never reuses the block of a call that failed: a peer that was stopped
  // meanwhile may still write to it.
  Direct(fcomm_comm &c, void *result) : c_(c), result_(static_cast<char *>(result)) {}

  // Whether it pays off for messages of nbytes in rows of row_bytes.
  static bool pays(std::size_t nbytes, std::size_t row_bytes);

  // The first round of a call of that fingerprint decides which way it goes (once per communicator, two more rounds
  // find out whether the kernel permits this way). nbytes (of everything moved), whether the call could go this way at
  // all and how many ways there are follow from the fingerprint. So does `what`: calls alike in it and in size take
  // similar times. receives: whether any rank writes to this one. `opened`: rounds were made.
  fcomm_status agree(std::uint64_t fingerprint, int what, std::size_t nbytes, bool could, bool receives, bool &opened,
                     int ways = kWaysOfMost);
  bool asked() const { return asked_; }
  Way way() const { return way_; }
  bool agreed() const { return way_ == kDirect; }

  // Write the bytes of `from`, in order, into the part of rank p's result that corresponds to `here` in ours.
  fcomm_status write(int p, const Block &here, const Block &from);

  // The call has ended with that status, which is returned.
  fcomm_status end(fcomm_status status);

 private:
  fcomm_status introduce(std::uint64_t fingerprint, bool &opened);

  fcomm_comm &c_;
  char *const result_;
  bool asked_ = false;
  Way way_ = kSlots;
  std::uint32_t round_ = 0;  // the one in which the results were offered
  Ways *ways_ = nullptr;     // only on rank 0
  std::size_t nbytes_ = 0;
  std::int64_t start_ = 0;
};

}  // namespace fcomm
