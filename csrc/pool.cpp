#include "pool.hpp"

#include <sched.h>
#include <unistd.h>

#include <map>
#include <stdexcept>
#include <string>
#include <system_error>

namespace mar {

namespace {

// A few microseconds of looking, since the next barrier is that near; then give the core away, for there may be more
// threads than cores.
constexpr int kSpins = 2000;
// How long a worker looks for the next call before it sleeps: about the time between two tokens of a stream.
constexpr int kIdleSpins = 50000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Pool::Pool(int threads) : size_(threads) {
  if (threads < 1 || threads > 256)
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; use 1 to 256.");
  start();
}

void Pool::start() {
  owner_ = getpid();
  try {
    for (int thread = 1; thread < size_; ++thread) workers_.emplace_back([this, thread] { worker(thread); });
  } catch (const std::system_error& error) {
    const std::size_t started = workers_.size() + 1;
    stop();
    throw std::invalid_argument("threads is " + std::to_string(size_) + ", but no more than " + std::to_string(started) +
                                " could be started (" + error.code().message() + "); use fewer.");
  }
}

void Pool::forget() {
  // Kept for ever, because these threads can be neither joined nor, unjoined, destroyed.
  new std::vector<std::thread>(std::move(workers_));
  workers_.clear();
  call_.store(0);
  arrived_.store(0);
  phase_.store(0);
  stop_.store(false);
}

std::shared_ptr<Pool> Pool::shared(int threads) {
  static std::mutex lock;
  static std::map<int, std::weak_ptr<Pool>> pools;
  const std::lock_guard<std::mutex> guard(lock);
  auto pool = pools[threads].lock();
  if (!pool) {
    pool = std::make_shared<Pool>(threads);
    pools[threads] = pool;
  }
  return pool;
}

Pool::~Pool() { owner_ == getpid() ? stop() : forget(); }

void Pool::stop() {
  stop_.store(true, std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  for (auto& thread : workers_) thread.join();
  workers_.clear();
}

void Pool::run(const std::function<void(int)>& body) {
  const std::lock_guard<std::mutex> lock(turn_);
  if (size_ == 1) return body(0);
  if (owner_ != getpid()) {
    forget();
    start();
  }
  body_ = &body;
  running_.store(size_ - 1, std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  body(0);
  for (int spin = 0; running_.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins)
      relax();
    else
      sched_yield();
  }
}

void Pool::barrier() {
  if (size_ == 1) return;
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    if (spin < kSpins)
      relax();
    else
      sched_yield();
  }
}

void Pool::worker(int thread) {
  std::uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; call_.load(std::memory_order_acquire) == seen && spin < kIdleSpins; ++spin) relax();
    while (call_.load(std::memory_order_acquire) == seen) call_.wait(seen, std::memory_order_acquire);
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    (*body_)(thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace mar
