// Python entry points of topology and of pages' whereabouts.
#include "bindings_numa.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bindings_address.h"
#include "numa.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace hybrid {
namespace {

nb::list bind_nodes(const std::string& root, const std::optional<std::vector<int>>& cpus) {
  nb::list nodes;
  for (const Node& node : numa_nodes(root, cpus ? *cpus : allowed_cpus())) {
    nb::dict entry;
    entry["node"] = node.id;
    entry["cpus"] = node.cpus;
    entry["cores"] = node.cores;
    entry["memory_allowed"] = node.memory_allowed;
    entry["total_bytes"] = node.total_bytes;
    entry["free_bytes"] = node.free_bytes;
    entry["available_bytes"] = node.available_bytes;
    nodes.append(entry);
  }
  return nodes;
}

nb::dict bind_count(Address start, int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument("count_pages: `bytes` must not be negative");
  const void* data = pointer<const void>(start, "count_pages", "start");
  PageCount count;
  {
    nb::gil_scoped_release unlocked;
    count = count_pages(data, static_cast<size_t>(bytes));
  }
  nb::dict found;
  found["pages"] = count.pages;
  found["absent"] = count.absent;
  found["method"] = count.method;
  found["problem"] = count.problem;
  return found;
}

int bind_read_mapped(Address start, int64_t bytes) {
  if (bytes < 0) throw std::invalid_argument("read_mapped: `bytes` must not be negative");
  const void* data = pointer<const void>(start, "read_mapped", "start");
  nb::gil_scoped_release unlocked;
  return read_mapped(data, static_cast<size_t>(bytes));
}

char g_bus_message[512];

void report_bus_error(int) {
  // What a handler may do: no allocation, no locks.
  const ssize_t written = write(STDERR_FILENO, g_bus_message, strlen(g_bus_message));
  (void)written;
  _exit(1);
}

void end_on_bus_error(const std::string& message) {
  const size_t length = std::min(message.size(), sizeof g_bus_message - 2);
  memcpy(g_bus_message, message.data(), length);
  memcpy(g_bus_message + length, "\n", 2);
  struct sigaction action = {};
  action.sa_handler = report_bus_error;
  sigaction(SIGBUS, &action, nullptr);
}

nb::dict bind_maps(const std::string& text, Address start) {
  std::map<int, int64_t> pages;
  parse_numa_maps(text, start, pages);
  nb::dict found;
  for (const auto& [node, count] : pages) found[nb::int_(node)] = count;
  return found;
}

}  // namespace

void bind_numa(nb::module_& m) {
  m.def("numa_nodes", &bind_nodes, "root"_a = "", "cpus"_a = nb::none(),
        "NUMA nodes as the system below `root` shows them, with those of `cpus` (default: all this process may run on).");
  m.def("count_pages", &bind_count, "start"_a, "bytes"_a,
        "Pages of a range of memory by node, asked of move_pages or else numa_maps; `method` is empty if neither answers.");
  m.def("read_mapped", &bind_read_mapped, "start"_a, "bytes"_a,
        "Reads the pages of a mapped file and enters them in the page table; 0, or the error number of why it cannot.");
  m.def("end_on_bus_error", &end_on_bus_error, "message"_a,
        "For programs: where a mapped file was cut short or its disk failed (SIGBUS), write a line to stderr and exit with 1.");
  m.def("parse_numa_maps", &bind_maps, "text"_a, "start"_a, "For tests: node -> pages of the mapping an address is in.");
}

}  // namespace hybrid
