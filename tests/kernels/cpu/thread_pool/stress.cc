// Makes pools, runs 0 to 3 jobs in each and drops them, for some seconds. A job that is lost or done
// twice ends it with 1, a pool that stands still with SIGALRM.
//
//   stress THREADS SECONDS
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "thread_pool.h"

namespace {

constexpr int kUnits = 5;

// What the units write without atomics is the pool's to order: ThreadSanitizer watches it.
bool job_is_whole(hybrid::ThreadPool& pool) {
  std::vector<int> done(kUnits, 0);
  pool.parallel_for(kUnits, [&](int64_t unit, int) { ++done[static_cast<size_t>(unit)]; });
  for (const int times : done) {
    if (times != 1) return false;
  }
  return true;
}

bool failure_arrives(hybrid::ThreadPool& pool) {
  try {
    pool.parallel_for(kUnits, [](int64_t unit, int) {
      if (unit == 2) throw std::runtime_error("unit 2");
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = atoi(argv[1]), seconds = atoi(argv[2]);
  alarm(static_cast<unsigned>(seconds) + 30);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  long pools = 0;
  for (; std::chrono::steady_clock::now() < end; ++pools) {
    hybrid::ThreadPool pool(threads, {});
    for (long job = 0; job < pools % 4; ++job) {
      if (!job_is_whole(pool) || !failure_arrives(pool)) {
        printf("pool %ld of %d threads: job %ld was not done once\n", pools, threads, job);
        return 1;
      }
    }
  }
  printf("%ld pools\n", pools);
}
