#include "matrix.h"

#include <algorithm>
#include <cstring>
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
  check_shape();
  check_layout(layout);
  const size_t count = division_ == Division::kNone ? 1 : layout.nodes.size();
  parts_.reserve(count);
  for (size_t i = 0; i < count; ++i) add_part(layout, i);
}

PackedMatrix::PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols, uint8_t* packed)
    : format_(&require_format(ggml_type)), batch_(batch), rows_(rows), cols_(cols), division_(Division::kNone) {
  check_shape();
  const size_t bytes = static_cast<size_t>(batch_ * num_groups_ * group_bytes_);
  parts_.push_back({-1, 0, batch_, 0, num_groups_, 0, cols_, group_bytes_, NodeMemory::borrow(packed, bytes)});
}

// Sets what follows from the shape.
void PackedMatrix::check_shape() {
  if (batch_ < 1 || rows_ < 1 || cols_ < 1) {
    refuse("every dimension must be at least 1, found [batch, rows, cols] = " + shape_text(batch_, rows_, cols_));
  }
  if (cols_ % format_->block_cols != 0) {
    refuse(std::string(format_->name) + " rows are blocks of " + std::to_string(format_->block_cols) +
           " columns, found " + std::to_string(cols_) + " columns");
  }
  num_groups_ = (rows_ - 1) / kGroupRows + 1;
  group_bytes_ = checked_product(cols_ / format_->block_cols, int64_t{group_block_bytes(*format_)});
  checked_product(checked_product(batch_, num_groups_), group_bytes_);
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
  part.group_bytes = part.cols() / format_->block_cols * group_block_bytes(*format_);
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

// Gets the memory of ranges that are packed in ascending order, each huge page by one worker of the part.
void PackedMatrix::touch(ThreadPool& pool, const std::vector<RowRange>& ranges) {
  UnitRanges pages;
  int64_t first[ThreadPool::kMostGroups];
  for (size_t i = 0; i < parts_.size(); ++i) {
    Part& part = parts_[i];
    int64_t end = part.touched;
    for (const RowRange& range : ranges) {
      const int64_t last = std::min((range.row_start + range.num_rows + kGroupRows - 1) / kGroupRows, part.group_end) - 1;
      if (range.batch_index < part.batch_start || range.batch_index >= part.batch_end || last < part.group_start) continue;
      const int64_t offset = part.group(range.batch_index, last) + part.group_bytes - part.memory.data();
      end = std::max(end, part.memory.huge_page_of(offset - 1) + 1);
    }
    first[i] = part.touched;
    pages.add(end - part.touched);
    part.touched = end;
  }
  auto get = [&](int64_t i, int) {
    int64_t place;
    const size_t part = static_cast<size_t>(pages.find(i, place));
    parts_[part].memory.touch(first[part] + place);
  };
  if (parts_.size() == 1) {
    pool.parallel_for(pages.total(), get);
  } else {
    pool.parallel_for_divided(pages, get);
  }
}

void PackedMatrix::pack_rows(ThreadPool& pool, const std::vector<RowRange>& ranges, const uint8_t* src,
                             bool packed) {
  for (const RowRange& range : ranges) check_range("pack_rows", range.batch_index, range.row_start, range.num_rows);
  touch(pool, ranges);
  // 16 rows of a range that a part takes: the part's units, by the part.
  struct Unit {
    const RowRange* range;
    int64_t group, src_row;
  };
  std::vector<Unit> list;
  UnitRanges units;
  for (const Part& part : parts_) {
    int64_t first_row = 0;
    for (const RowRange& range : ranges) {
      const int64_t first = range.row_start / kGroupRows, end = first + (range.num_rows + kGroupRows - 1) / kGroupRows;
      const bool of_stack = range.batch_index >= part.batch_start && range.batch_index < part.batch_end;
      for (int64_t g = std::max(first, part.group_start); of_stack && g < std::min(end, part.group_end); ++g)
        list.push_back({&range, g, first_row + (g - first) * kGroupRows});
      first_row += packed ? (end - first) * kGroupRows : range.num_rows;
    }
    units.add(static_cast<int64_t>(list.size()) - units.total());
  }
  auto pack = [&](int64_t i, int) {
    int64_t place;
    const Part& part = parts_[static_cast<size_t>(units.find(i, place))];
    const Unit& unit = list[static_cast<size_t>(i)];
    const RowRange& range = *unit.range;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRows, range.row_start + range.num_rows - unit.group * kGroupRows));
    const int64_t offset = part.col_start / format_->block_cols * format_->block_bytes;
    if (packed) {  // a group is its blocks one after another, 16 rows each
      const int64_t packed_offset = part.col_start / format_->block_cols * group_block_bytes(*format_);
      const uint8_t* group = src + unit.src_row / kGroupRows * group_bytes_ + packed_offset;
      std::memcpy(part.group(range.batch_index, unit.group), group, static_cast<size_t>(part.group_bytes));
      return;
    }
    pack_group(*format_, src + unit.src_row * row_bytes() + offset, row_bytes(), count, part.cols(),
               part.group(range.batch_index, unit.group));
  };
  if (parts_.size() == 1) {
    pool.parallel_for(units.total(), pack);
  } else {
    pool.parallel_for_divided(units, pack);
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
