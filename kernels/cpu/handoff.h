// MoE layers handed from a device's stream to the CPU pool and back, by callbacks that hold no Python.
//
// A job is one layer over fixed addresses, added once and run many times. What lies where:
//
//   num_tokens    int32                     in    tokens of this run, 0 .. max_tokens
//   x             bf16 [max_tokens][hidden]  in
//   topk_ids      int32 [max_tokens][k]      in    -1: not on the CPU
//   topk_weights  f32 [max_tokens][k]        in
//   out           f32 [max_tokens][hidden]   out   of the first num_tokens tokens
//
// Ordering. The stream copies the inputs to host memory and then calls submit(job), which queues the job and
// returns at once. One service thread takes jobs first in, first out, and is the pool's first worker while it runs
// one. wait(job) returns when `out` is written or the job has failed; what the service thread wrote happens before
// that. Until wait returns the job's memory is not touched, and the job is not submitted again. Every submit has
// one wait.
//
// Failing. Neither call throws: the driver calls them. The first failure is kept for check(), with its layer, and
// ends the handoff: later jobs fail at once, with NaN in `out`. After a job that outran the time limit, whose
// memory is still the service thread's, no wait takes longer.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "matrix.h"
#include "thread_pool.h"

namespace hybrid {

class Handoff {
 public:
  struct Buffers {
    const int32_t* num_tokens;
    const uint16_t* x;
    const int32_t* topk_ids;
    const float* topk_weights;
    float* out;
    int64_t max_tokens, k;
  };
  class Job;

  // The service thread is bound to `cpu` (-1: left to the system). wait() gives a job up after `limit_s` seconds.
  // Throws std::invalid_argument for a CPU this process may not use or a limit that is not above 0, and
  // std::runtime_error where the system refuses to bind.
  Handoff(ThreadPool& pool, int cpu, double limit_s);
  ~Handoff();  // ends when the job at hand does; nobody may be waiting
  Handoff(const Handoff&) = delete;
  Handoff& operator=(const Handoff&) = delete;

  // A job for `layer`; pool, weights and buffers outlive this object. Not while jobs run. Throws
  // std::invalid_argument where weights and buffers do not fit each other.
  Job* add(int32_t layer, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
           const Buffers& buffers);

  static void submit(void* job) noexcept;
  static void wait(void* job) noexcept;

  // Throws std::runtime_error if a job has failed.
  void check() const;
  // Seconds the service thread has spent in jobs, and how many it has done.
  double busy_s() const { return static_cast<double>(busy_ns_.load(std::memory_order_relaxed)) * 1e-9; }
  int64_t num_done() const { return num_done_.load(std::memory_order_relaxed); }

  // A job that was done, for traces: its layer and when, in nanoseconds of the system's monotonic clock.
  struct Done {
    int32_t layer;
    int64_t begin_ns, end_ns;
  };
  // Whether jobs are noted from now on; those noted since the last call, the first 16384 of them.
  void record(bool on);
  std::vector<Done> take_recorded();

 private:
  void end_service();
  void serve();
  Job* next_job();
  void run(Job& job) noexcept;
  void compute(Job& job);
  void fail(const Job& job, const char* problem) noexcept;
  void note(const Job& job, const std::string& problem);  // with lock_ held

  ThreadPool& pool_;
  const double limit_s_;
  std::vector<std::unique_ptr<Job>> jobs_;
  std::vector<float> x_;  // of the job at hand, as floats

  mutable std::mutex lock_;  // of the queue, the states of jobs and the failure
  std::condition_variable queued_, finished_;
  std::vector<Job*> queue_;  // a ring with a place for each job
  size_t first_ = 0, count_ = 0;
  bool stop_ = false, stuck_ = false;
  std::string failure_;
  bool recording_ = false;
  std::vector<Done> recorded_;

  std::atomic<int64_t> pending_{0};  // jobs in the queue, for those who spin
  std::atomic<int64_t> busy_ns_{0}, num_done_{0};
  std::thread service_;
};

}  // namespace hybrid
