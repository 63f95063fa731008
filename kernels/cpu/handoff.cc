#include "handoff.h"

#include <emmintrin.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <stdexcept>

#include "moe.h"
#include "ops.h"
#include "topology.h"

namespace hybrid {
namespace {

using Clock = std::chrono::steady_clock;

// Two layers of a step follow within a few of these; longer waits sleep, for whoever waits may sit on a
// core of the pool.
constexpr auto kSpin = std::chrono::microseconds(30);

constexpr size_t kMostRecorded = 1 << 14;

template <class Done>
void spin_until(Done done) {
  const auto deadline = Clock::now() + kSpin;
  while (!done() && Clock::now() < deadline) _mm_pause();
}

std::string number(int64_t n) { return std::to_string(n); }

int64_t nanoseconds(Clock::time_point when) { return std::chrono::nanoseconds(when.time_since_epoch()).count(); }

}  // namespace

class Handoff::Job {
 public:
  enum State : int { kIdle, kQueued, kFinished };

  Job(Handoff& owner_, int32_t layer_, const PackedMatrix& gate_, const PackedMatrix& up_, const PackedMatrix& down_,
      const Buffers& buffers_)
      : owner(owner_), layer(layer_), gate(gate_), up(up_), down(down_), buffers(buffers_) {}

  Handoff& owner;
  const int32_t layer;
  const PackedMatrix &gate, &up, &down;
  const Buffers buffers;
  std::atomic<int> state{kIdle};
};

Handoff::Handoff(ThreadPool& pool, int cpu, double limit_s) : pool_(pool), limit_s_(limit_s) {
  if (!(limit_s > 0)) throw std::invalid_argument("Handoff: limit_s must be above 0, found " + std::to_string(limit_s));
  if (cpu != -1 && !contains(allowed_cpus(), cpu)) {
    throw std::invalid_argument("Handoff: CPU " + number(cpu) + " is not one this process may run on (see sched_getaffinity)");
  }
  // Signals are the host program's business.
  sigset_t all, before;
  sigfillset(&all);
  // A fault is this thread's own, and is told of where it happens.
  for (const int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    service_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "hybrid-handoff");
      serve();
    });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (cpu != -1 && !pin_thread(service_.native_handle(), {cpu})) {
    end_service();
    throw std::runtime_error("Handoff: the system refuses to bind a thread to CPU " + number(cpu));
  }
}

Handoff::~Handoff() { end_service(); }

void Handoff::end_service() {
  {
    const std::lock_guard<std::mutex> hold(lock_);
    stop_ = true;
  }
  queued_.notify_one();
  service_.join();
}

Handoff::Job* Handoff::add(int32_t layer, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down,
                           const Buffers& buffers) {
  if (buffers.max_tokens < 1 || buffers.k < 1) {
    throw std::invalid_argument("Handoff: layer " + number(layer) + ": max_tokens and k must be at least 1, found " +
                                number(buffers.max_tokens) + " and " + number(buffers.k));
  }
  moe(pool_, gate, up, down, {.x = nullptr, .num_tokens = 0, .topk_ids = nullptr, .topk_weights = nullptr, .k = 1, .out = nullptr});
  const std::lock_guard<std::mutex> hold(lock_);
  jobs_.push_back(std::make_unique<Job>(*this, layer, gate, up, down, buffers));
  queue_.resize(jobs_.size());
  x_.resize(std::max(x_.size(), static_cast<size_t>(buffers.max_tokens * gate.cols() + 16)));
  return jobs_.back().get();
}

void Handoff::submit(void* address) noexcept {
  Job& job = *static_cast<Job*>(address);
  Handoff& self = job.owner;
  {
    const std::lock_guard<std::mutex> hold(self.lock_);
    if (job.state.load(std::memory_order_relaxed) != Job::kIdle) {
      return self.note(job, "submitted again before it was waited for");
    }
    job.state.store(Job::kQueued, std::memory_order_relaxed);
    self.queue_[(self.first_ + self.count_++) % self.queue_.size()] = &job;
    self.pending_.fetch_add(1, std::memory_order_release);
  }
  self.queued_.notify_one();
}

void Handoff::wait(void* address) noexcept {
  Job& job = *static_cast<Job*>(address);
  Handoff& self = job.owner;
  const auto finished = [&job] { return job.state.load(std::memory_order_acquire) == Job::kFinished; };
  spin_until(finished);
  std::unique_lock<std::mutex> hold(self.lock_);
  if (job.state.load(std::memory_order_relaxed) == Job::kIdle) {
    return self.note(job, "waited for, but not submitted");
  }
  self.finished_.wait_for(hold, std::chrono::duration<double>(self.limit_s_), [&] { return finished() || self.stuck_; });
  if (finished()) {
    job.state.store(Job::kIdle, std::memory_order_relaxed);
  } else {
    self.stuck_ = true;
    self.note(job, "the CPU has not finished it after " + std::to_string(self.limit_s_) + " s");
  }
}

void Handoff::check() const {
  const std::lock_guard<std::mutex> hold(lock_);
  if (!failure_.empty()) throw std::runtime_error("handing MoE layers to the CPU failed at " + failure_);
}

void Handoff::record(bool on) {
  const std::lock_guard<std::mutex> hold(lock_);
  recording_ = on;
  if (on) recorded_.reserve(kMostRecorded);
}

std::vector<Handoff::Done> Handoff::take_recorded() {
  const std::lock_guard<std::mutex> hold(lock_);
  std::vector<Done> found(recorded_);
  recorded_.clear();  // its memory stays: the service thread allocates none
  return found;
}

void Handoff::serve() {
  while (Job* job = next_job()) run(*job);
}

// Null: the end.
Handoff::Job* Handoff::next_job() {
  spin_until([this] { return pending_.load(std::memory_order_relaxed) != 0; });
  std::unique_lock<std::mutex> hold(lock_);
  queued_.wait(hold, [this] { return stop_ || count_ != 0; });
  if (stop_) return nullptr;
  Job* job = queue_[first_];
  first_ = (first_ + 1) % queue_.size();
  --count_;
  pending_.fetch_sub(1, std::memory_order_relaxed);
  return job;
}

void Handoff::run(Job& job) noexcept {
  const auto begin = Clock::now();
  try {
    check();
    compute(job);
  } catch (const std::exception& error) {
    fail(job, error.what());
  } catch (...) {
    fail(job, "an unknown exception");
  }
  const auto end = Clock::now();
  busy_ns_.fetch_add(std::chrono::nanoseconds(end - begin).count(), std::memory_order_relaxed);
  num_done_.fetch_add(1, std::memory_order_relaxed);
  {
    const std::lock_guard<std::mutex> hold(lock_);
    if (recording_ && recorded_.size() < kMostRecorded) recorded_.push_back({job.layer, nanoseconds(begin), nanoseconds(end)});
    job.state.store(Job::kFinished, std::memory_order_release);
  }
  finished_.notify_all();
}

void Handoff::compute(Job& job) {
  const Buffers& b = job.buffers;
  const int64_t num_tokens = *b.num_tokens, hidden = job.gate.cols();
  if (num_tokens < 0 || num_tokens > b.max_tokens) {
    throw std::invalid_argument("num_tokens must be in 0.." + number(b.max_tokens) + ", found " + number(num_tokens));
  }
  if (num_tokens == 0) return;
  const OpsTable& ops = ops_table(current_isa());
  for (int64_t t = 0; t < num_tokens; ++t) ops.decode(b.x + t * hidden, hidden, CacheFormat::kBF16, &x_[t * hidden]);
  moe(pool_, job.gate, job.up, job.down,
      {.x = x_.data(), .num_tokens = num_tokens, .topk_ids = b.topk_ids, .topk_weights = b.topk_weights, .k = b.k, .out = b.out});
}

void Handoff::fail(const Job& job, const char* problem) noexcept {
  const Buffers& b = job.buffers;
  std::fill_n(b.out, b.max_tokens * job.down.rows(), std::numeric_limits<float>::quiet_NaN());
  const std::lock_guard<std::mutex> hold(lock_);
  note(job, problem);
}

void Handoff::note(const Job& job, const std::string& problem) {
  if (failure_.empty()) failure_ = "layer " + number(job.layer) + ": " + problem;
}

}  // namespace hybrid
