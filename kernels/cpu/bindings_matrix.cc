#include "bindings_matrix.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings_address.h"
#include "codebooks.h"
#include "kernel_abi.h"
#include "linear.h"
#include "matrix.h"
#include "recording.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

constexpr const char* kDivisions[] = {"none", "copies", "batch", "rows", "cols"};

void bind_new(PackedMatrix* self, int ggml_type, int64_t batch, int64_t rows, int64_t cols, const std::string& division,
              const std::vector<int>& nodes, const std::vector<int64_t>& cuts) {
  const auto found = std::find(std::begin(kDivisions), std::end(kDivisions), division);
  if (found == std::end(kDivisions)) {
    throw std::invalid_argument("PackedMatrix: division '" + division + "' is unknown; choose none, copies, batch, rows or cols");
  }
  new (self) PackedMatrix(ggml_type, batch, rows, cols, {static_cast<Division>(found - std::begin(kDivisions)), nodes, cuts});
}

nb::list list_parts(const PackedMatrix& m) {
  nb::list parts;
  for (const PackedMatrix::Part& part : m.parts()) {
    nb::dict entry;
    entry["node"] = part.node;
    entry["address"] = reinterpret_cast<Address>(part.memory.data());
    entry["nbytes"] = part.nbytes();
    entry["batch"] = nb::make_tuple(part.batch_start, part.batch_end);
    entry["rows"] = nb::make_tuple(part.group_start * kGroupRows, std::min(part.group_end * kGroupRows, m.rows()));
    entry["cols"] = nb::make_tuple(part.col_start, part.col_end);
    entry["problem"] = part.memory.problem();
    parts.append(entry);
  }
  return parts;
}

void bind_pack(PackedMatrix& matrix, ThreadPool& pool, int64_t batch_index, int64_t row_start, int64_t num_rows,
               Address src) {
  matrix.pack_rows(pool, {{batch_index, row_start, num_rows}}, pointer<const uint8_t>(src, "pack_rows", "src"));
}

void bind_pack_ranges(PackedMatrix& matrix, ThreadPool& pool, const std::vector<std::tuple<int64_t, int64_t, int64_t>>& ranges,
                      Address src, bool packed) {
  std::vector<PackedMatrix::RowRange> list;
  for (const auto& [batch_index, row_start, num_rows] : ranges) list.push_back({batch_index, row_start, num_rows});
  const uint8_t* rows = pointer<const uint8_t>(src, "pack_ranges", "src");
  nb::gil_scoped_release unlocked;
  matrix.pack_rows(pool, list, rows, packed);
}

void bind_unpack(const PackedMatrix& matrix, int64_t batch_index, int64_t row_start, int64_t num_rows, Address dst) {
  matrix.unpack_rows(batch_index, row_start, num_rows, pointer<uint8_t>(dst, "unpack_rows", "dst"));
}

void bind_linear(ThreadPool& pool, const PackedMatrix& matrix, Address x, int64_t num_tokens, int64_t x_stride,
                 Address out, int64_t out_stride) {
  if (num_tokens == 0) return;
  run_operation([=, &pool, &matrix, x_in = pointer<const float>(x, "linear", "x"),
                 result = pointer<float>(out, "linear", "out")] {
    linear(pool, matrix, x_in, num_tokens, x_stride, result, out_stride);
  });
}

void bind_linear_batched(ThreadPool& pool, const PackedMatrix& matrix, Address x, int64_t num_tokens,
                         int64_t x_token_stride, int64_t x_batch_stride, Address out, int64_t out_token_stride,
                         int64_t out_batch_stride) {
  constexpr const char* kName = "linear_batched";
  if (num_tokens == 0) return;
  const LinearArgs args{.x = pointer<const float>(x, kName, "x"),
                  .num_tokens = num_tokens,
                  .x_token_stride = x_token_stride,
                  .x_batch_stride = x_batch_stride,
                  .out = pointer<float>(out, kName, "out"),
                  .out_token_stride = out_token_stride,
                  .out_batch_stride = out_batch_stride};
  run_operation([&pool, &matrix, args] { linear_batched(pool, matrix, args); });
}

void bind_gather(ThreadPool& pool, const PackedMatrix& matrix, Address ids, int64_t num_tokens, Address out) {
  if (num_tokens == 0) return;
  run_operation([&pool, &matrix, num_tokens, rows = pointer<const int32_t>(ids, "gather_rows", "ids"),
                 result = pointer<float>(out, "gather_rows", "out")] { gather_rows(pool, matrix, rows, num_tokens, result); });
}

// For tests: the int8 planes as quantize_row writes them.
void bind_quantize(Address x, int64_t cols, Address codes, Address scales, Address sums) {
  constexpr const char* kName = "quantize_activations";
  if (cols < 1) throw std::invalid_argument(std::string(kName) + ": `cols` must be at least 1, found " + std::to_string(cols));
  kernels_of(current_isa())
      .quantize_row(pointer<const float>(x, kName, "x"), cols, pointer<int8_t>(codes, kName, "codes"),
                    pointer<float>(scales, kName, "scales"), pointer<int16_t>(sums, kName, "sums"));
}

nb::bytes code_book(const std::string& format) {
  const auto bytes_of = [](const auto& grid) { return nb::bytes(reinterpret_cast<const char*>(grid), sizeof grid); };
  if (format == "IQ2_XXS") return bytes_of(kGridIQ2XXS);
  if (format == "IQ2_XS") return bytes_of(kGridIQ2XS);
  if (format == "IQ2_S") return bytes_of(kGridIQ2S);
  if (format == "IQ3_XXS") return bytes_of(kGridIQ3XXS);
  if (format == "IQ3_S") return bytes_of(kGridIQ3S);
  if (format == "IQ1_S" || format == "IQ1_M") return bytes_of(kGridIQ1S);
  throw std::invalid_argument("code_book: " + format + " has none; IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S and IQ1_M do");
}

}  // namespace

void bind_matrix(nb::module_& m) {
  nb::class_<PackedMatrix>(m, "PackedMatrix", "A weight, or a stack of them, in packed 16-row groups; new rows are zero.")
      .def("__init__", &bind_new, "ggml_type"_a, "batch"_a, "rows"_a, "cols"_a, "division"_a = "none",
           "nodes"_a = std::vector<int>(), "cuts"_a = std::vector<int64_t>(),
           "division: none, copies, batch, rows or cols; nodes: one for each part, -1: anywhere; cuts: see matrix.h.")
      .def_prop_ro("ggml_type", [](const PackedMatrix& m) { return m.format().ggml_type; })
      .def_prop_ro("batch", &PackedMatrix::batch)
      .def_prop_ro("rows", &PackedMatrix::rows)
      .def_prop_ro("cols", &PackedMatrix::cols)
      .def_prop_ro("nbytes", &PackedMatrix::nbytes, "Bytes of memory, padding rows included.")
      .def_prop_ro("address", [](const PackedMatrix& m) { return reinterpret_cast<Address>(m.parts()[0].memory.data()); },
                   "Address of the packed bytes, of the first part; the layout is stated in block_formats.h.")
      .def_prop_ro("division", [](const PackedMatrix& m) { return kDivisions[static_cast<size_t>(m.division())]; })
      .def_prop_ro("parts", &list_parts, "Its pieces: node, address, nbytes, the ranges they hold, why memory is not bound.")
      .def("pack_rows", &bind_pack, "pool"_a, "batch_index"_a, "row_start"_a, "num_rows"_a, "src"_a, Unlocked(),
           "Packs GGUF rows; row_start and num_rows are multiples of 16, except that num_rows may end the matrix.")
      .def("pack_ranges", &bind_pack_ranges, "pool"_a, "ranges"_a, "src"_a, "packed"_a = false,
           "pack_rows for ranges (batch_index, row_start, num_rows) whose rows, or whose packed groups, stand one "
           "behind the other.")
      .def_static("over", [](int ggml_type, int64_t batch, int64_t rows, int64_t cols, Address packed) {
        return new PackedMatrix(ggml_type, batch, rows, cols, pointer<uint8_t>(packed, "PackedMatrix.over", "packed"));
      }, "ggml_type"_a, "batch"_a, "rows"_a, "cols"_a, "packed"_a, "Over packed bytes that the caller keeps, a mapped file.")
      .def("unpack_rows", &bind_unpack, "batch_index"_a, "row_start"_a, "num_rows"_a, "dst"_a, Unlocked(),
           "Writes GGUF rows, the inverse of pack_rows.");
  m.def("linear", &bind_linear, "pool"_a, "matrix"_a, "x"_a, "num_tokens"_a, "x_stride"_a, "out"_a, "out_stride"_a,
        Unlocked(), "out[t, rows] = W @ x[t, cols] in float32; strides in elements.");
  m.def("linear_batched", &bind_linear_batched, "pool"_a, "matrix"_a, "x"_a, "num_tokens"_a, "x_token_stride"_a,
        "x_batch_stride"_a, "out"_a, "out_token_stride"_a, "out_batch_stride"_a, Unlocked(),
        "out[t, b, rows] = W[b] @ x[t, b, cols] in float32; strides in elements.");
  m.def("gather_rows", &bind_gather, "pool"_a, "matrix"_a, "ids"_a, "num_tokens"_a, "out"_a, Unlocked(),
        "out[t, cols] = row ids[t] (int32) in float32.");
  m.def("code_book", &code_book, "format"_a,
        "Its entries as int8: eight magnitudes each (IQ2), four (IQ3), or eight times eight weights (IQ1).");
  m.def("quantize_activations", &bind_quantize, "x"_a, "cols"_a, "codes"_a, "scales"_a, "sums"_a,
        "Rounds one row as `linear` does: int8 codes (padded to 64), a float32 scale for 256 columns, int16 sums of 16.");
}

}  // namespace hybrid
