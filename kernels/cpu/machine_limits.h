// Measured limits of this machine.
#pragma once
#include <cstdint>

#include "thread_pool.h"

namespace hybrid {

// Bytes a second read from RAM by `num_threads` of the pool's threads (0: all), the best of several
// read loops, each run for a share of `seconds` over `bytes` of memory.
double measure_read_bandwidth(ThreadPool& pool, int64_t bytes, double seconds, int num_threads);

// Operations a second (a product and a sum are two) of int8 products alone, by all threads with the current ISA:
// the median of passes over `seconds`.
double measure_int8_rate(ThreadPool& pool, double seconds);

}  // namespace hybrid
