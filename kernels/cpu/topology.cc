#include "topology.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>

namespace hybrid {
namespace {

// The hardware threads of the core a CPU belongs to, as the kernel spells the list.
std::string siblings_of(int cpu) {
  const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
  for (const char* name : {"core_cpus_list", "thread_siblings_list"}) {
    std::ifstream file(folder + name);
    std::string line;
    if (std::getline(file, line) && !line.empty()) return line;
  }
  return std::to_string(cpu);
}

}  // namespace

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

std::vector<int> physical_cores() {
  std::set<std::string> seen;
  std::vector<int> cores;
  for (const int cpu : allowed_cpus())
    if (seen.insert(siblings_of(cpu)).second) cores.push_back(cpu);
  return cores;
}

bool contains(const std::vector<int>& cpus, int cpu) { return std::find(cpus.begin(), cpus.end(), cpu) != cpus.end(); }

bool pin_thread(pthread_t thread, int cpu) {
  cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(cpu) + 1);
  const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(cpu) + 1);
  CPU_ZERO_S(bytes, mask);
  CPU_SET_S(static_cast<size_t>(cpu), bytes, mask);
  const bool done = pthread_setaffinity_np(thread, bytes, mask) == 0;
  CPU_FREE(mask);
  return done;
}

}  // namespace hybrid
