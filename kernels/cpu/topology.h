// CPUs of this machine as the operating system shows them to this process.
#pragma once
#include <pthread.h>

#include <vector>

namespace hybrid {

// CPUs this process may run on, ascending.
std::vector<int> allowed_cpus();

// One allowed CPU for each physical core, ascending.
std::vector<int> physical_cores();

bool contains(const std::vector<int>& cpus, int cpu);

// Binds a thread to one CPU; false if the system refuses.
bool pin_thread(pthread_t thread, int cpu);

}  // namespace hybrid
