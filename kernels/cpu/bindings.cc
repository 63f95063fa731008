// The extension module: ISA choice, the kernel table, the thread pool.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings_handoff.h"
#include "bindings_matrix.h"
#include "bindings_numa.h"
#include "bindings_ops.h"
#include "dispatch.h"
#include "isa.h"
#include "thread_pool.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i)
    if (isa_supported(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::optional<Isa> isa_named(const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i)
    if (name == isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return std::nullopt;
}

Isa require_isa(const std::string& name) {
  const std::optional<Isa> isa = isa_named(name);
  if (!isa) throw std::invalid_argument("ISA '" + name + "' is unknown; this host supports " + joined(supported_isas()));
  return *isa;
}

std::string select_isa(const std::optional<std::string>& name) {
  const Isa isa = name ? require_isa(*name) : best_isa();
  if (!isa_supported(isa)) {
    throw std::invalid_argument("ISA '" + *name + "' needs " + joined(isa_missing(isa)) +
                                ", which this host lacks; it supports " + joined(supported_isas()));
  }
  set_current_isa(isa);
  return isa_name(isa);
}

nb::list kernel_rows() {
  nb::list rows;
  for (const KernelRow* row : all_kernel_rows()) {
    nb::dict entry;
    entry["format"] = row->format->name;
    entry["ggml_type"] = row->format->ggml_type;
    entry["activation"] = row->activation == ActFormat::q8 ? "q8" : "f32";
    entry["isa"] = isa_name(row->isa);
    entry["name"] = row->name;
    entry["tile"] = row->tile;
    entry["block_cols"] = row->format->block_cols;
    entry["supported"] = isa_supported(row->isa);
    rows.append(entry);
  }
  return rows;
}

bool has_kernel(int ggml_type, const std::string& isa) {
  const FormatInfo* format = find_format(ggml_type);
  return format && select_kernel(*format, require_isa(isa)) != nullptr;
}

std::optional<std::string> kernel_name(int ggml_type, const std::string& isa) {
  const FormatInfo* format = find_format(ggml_type);
  const KernelRow* row = format ? select_kernel(*format, require_isa(isa)) : nullptr;
  return row ? std::optional<std::string>(row->name) : std::nullopt;
}

nb::dict features() {
  nb::dict found;
  for (const Feature& feature : cpu_features()) found[feature.name] = feature.present;
  return found;
}

}  // namespace
}  // namespace hybrid

NB_MODULE(_cpu, m) {
  using namespace hybrid;
  m.doc() = "CPU kernels. Tensors come as addresses of contiguous memory; the callers keep them alive.";
  m.def("supported_isas", &supported_isas, "ISAs this host can run, the best last.");
  m.def("isas", &isas, "Every ISA there are kernels for, the best last.");
  m.def("isa_missing", [](const std::string& name) { return isa_missing(require_isa(name)); }, "name"_a,
        "The CPU features of an ISA this host lacks; empty if it can run it. Raises ValueError.");
  m.def("select_isa", &select_isa, "name"_a.none(),
        "Sets the ISA of this process and returns its name; None: the best one. Raises ValueError.");
  m.def("current_isa", [] { return isa_name(current_isa()); });
  m.def("cpu_features", &features, "CPUID features that matter here, the operating system's part included.");
  m.def("kernel_rows", &kernel_rows, "The kernel table, one entry for each format and ISA.");
  m.def("has_kernel", &has_kernel, "ggml_type"_a, "isa"_a);
  m.def("kernel_name", &kernel_name, "ggml_type"_a, "isa"_a,
        "Name of the row that computes with a format on an ISA, host support or not; None if there is none. Raises "
        "ValueError for an unknown ISA.");
  m.def("physical_cores", [] { return physical_cores(); }, "One CPU number for each physical core this process may run on.");
  nb::class_<ThreadPool>(m, "ThreadPool", "Persistent workers; the calling thread is the first of them.")
      .def(nb::init<int, const std::vector<int>&, const std::vector<int>&>(), "num_threads"_a, "cpus"_a = std::vector<int>(),
           "groups"_a = std::vector<int>())
      .def_prop_ro("num_threads", &ThreadPool::num_threads)
      .def_prop_ro("num_groups", &ThreadPool::num_groups)
      .def_prop_ro("moe_s", [](const ThreadPool& pool) { return static_cast<double>(pool.moe_ns) * 1e-9; },
                   "Seconds the operation moe has taken.")
      .def_prop_ro("moe_experts", [](const ThreadPool& pool) { return pool.moe_experts.load(); },
                   "Experts whose weights it has read, each once a call.")
      .def("split", [](const ThreadPool& pool, int64_t num_units) {
        const UnitRanges ranges = pool.split(num_units);
        return std::vector<int64_t>(ranges.ends, ranges.ends + ranges.count);
      }, "num_units"_a, "Where the units end that each group of workers does of an operation on copies.");
  bind_numa(m);
  bind_matrix(m);
  bind_ops(m);
  bind_handoff(m);
}
