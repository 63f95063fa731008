// CPUs and memory nodes of this machine as the operating system shows them to this process.
//
// What is read from /sys and /proc is read below a root, so that tests can show other machines.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <string>
#include <vector>

namespace hybrid {

// A NUMA node. Ids need not follow one another, and a node may have memory and no CPUs, or CPUs and no memory.
struct Node {
  int id = 0;
  std::vector<int> cpus;        // that this process may run on, ascending
  std::vector<int> cores;       // one of `cpus` for each physical core, ascending
  bool memory_allowed = true;   // by the control group's cpuset
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;       // not used for anything
  int64_t available_bytes = 0;  // free, or file cache that can be dropped
};

// CPUs this process may run on, ascending.
std::vector<int> allowed_cpus();

// One of `cpus` for each physical core, in their order.
std::vector<int> physical_cores(const std::string& root, const std::vector<int>& cpus);
std::vector<int> physical_cores();

// The nodes by ascending id, with those of `cpus` that are theirs. A system that shows no nodes has one, number 0,
// with all CPUs and no figures of memory.
std::vector<Node> numa_nodes(const std::string& root, const std::vector<int>& cpus);

// "0-3,8" as the kernel writes sets of numbers. Throws std::invalid_argument for anything else.
std::vector<int> parse_list(const std::string& text);

bool contains(const std::vector<int>& cpus, int cpu);

// Binds a thread to some CPUs; false if the system refuses.
bool pin_thread(pthread_t thread, const std::vector<int>& cpus);

}  // namespace hybrid
