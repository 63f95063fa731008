// A weight, or a stack of them (experts, heads), in packed 16-row groups (block_formats.h).
#pragma once
#include <cstddef>
#include <cstdint>

#include "block_formats.h"
#include "thread_pool.h"

namespace hybrid {

class PackedMatrix {
 public:
  // Reserves anonymous memory, in huge pages where the system gives them; rows not packed yet are
  // zero. Throws std::invalid_argument for an unknown format or a shape it cannot have.
  PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols);
  ~PackedMatrix();
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  const FormatInfo& format() const { return *format_; }
  int64_t batch() const { return batch_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t nbytes() const { return batch_ * num_groups_ * group_bytes_; }

  int64_t row_bytes() const { return cols_ / format_->block_cols * format_->block_bytes; }  // of a GGUF row
  int64_t group_bytes() const { return group_bytes_; }
  int64_t num_groups() const { return num_groups_; }  // of one matrix of the stack
  const uint8_t* group(int64_t batch_index, int64_t index) const {
    return data_ + (batch_index * num_groups_ + index) * group_bytes_;
  }

  // Packs `num_rows` contiguous GGUF rows to rows [row_start, row_start + num_rows) of one matrix.
  // row_start is a multiple of 16, and so is num_rows unless the range ends the matrix.
  void pack_rows(ThreadPool& pool, int64_t batch_index, int64_t row_start, int64_t num_rows, const uint8_t* src);

  // The inverse, over ranges of the same kind.
  void unpack_rows(int64_t batch_index, int64_t row_start, int64_t num_rows, uint8_t* dst) const;

 private:
  void check_range(const char* operation, int64_t batch_index, int64_t row_start, int64_t num_rows) const;

  const FormatInfo* format_;
  int64_t batch_, rows_, cols_;
  int64_t num_groups_, group_bytes_;
  uint8_t* data_ = nullptr;
  size_t mapped_bytes_ = 0;
};

}  // namespace hybrid
