#include "matrix.h"

#include <sys/mman.h>

#include <stdexcept>
#include <string>

#include "kernel_abi.h"
#include "pack.h"

namespace hybrid {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

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

PackedMatrix::PackedMatrix(int ggml_type, int64_t batch, int64_t rows, int64_t cols)
    : format_(&require_format(ggml_type)), batch_(batch), rows_(rows), cols_(cols) {
  if (batch < 1 || rows < 1 || cols < 1) {
    refuse("every dimension must be at least 1, found [batch, rows, cols] = " + shape_text(batch, rows, cols));
  }
  if (cols % format_->block_cols != 0) {
    refuse(std::string(format_->name) + " rows are blocks of " + std::to_string(format_->block_cols) +
           " columns, found " + std::to_string(cols) + " columns");
  }
  num_groups_ = (rows - 1) / kGroupRows + 1;
  group_bytes_ = checked_product(cols / format_->block_cols, int64_t{group_block_bytes(*format_)});
  const int64_t bytes = checked_product(checked_product(batch, num_groups_), group_bytes_);
  mapped_bytes_ = (static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage;
  if (static_cast<size_t>(bytes) < kHugePage) mapped_bytes_ = static_cast<size_t>(bytes);
  // Not reserved: strict overcommit would count a model twice while it is read. Budgets are the planner's business.
  void* data = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  // Advice only: without huge pages the kernels are slower, not wrong.
  if (mapped_bytes_ >= kHugePage) madvise(data, mapped_bytes_, MADV_HUGEPAGE);
  data_ = static_cast<uint8_t*>(data);
}

PackedMatrix::~PackedMatrix() {
  if (data_) munmap(data_, mapped_bytes_);
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
  const int64_t first = row_start / kGroupRows;
  pool.parallel_for((num_rows + kGroupRows - 1) / kGroupRows, [&](int64_t i, int) {
    const int64_t done = i * kGroupRows;
    const int count = static_cast<int>(num_rows - done < kGroupRows ? num_rows - done : kGroupRows);
    uint8_t* group = data_ + (batch_index * num_groups_ + first + i) * group_bytes_;
    pack_group(*format_, src + done * row_bytes(), count, cols_, group);
  });
}

void PackedMatrix::unpack_rows(int64_t batch_index, int64_t row_start, int64_t num_rows, uint8_t* dst) const {
  check_range("unpack_rows", batch_index, row_start, num_rows);
  for (int64_t done = 0; done < num_rows; done += kGroupRows) {
    const int count = static_cast<int>(num_rows - done < kGroupRows ? num_rows - done : kGroupRows);
    unpack_group(*format_, group(batch_index, (row_start + done) / kGroupRows), count, cols_, dst + done * row_bytes());
  }
}

}  // namespace hybrid
