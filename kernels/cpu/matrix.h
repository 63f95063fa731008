// A weight, or a stack of them (experts, heads), in packed 16-row groups (block_formats.h).
//
// It lies in one piece, or in parts, each in memory of one NUMA node: copies, or slices of the stack, of the rows or
// of the columns. Part i belongs to the workers of group i of the thread pool; whether other workers
// read it is for the operations to say.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "block_formats.h"
#include "numa.h"
#include "thread_pool.h"

namespace hybrid {

enum class Division {
  kNone,    // one part
  kCopies,  // each part is the whole
  kBatch,   // each part has some matrices of the stack
  kRows,    // each part has some 16-row groups of every matrix
  kCols,    // each part has some columns of every matrix, whole blocks of the format
};

// Where a matrix lies. Nodes are one for each part, -1: wherever its pages are written first; with Division::kNone
// several nodes mean that pages alternate between them. `cuts` are where parts begin and end: 0 < ... < what is divided,
// one more than parts, in matrices, rows (multiples of 16 but for the last) or columns.
struct MatrixLayout {
  Division division = Division::kNone;
  std::vector<int> nodes;
  std::vector<int64_t> cuts;
};

class PackedMatrix {
 public:
  // A range of the matrix in memory of its own.
  struct Part {
    int node;
    int64_t batch_start, batch_end, group_start, group_end, col_start, col_end;
    int64_t group_bytes;
    NodeMemory memory;
    int64_t touched = 0;  // huge pages whose memory is there

    int64_t cols() const { return col_end - col_start; }
    int64_t num_groups() const { return group_end - group_start; }
    int64_t nbytes() const { return (batch_end - batch_start) * num_groups() * group_bytes; }
    uint8_t* group(int64_t batch_index, int64_t index) const {
      return memory.data() + ((batch_index - batch_start) * num_groups() + index - group_start) * group_bytes;
    }
  };

  // Rows not packed yet are zero. Throws std::invalid_argument for an unknown format, a shape it cannot have, or a
  // layout that does not fit it.
  PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols, const MatrixLayout& layout = {});
  // Over packed bytes that somebody else keeps, in one piece: `nbytes()` of them, not to be packed anew.
  PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols, uint8_t* packed);
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  const FormatInfo& format() const { return *format_; }
  int64_t batch() const { return batch_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t nbytes() const;  // of all parts

  Division division() const { return division_; }
  const std::vector<Part>& parts() const { return parts_; }

  int64_t row_bytes() const { return cols_ / format_->block_cols * format_->block_bytes; }  // of a GGUF row
  int64_t group_bytes() const { return group_bytes_; }
  int64_t num_groups() const { return num_groups_; }  // of one matrix of the stack

  // A group as workers of a group of the pool are to read it: their own copy, or the only one there is. Groups of a
  // matrix that follow one another lie one after another as far as one part has them. Not for Division::kCols.
  const uint8_t* group(int64_t batch_index, int64_t index, int reader) const {
    if (division_ == Division::kNone) return parts_[0].group(batch_index, index);
    return divided_group(batch_index, index, reader);
  }

  // Rows [row_start, row_start + num_rows) of one matrix. row_start is a multiple of 16, and so is num_rows unless the
  // range ends the matrix.
  struct RowRange {
    int64_t batch_index, row_start, num_rows;
  };

  // Packs GGUF rows, those of one range behind those of the other, to every part that has some of them, by that part's
  // workers.
  // Where they are `packed` already they are copied: 16-row groups as a matrix in one piece has them.
  void pack_rows(ThreadPool& pool, const std::vector<RowRange>& ranges, const uint8_t* src, bool packed = false);

  // The inverse, over ranges of the same kind; of copies the first is read.
  void unpack_rows(int64_t batch_index, int64_t row_start, int64_t num_rows, uint8_t* dst) const;

 private:
  void check_range(const char* operation, int64_t batch_index, int64_t row_start, int64_t num_rows) const;
  void check_layout(const MatrixLayout& layout) const;
  void check_shape();
  void touch(ThreadPool& pool, const std::vector<RowRange>& ranges);
  void add_part(const MatrixLayout& layout, size_t index);
  const uint8_t* divided_group(int64_t batch_index, int64_t index, int reader) const;

  const FormatInfo* format_;
  int64_t batch_, rows_, cols_;
  int64_t num_groups_, group_bytes_;
  Division division_;
  std::vector<Part> parts_;
};

}  // namespace hybrid
