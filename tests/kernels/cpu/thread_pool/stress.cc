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

// Units of a range are done by its group alone, whether they are the caller's or not.
bool divided_job_is_whole(hybrid::ThreadPool& pool, long job) {
  hybrid::UnitRanges ranges;
  for (int g = 0; g <= pool.num_groups(); ++g) ranges.add((g + job) % 3);
  std::vector<int> done(static_cast<size_t>(ranges.total()), 0);
  std::vector<char> strange(done.size(), 0);
  pool.parallel_for_divided(ranges, [&](int64_t unit, int worker) {
    int64_t place;
    const int range = ranges.find(unit, place);
    ++done[static_cast<size_t>(unit)];
    strange[static_cast<size_t>(unit)] = range < pool.num_groups() && range != pool.group_of(worker);
  });
  for (size_t i = 0; i < done.size(); ++i) {
    if (done[i] != 1 || strange[i]) return false;
  }
  return true;
}

bool divided_failure_arrives(hybrid::ThreadPool& pool) {
  hybrid::UnitRanges ranges;
  for (int g = 0; g < pool.num_groups(); ++g) ranges.add(3);
  try {
    pool.parallel_for_divided(ranges, [&](int64_t unit, int) {
      if (unit == ranges.total() - 2) throw std::runtime_error("a unit of the last group");
    });
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
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
    std::vector<int> groups;
    for (int i = 0; i < threads; ++i) groups.push_back(pools % 2 == 0 ? 0 : i * 2 / threads);
    hybrid::ThreadPool pool(threads, {}, groups);
    for (long job = 0; job < pools % 4; ++job) {
      const bool whole = job_is_whole(pool) && divided_job_is_whole(pool, job);
      if (!whole || !failure_arrives(pool) || !divided_failure_arrives(pool)) {
        printf("pool %ld of %d threads: job %ld was not done once\n", pools, threads, job);
        return 1;
      }
    }
  }
  printf("%ld pools\n", pools);
}
