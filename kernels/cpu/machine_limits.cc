// What a machine can do at most: read RAM, the roof of decoding, and multiply int8, that of prompts. The best of several
// read loops counts, each by its median pass: what is left in a shared cache makes some passes too fast.
#include "machine_limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "ops.h"

namespace hybrid {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;

// Anonymous memory on huge pages where the system has them.
class Region {
 public:
  explicit Region(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, bytes, MADV_HUGEPAGE);
  }
  ~Region() { munmap(data_, bytes_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  float* data() const { return static_cast<float*>(data_); }

 private:
  void* data_;
  int64_t bytes_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool, int64_t bytes, double seconds, int num_threads) {
  if (bytes < kPiece || !(seconds > 0) || num_threads < 0 || num_threads > pool.num_threads()) {
    throw std::invalid_argument("measure_read_bandwidth: wants at least " + std::to_string(kPiece) +
                                " bytes, a positive time and 0 to " + std::to_string(pool.num_threads()) +
                                " threads; found " + std::to_string(bytes) + " bytes, " + std::to_string(seconds) +
                                " s and " + std::to_string(num_threads) + " threads");
  }
  const OpsTable& ops = ops_table(current_isa());
  const int64_t pieces = bytes / kPiece, used = pieces * kPiece;
  const Region region(used);
  // Untouched pages would all be the one zero page.
  pool.parallel_for(pieces, [&](int64_t piece, int) {
    std::fill_n(region.data() + piece * (kPiece / 4), kPiece / 4, 1.0f + static_cast<float>(piece));
  });
  // Fewer threads than the pool has: as many units as threads wanted.
  const int64_t units = num_threads == 0 ? pieces : std::min<int64_t>(num_threads, pieces);
  std::atomic<float> sink{0.0f};
  double best = 0;
  for (int loop = 0; loop < kNumReadLoops; ++loop) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<double> passes;
    do {
      const auto start = std::chrono::steady_clock::now();
      pool.parallel_for(units, [&](int64_t unit, int) {
        const int64_t first = pieces * unit / units, end = pieces * (unit + 1) / units;
        for (int64_t piece = first; piece < end; ++piece) {
          sink.store(ops.read(region.data() + piece * (kPiece / 4), kPiece / 4, loop), std::memory_order_relaxed);
        }
      });
      passes.push_back(seconds_since(start));
    } while (seconds_since(begin) < seconds / kNumReadLoops);
    std::nth_element(passes.begin(), passes.begin() + static_cast<std::ptrdiff_t>(passes.size() / 2), passes.end());
    best = std::max(best, static_cast<double>(used) / passes[passes.size() / 2]);
  }
  return best;
}

double measure_int8_rate(ThreadPool& pool, double seconds) {
  if (!(seconds > 0)) throw std::invalid_argument("measure_int8_rate: wants a positive time, found " + std::to_string(seconds));
  const IsaKernels& kernels = kernels_of(current_isa());
  constexpr int64_t kRounds = 20000;
  const int threads = pool.num_threads();
  std::atomic<int32_t> sink{0};
  std::vector<double> passes;
  const auto begin = std::chrono::steady_clock::now();
  do {
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(threads, [&](int64_t, int) { sink.store(kernels.multiply_bytes(kRounds), std::memory_order_relaxed); });
    passes.push_back(seconds_since(start));
  } while (seconds_since(begin) < seconds);
  std::nth_element(passes.begin(), passes.begin() + static_cast<std::ptrdiff_t>(passes.size() / 2), passes.end());
  return static_cast<double>(2 * kernels.macs_per_round * kRounds * threads) / passes[passes.size() / 2];
}

}  // namespace hybrid
