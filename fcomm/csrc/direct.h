// Straight into a peer's result: the kernel copies from one process into another (process_vm_writev, Linux's cross-memory
// attach) and moves once what goes into a slot and out of it again.
//
// A call that may go this way begins with a round that moves nothing: each rank offers the address of its result in its
// control line, and if all do, each writes to its peers and one more round says that all have written. An address that a
// peer offers is only ever handed to the kernel, which looks it up in that peer's memory.
#pragma once

#include "blocks.h"
#include "comm.h"
#include "rounds.h"

namespace fcomm {

// One call's use of it.
class Direct {
 public:
  // The result must come from the pool: the block of a call that failed is never used again, since a peer that was
  // stopped meanwhile may still write to it.
  Direct(fcomm_comm &c, void *result) : c_(c), result_(static_cast<char *>(result)) {}

  // Are messages of so many bytes, in rows of so many, worth it?
  static bool pays(std::size_t nbytes, std::size_t row_bytes);

  // The first round of a call of that fingerprint (and, once per communicator, two more, in which the ranks find out
  // whether the kernel lets them): which way shall it go? nbytes (of all that is moved), whether the call could go this
  // way at all and how many ways there are follow from the fingerprint, as does `what`: calls alike in it and in size
  // take times alike. receives: whether anybody writes to this rank. `opened`: rounds were made.
  fcomm_status agree(std::uint64_t fingerprint, int what, std::size_t nbytes, bool could, bool receives, bool &opened,
                     int ways = kWaysOfMost);
  bool asked() const { return asked_; }
  Way way() const { return way_; }
  bool agreed() const { return way_ == kDirect; }

  // The bytes of `from`, in order, into the part of rank p's result that lies where `here` does in ours.
  fcomm_status write(int p, const Block &here, const Block &from);

  // The call has ended with that status, which it gives back.
  fcomm_status end(fcomm_status status);

 private:
  fcomm_status introduce(std::uint64_t fingerprint, bool &opened);

  fcomm_comm &c_;
  char *const result_;
  bool asked_ = false;
  Way way_ = kSlots;
  std::uint32_t round_ = 0;  // in which the results were offered
  Ways *ways_ = nullptr;     // on rank 0
  std::size_t nbytes_ = 0;
  std::int64_t start_ = 0;
};

}  // namespace fcomm
