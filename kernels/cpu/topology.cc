#include "topology.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>

namespace hybrid {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The hardware threads of the core a CPU belongs to, as the kernel spells the list.
std::string siblings_of(const std::string& root, int cpu) {
  const std::string folder = root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
  for (const char* name : {"core_cpus_list", "thread_siblings_list"}) {
    const std::string line = first_line(folder + name);
    if (!line.empty()) return line;
  }
  return std::to_string(cpu);
}

int number(const std::string& text) {
  int value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || rest != end || value < 0) throw std::invalid_argument("not a list of numbers: '" + text + "'");
  return value;
}

// Ids of the folders /sys/devices/system/node/node*, ascending.
std::vector<int> node_ids(const std::string& root) {
  std::vector<int> ids;
  DIR* folder = opendir((root + "/sys/devices/system/node").c_str());
  if (folder == nullptr) return ids;
  while (const dirent* entry = readdir(folder)) {
    const std::string name = entry->d_name;
    const bool numbered = name.size() > 4 && std::all_of(name.begin() + 4, name.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (name.rfind("node", 0) == 0 && numbered) ids.push_back(number(name.substr(4)));
  }
  closedir(folder);
  std::sort(ids.begin(), ids.end());
  return ids;
}

// Adds the figures of a node's meminfo, whose lines read "Node 0 MemFree:  123 kB".
void read_memory(const std::string& root, Node& node) {
  std::ifstream file(root + "/sys/devices/system/node/node" + std::to_string(node.id) + "/meminfo");
  std::string line;
  int64_t droppable = 0;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word, id, key;
    int64_t kib = 0;
    if (!(words >> word >> id >> key >> kib)) continue;
    if (key == "MemTotal:") node.total_bytes = kib * 1024;
    if (key == "MemFree:") node.free_bytes = kib * 1024;
    if (key == "Inactive(file):") droppable = kib * 1024;
  }
  node.available_bytes = node.free_bytes + droppable;
}

// Nodes whose memory the process may use; empty where the system does not say.
std::vector<int> allowed_nodes(const std::string& root) {
  std::ifstream file(root + "/proc/self/status");
  const std::string key = "Mems_allowed_list:";
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t start = line.find_first_not_of(" \t", key.size());
    return start == std::string::npos ? std::vector<int>() : parse_list(line.substr(start));
  }
  return {};
}

}  // namespace

std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream parts(text);
  std::string part;
  while (std::getline(parts, part, ',')) {
    const size_t dash = part.find('-');
    const int first = number(part.substr(0, dash)), last = dash == std::string::npos ? first : number(part.substr(dash + 1));
    if (last < first || last > 1 << 20) throw std::invalid_argument("not a list of numbers: '" + text + "'");
    for (int i = first; i <= last; ++i) numbers.push_back(i);
  }
  return numbers;
}

std::vector<int> allowed_cpus() {
  // Machines with more CPUs than cpu_set_t holds want a larger mask.
  for (int most = CPU_SETSIZE; most <= 1 << 16; most *= 4) {
    cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(most));
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(most));
    CPU_ZERO_S(bytes, mask);
    // The main thread's mask: the calling thread may be pinned.
    const bool known = sched_getaffinity(getpid(), bytes, mask) == 0;
    std::vector<int> cpus;
    for (int i = 0; known && i < most; ++i)
      if (CPU_ISSET_S(static_cast<size_t>(i), bytes, mask)) cpus.push_back(i);
    CPU_FREE(mask);
    if (known) return cpus;
  }
  throw std::runtime_error("the system does not tell which CPUs this process may run on (sched_getaffinity)");
}

std::vector<int> physical_cores(const std::string& root, const std::vector<int>& cpus) {
  std::set<std::string> seen;
  std::vector<int> cores;
  for (const int cpu : cpus)
    if (seen.insert(siblings_of(root, cpu)).second) cores.push_back(cpu);
  return cores;
}

std::vector<int> physical_cores() { return physical_cores("", allowed_cpus()); }

std::vector<Node> numa_nodes(const std::string& root, const std::vector<int>& cpus) {
  const std::vector<int> memory_nodes = allowed_nodes(root);
  std::vector<Node> nodes;
  for (const int id : node_ids(root)) {
    Node node;
    node.id = id;
    const std::string folder = root + "/sys/devices/system/node/node" + std::to_string(id);
    const std::vector<int> of_node = parse_list(first_line(folder + "/cpulist"));
    for (const int cpu : cpus)
      if (contains(of_node, cpu)) node.cpus.push_back(cpu);
    node.cores = physical_cores(root, node.cpus);
    node.memory_allowed = memory_nodes.empty() || contains(memory_nodes, id);
    read_memory(root, node);
    nodes.push_back(std::move(node));
  }
  if (nodes.empty()) {
    Node all;
    all.cpus = cpus;
    all.cores = physical_cores(root, cpus);
    nodes.push_back(std::move(all));
  }
  return nodes;
}

bool contains(const std::vector<int>& cpus, int cpu) { return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end(); }

bool pin_thread(pthread_t thread, const std::vector<int>& cpus) {
  if (cpus.empty()) return false;
  const size_t most = static_cast<size_t>(*std::max_element(cpus.begin(), cpus.end())) + 1;
  cpu_set_t* mask = CPU_ALLOC(most);
  const size_t bytes = CPU_ALLOC_SIZE(most);
  CPU_ZERO_S(bytes, mask);
  for (const int cpu : cpus) CPU_SET_S(static_cast<size_t>(cpu), bytes, mask);
  const bool done = pthread_setaffinity_np(thread, bytes, mask) == 0;
  CPU_FREE(mask);
  return done;
}

}  // namespace hybrid
