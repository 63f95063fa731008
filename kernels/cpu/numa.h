// Memory on chosen NUMA nodes, by raw system calls, and where its pages really are.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace hybrid {

// How the pages of a mapping are spread. Whatever the policy, a page is placed when it is first written.
enum class Spread {
  kFirstTouch,  // on the node of the thread that writes it
  kBind,        // on the one node given
  kInterleave,  // over the nodes given, in turn
};

// An anonymous mapping, zero, in transparent huge pages where the system gives them.
class NodeMemory {
 public:
  NodeMemory() = default;
  // Throws std::bad_alloc. A policy that the system refuses (a container without the permission) leaves the pages
  // to be placed by first touch; `problem` says why. Without nodes (or with node -1) every spread is kFirstTouch.
  NodeMemory(size_t bytes, Spread spread, const std::vector<int>& nodes);
  // Memory of somebody else, who keeps it: a mapped file.
  static NodeMemory borrow(uint8_t* data, size_t bytes);
  ~NodeMemory();
  NodeMemory(NodeMemory&& other) noexcept;
  NodeMemory& operator=(NodeMemory&& other) noexcept;
  NodeMemory(const NodeMemory&) = delete;
  NodeMemory& operator=(const NodeMemory&) = delete;

  // Has the system give the pages of a huge page's range, numbered from the mapping's start, to the calling thread.
  // Several threads that write to one huge page first would each clear it.
  void touch(int64_t huge_page) const;
  // The number of the huge page that a byte is in.
  int64_t huge_page_of(int64_t offset) const;

  uint8_t* data() const { return data_; }
  size_t mapped_bytes() const { return bytes_; }
  const std::string& problem() const { return problem_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool borrowed_ = false;
  std::string problem_;
};

// Pages of a range by the node they are on; `absent` were never written. `method` is "move_pages" or "numa_maps"
// (which tells of a mapping as a whole, and serves where all of it is on one node); "" where neither is to be had,
// and `problem` says why.
struct PageCount {
  std::map<int, int64_t> pages;
  int64_t absent = 0;
  std::string method, problem;
};
PageCount count_pages(const void* start, size_t bytes);

// Reads pages of a mapped file into memory, whole pages from the one `start` is in. 0, or the error number:
// EINVAL on kernels before 5.14, EFAULT where the file ends before or its disk fails.
int read_mapped(const void* start, size_t bytes);

// The fields N<node>=<pages> of the line of numa_maps for the mapping that an address is in; false if it has none.
bool parse_numa_maps(const std::string& text, uintptr_t start, std::map<int, int64_t>& pages);

}  // namespace hybrid
