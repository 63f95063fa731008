#include "matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernel_abi.h"
#include "pack.h"

namespace hybrid {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("PackedMatrix: " + message); }

int64_t checked_product(int64_t a, int64_t b) {
  int64_t product;
  // Half the address space: sums of a few such sizes stay representable.
  if (__builtin_mul_overflow(a, b, &product) || product > INT64_MAX / 2) refuse("the size overflows 64 bits");
  return product;
}

std::string shape_text(int64_t batch, int64_t rows, int64_t cols) {
  return "[" + std::to_string(batch) + ", " + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

const FormatInfo& require_format(int ggml_type) {
  const FormatInfo* format = find_format(ggml_type);
  if (!format) refuse("no CPU kernel reads ggml type " + std::to_string(ggml_type) + " (see kernel_rows())");
  return *format;
}

}  // namespace

PackedMatrix::PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols, const MatrixLayout& layout)
    : format_(&require_format(ggml_type)), batch_(batch), rows_(rows), cols_(cols), division_(layout.division) {
  if (batch < 1 || rows < 1 || cols < 1) {
    refuse("every dimension must be at least 1, found [batch, rows, cols] = " + shape_text(batch, rows, cols));
  }
  if (cols % format_->block_cols != 0) {
    refuse(std::string(format_->name) + " rows are blocks of " + std::to_string(format_->block_cols) +
           " columns, found " + std::to_string(cols) + " columns");
  }
  num_groups_ = (rows - 1) / kGroupRows + 1;
  group_bytes_ = checked_product(cols / format_->block_cols, int64_t{format_->block_bytes} * kGroupRows);
  checked_product(checked_product(batch, num_groups_), group_bytes_);
  check_layout(layout);
  const size_t count = division_ == Division::kNone ? 1 : layout.nodes.size();
  parts_.reserve(count);
  for (size_t i = 0; i < count; ++i) add_part(layout, i);
}

void PackedMatrix::check_layout(const MatrixLayout& layout) const {
  const std::vector<int64_t>& cuts = layout.cuts;
  const bool cut = division_ != Division::kNone && division_ != Division::kCopies;
  if (layout.nodes.size() > static_cast<size_t>(ThreadPool::kMostGroups)) {
    refuse("at most " + std::to_string(ThreadPool::kMostGroups) + " parts, found " + std::to_string(layout.nodes.size()));
  }
  if (division_ != Division::kNone && layout.nodes.empty()) refuse("a divided matrix needs a node for each part");
  if (cuts.size() != (cut ? layout.nodes.size() + 1 : 0)) refuse("`cuts` must have one entry more than there are parts, or none where nothing is cut");
  if (!cut) return;
  const int64_t length = division_ == Division::kBatch ? batch_ : division_ == Division::kRows ? rows_ : cols_;
  const int64_t step = division_ == Division::kBatch ? 1 : division_ == Division::kRows ? kGroupRows : format_->block_cols;
  if (cuts.front() != 0 || cuts.back() != length) {
    refuse("`cuts` must lead from 0 to " + std::to_string(length) + ", what is divided");
  }
  for (size_t i = 1; i < cuts.size(); ++i) {
    if (cuts[i] <= cuts[i - 1]) refuse("every part must have something: `cuts` must ascend");
    if (i + 1 < cuts.size() && cuts[i] % step != 0) refuse("`cuts` must be multiples of " + std::to_string(step) + ", found " + std::to_string(cuts[i]));
  }
}

void PackedMatrix::add_part(const MatrixLayout& layout, size_t i) {
  Part part{layout.nodes.empty() ? -1 : layout.nodes[i], 0, batch_, 0, num_groups_, 0, cols_, 0, {}};
  if (division_ == Division::kBatch) part.batch_start = layout.cuts[i], part.batch_end = layout.cuts[i + 1];
  if (division_ == Division::kCols) part.col_start = layout.cuts[i], part.col_end = layout.cuts[i + 1];
  if (division_ == Division::kRows) {
    part.group_start = layout.cuts[i] / kGroupRows;
    part.group_end = (layout.cuts[i + 1] + kGroupRows - 1) / kGroupRows;
  }
  part.group_bytes = part.cols() / format_->block_cols * format_->block_bytes * kGroupRows;
  const bool alternating = division_ == Division::kNone && layout.nodes.size() > 1;
  if (alternating) part.node = -1;
  const Spread spread = alternating ? Spread::kInterleave : part.node < 0 ? Spread::kFirstTouch : Spread::kBind;
  part.memory = NodeMemory(static_cast<size_t>(part.nbytes()), spread, alternating ? layout.nodes : std::vector<int>{part.node});
  parts_.push_back(std::move(part));
}

int64_t PackedMatrix::nbytes() const {
  int64_t bytes = 0;
  for (const Part& part : parts_) bytes += part.nbytes();
  return bytes;
}

const uint8_t* PackedMatrix::divided_group(int64_t batch_index, int64_t index, int reader) const {
  if (division_ == Division::kCopies) {
    return parts_[static_cast<size_t>(reader) % parts_.size()].group(batch_index, index);
  }
  size_t i = 0;
  while (batch_index >= parts_[i].batch_end || index >= parts_[i].group_end) ++i;
  return parts_[i].group(batch_index, index);
}

void PackedMatrix::check_range(const char* operation, int64_t batch_index, int64_t row_start, int64_t num_rows) const {
  const std::string where = std::string(operation) + " on " + format_->name + " " + shape_text(batch_, rows_, cols_) + ": ";
  if (batch_index < 0 || batch_index >= batch_) {
    refuse(where + "batch_index must be in [0, " + std::to_string(batch_) + "), found " + std::to_string(batch_index));
  }
  if (row_start < 0 || num_rows < 0 || row_start > rows_ || num_rows > rows_ - row_start) {
    refuse(where + "rows " + std::to_string(row_start) + " + " + std::to_string(num_rows) + " lie outside the matrix");
  }
  if (row_start % kGroupRows != 0) {
    refuse(where + "row_start must be a multiple of 16, found " + std::to_string(row_start));
  }
  if (num_rows % kGroupRows != 0 && row_start + num_rows != rows_) {
    refuse(where + "num_rows must be a multiple of 16 unless the rows end the matrix, found " +
           std::to_string(num_rows) + " from row " + std::to_string(row_start));
  }
}

void PackedMatrix::pack_rows(ThreadPool& pool, int64_t batch_index, int64_t row_start, int64_t num_rows,
                             const uint8_t* src) {
  check_range("pack_rows", batch_index, row_start, num_rows);
  const int64_t first = row_start / kGroupRows, end = first + (num_rows + kGroupRows - 1) / kGroupRows;
  // The groups each part takes.
  UnitRanges ranges;
  for (const Part& part : parts_) {
    const bool of_stack = batch_index >= part.batch_start && batch_index < part.batch_end;
    ranges.add(of_stack ? std::max<int64_t>(0, std::min(end, part.group_end) - std::max(first, part.group_start)) : 0);
  }
  auto pack = [&](int64_t unit, int) {
    int64_t place;
    const Part& part = parts_[static_cast<size_t>(ranges.find(unit, place))];
    const int64_t group = std::max(first, part.group_start) + place, done = (group - first) * kGroupRows;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRows, num_rows - done));
    const int64_t offset = part.col_start / format_->block_cols * format_->block_bytes;
    pack_group(*format_, src + done * row_bytes() + offset, row_bytes(), count, part.cols(), part.group(batch_index, group));
  };
  if (parts_.size() == 1) {
    pool.parallel_for(ranges.total(), pack);
  } else {
    pool.parallel_for_divided(ranges, pack);
  }
}

void PackedMatrix::unpack_rows(int64_t batch_index, int64_t row_start, int64_t num_rows, uint8_t* dst) const {
  check_range("unpack_rows", batch_index, row_start, num_rows);
  const size_t parts = division_ == Division::kCopies ? 1 : parts_.size();
  for (size_t i = 0; i < parts; ++i) {
    const Part& part = parts_[i];
    if (batch_index < part.batch_start || batch_index >= part.batch_end) continue;
    for (int64_t done = 0; done < num_rows; done += kGroupRows) {
      const int64_t group = (row_start + done) / kGroupRows;
      if (group < part.group_start || group >= part.group_end) continue;
      const int count = static_cast<int>(std::min<int64_t>(kGroupRows, num_rows - done));
      const int64_t offset = part.col_start / format_->block_cols * format_->block_bytes;
      unpack_group(*format_, part.group(batch_index, group), count, part.cols(), dst + done * row_bytes() + offset, row_bytes());
    }
  }
}

}  // namespace hybrid
