// Blocks that lie side by side in the rows of a matrix, read and written as if each were contiguous.
#pragma once

#include <algorithm>
#include <cstring>

#include "comm.h"
#include "kernels.h"

namespace fcomm {

struct Block {
  char *base;
  std::size_t rows, width, pitch;
  std::size_t nbytes() const { return rows * width; }
  bool contiguous() const { return rows <= 1 || width == pitch; }
};

inline Block contiguous(const void *base, std::size_t nbytes) {
  // One type serves both directions; nothing is written through blocks of inputs.
  return {static_cast<char *>(const_cast<void *>(base)), 1, nbytes, nbytes};
}

inline void copy(char *to, const char *from, std::size_t nbytes, bool stream) {
  if (stream && nbytes >= 1024)
    kernels().stream_copy(to, from, nbytes);
  else if (nbytes)
    std::memcpy(to, from, nbytes);
}

// Bytes [from_at, from_at + nbytes) of one block to [to_at, ..) of another, row piece by row piece.
inline void transfer(const Block &to, std::size_t to_at, const Block &from, std::size_t from_at, std::size_t nbytes,
                     bool stream) {
  if (nbytes == 0) return;
  std::size_t to_row = to_at / to.width, to_column = to_at % to.width;
  std::size_t from_row = from_at / from.width, from_column = from_at % from.width;
  for (;;) {
    const std::size_t m = std::min({nbytes, to.width - to_column, from.width - from_column});
    copy(to.base + to_row * to.pitch + to_column, from.base + from_row * from.pitch + from_column, m, stream);
    if ((nbytes -= m) == 0) return;
    if ((to_column += m) == to.width) ++to_row, to_column = 0;
    if ((from_column += m) == from.width) ++from_row, from_column = 0;
  }
}

// Bytes [at, at + nbytes) of a block into a slot of our own.
inline void transfer_in(fcomm_comm &c, char *slot, const Block &from, std::size_t at, std::size_t nbytes) {
  if (from.contiguous()) return copy_in(c, slot, from.base + at, nbytes);
  transfer(contiguous(slot, nbytes), 0, from, at, nbytes, c.writing.past);
  stream_fence();
}

// A matrix's blocks, one for each rank. On the stack and uninitialised: small calls use little of it.
class Blocks {
 public:
  Blocks(const void *base, const fcomm_blocks &matrix, int size) {
    std::size_t pitch = 0;
    most_ = 0, row_ = std::size_t(-1);
    for (int j = 0; j < size; ++j) {
      const std::size_t width = matrix.widths ? matrix.widths[j] : matrix.width;
      new (&at_[j]) Block{static_cast<char *>(const_cast<void *>(base)) + pitch, matrix.rows, width, 0};
      pitch += width;
      most_ = std::max(most_, matrix.rows * width);
      if (matrix.rows > 1) row_ = std::min(row_, width);
    }
    for (int j = 0; j < size; ++j) at_[j].pitch = pitch;
    total_ = matrix.rows * pitch;
  }
  const Block &operator[](int j) const { return at_[j]; }
  std::size_t most() const { return most_; }    // bytes of the largest block
  std::size_t total() const { return total_; }  // bytes of all
  bool contiguous() const { return row_ == std::size_t(-1); }
  std::size_t row() const { return row_; }      // bytes of the shortest piece, no limit if all are contiguous

 private:
  Block at_[FCOMM_MAX_RANKS];
  std::size_t most_, row_, total_;
};

}  // namespace fcomm
