#include "numa.h"

#include <errno.h>
#include <linux/mempolicy.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <sstream>
#include <utility>

namespace hybrid {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
#ifndef MADV_POPULATE_WRITE
constexpr int MADV_POPULATE_READ = 22;
constexpr int MADV_POPULATE_WRITE = 23;
#endif

std::string reason(const char* call, int error) {
  std::string text = std::string(call) + ": " + strerror(error);
  if (error == EPERM || error == EACCES) {
    text += " (containers forbid it by default; Docker allows it with --cap-add SYS_NICE)";
  } else if (error == ENOSYS) {
    text += " (this kernel is built without NUMA)";
  }
  return text;
}

// Sets the policy of a mapping that holds no page yet; empty, or why it could not be done.
std::string set_policy(void* data, size_t bytes, Spread spread, const std::vector<int>& nodes) {
  const bool bound = std::none_of(nodes.begin(), nodes.end(), [](int node) { return node < 0; });
  if (spread == Spread::kFirstTouch || nodes.empty() || !bound) return "";
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  const size_t most = static_cast<size_t>(*std::max_element(nodes.begin(), nodes.end())) + 1;
  std::vector<unsigned long> mask(most / kBits + 1, 0);
  for (const int node : nodes) mask[static_cast<size_t>(node) / kBits] |= 1UL << (static_cast<size_t>(node) % kBits);
  // The kernel takes one bit less than it is told of.
  const int policy = spread == Spread::kBind ? MPOL_BIND : MPOL_INTERLEAVE;
  if (syscall(SYS_mbind, data, bytes, policy, mask.data(), mask.size() * kBits + 1, 0) == 0) return "";
  return reason("mbind", errno);
}

// False with `problem` set where the system does not answer.
bool ask_pages(uintptr_t start, int64_t num_pages, size_t page_bytes, PageCount& found) {
  constexpr int64_t kAtOnce = 1 << 14;
  std::vector<void*> addresses(static_cast<size_t>(std::min(kAtOnce, num_pages)));
  std::vector<int> status(addresses.size());
  for (int64_t first = 0; first < num_pages; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, num_pages - first);
    for (int64_t i = 0; i < count; ++i)
      addresses[static_cast<size_t>(i)] = reinterpret_cast<void*>(start + static_cast<size_t>(first + i) * page_bytes);
    if (syscall(SYS_move_pages, 0, count, addresses.data(), nullptr, status.data(), 0) != 0) {
      found.problem = reason("move_pages", errno);
      return false;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int node = status[static_cast<size_t>(i)];
      if (node >= 0) ++found.pages[node];
      if (node < 0) ++found.absent;
    }
  }
  return true;
}

}  // namespace

NodeMemory::NodeMemory(size_t bytes, Spread spread, const std::vector<int>& nodes) {
  bytes_ = bytes < kHugePage ? bytes : (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // Not reserved: strict overcommit would count a model twice while it is read. Budgets are the planner's business.
  void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(data);
  // Advice only: without huge pages the kernels are slower, not wrong.
  if (bytes_ >= kHugePage) madvise(data, bytes_, MADV_HUGEPAGE);
  problem_ = set_policy(data, bytes_, spread, nodes);
}

NodeMemory NodeMemory::borrow(uint8_t* data, size_t bytes) {
  NodeMemory memory;
  memory.data_ = data;
  memory.bytes_ = bytes;
  memory.borrowed_ = true;
  return memory;
}

int64_t NodeMemory::huge_page_of(int64_t offset) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data_);
  return static_cast<int64_t>((start + static_cast<size_t>(offset)) / kHugePage - start / kHugePage);
}

void NodeMemory::touch(int64_t huge_page) const {
  const uintptr_t start = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t page = (start / kHugePage + static_cast<size_t>(huge_page)) * kHugePage;
  const uintptr_t first = std::max(page, start), end = std::min(page + kHugePage, start + bytes_);
  // Kernels before 5.14 do not know it: there pages come as they are written.
  if (!borrowed_ && first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_WRITE);
}

NodeMemory::~NodeMemory() {
  if (data_ != nullptr && !borrowed_) munmap(data_, bytes_);
}

NodeMemory::NodeMemory(NodeMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), borrowed_(other.borrowed_), problem_(std::move(other.problem_)) {}

NodeMemory& NodeMemory::operator=(NodeMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(borrowed_, other.borrowed_);
  std::swap(problem_, other.problem_);
  return *this;
}

bool parse_numa_maps(const std::string& text, uintptr_t start, std::map<int, int64_t>& pages) {
  std::istringstream lines(text);
  std::string line, found;
  while (std::getline(lines, line)) {  // ascending addresses
    std::istringstream words(line);
    uintptr_t address = 0;
    if (!(words >> std::hex >> address) || address > start) break;
    found = line;
  }
  std::istringstream words(found);
  std::string word;
  while (words >> word) {
    const size_t equals = word.find('=');
    if (word[0] != 'N' || equals == std::string::npos) continue;
    pages[std::stoi(word.substr(1, equals - 1))] += std::stoll(word.substr(equals + 1));
  }
  return !pages.empty();
}

int read_mapped(const void* start, size_t bytes) {
  const uintptr_t page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / page_bytes * page_bytes;
  const size_t length = reinterpret_cast<uintptr_t>(start) + bytes - first;
  return madvise(reinterpret_cast<void*>(first), length, MADV_POPULATE_READ) == 0 ? 0 : errno;
}

PageCount count_pages(const void* start, size_t bytes) {
  const size_t page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(start) / page_bytes * page_bytes;
  const uintptr_t end = reinterpret_cast<uintptr_t>(start) + bytes;
  PageCount found;
  if (bytes == 0) {
    found.method = "move_pages";
    return found;
  }
  if (ask_pages(first, static_cast<int64_t>((end - first + page_bytes - 1) / page_bytes), page_bytes, found)) {
    found.method = "move_pages";
    return found;
  }
  found.pages.clear();
  found.absent = 0;
  std::ifstream file("/proc/self/numa_maps");
  std::stringstream text;
  text << file.rdbuf();
  // Mappings of one policy that touch are one line: it tells of this range only where it tells of one node.
  if (file && parse_numa_maps(text.str(), first, found.pages) && found.pages.size() == 1) {
    found.pages.begin()->second = static_cast<int64_t>((end - first + page_bytes - 1) / page_bytes);
    found.method = "numa_maps";
  } else {
    found.pages.clear();
    found.problem += "; /proc/self/numa_maps does not tell either";
  }
  return found;
}

}  // namespace hybrid
