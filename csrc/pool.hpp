// A pool of threads that meet at barriers: the engine's own, asleep between calls so that it does not fight torch's.
// Does: run one function on every thread, let the threads wait for each other. Does not: queue tasks.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace mar {

class Pool {
 public:
  explicit Pool(int threads);  // throws std::invalid_argument below 1, above 256, or where the system gives fewer
  // The process's pool of so many threads, as long as someone has it: more of them would only take cores from each other.
  static std::shared_ptr<Pool> shared(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return size_; }

  // Calls body(thread) on every thread, 0 being the caller's, and returns when all are done. Calls from several threads
  // take turns. body must not throw.
  void run(const std::function<void(int)>& body);

  // Inside `body`: returns once every thread has come here.
  void barrier();

 private:
  void worker(int thread);
  void start();
  void stop();
  void forget();  // of a forked process, which has the pool but none of its threads

  const int size_;
  int owner_ = 0;  // the process that the workers run in
  std::mutex turn_;
  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> call_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
  std::atomic<bool> stop_{false};
};

// The range [begin, end) of `count` items that falls to one of `parts`.
struct Range {
  std::int64_t begin, end;
};
inline Range share(std::int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

}  // namespace mar
