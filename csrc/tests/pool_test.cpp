// The thread pool and the choice of a variant.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "../pool.hpp"
#include "check.hpp"

namespace {

void shares_cover_everything_once() {
  for (int parts : {1, 2, 3, 7, 64})
    for (std::int64_t count : {0, 1, 5, 63, 64, 1000}) {
      std::int64_t at = 0;
      for (int part = 0; part < parts; ++part) {
        const mar::Range range = mar::share(count, part, parts);
        CHECK(range.begin == at && range.end >= range.begin && range.end - range.begin <= count / parts + 1);
        at = range.end;
      }
      CHECK(at == count);
    }
}

// Threads pass a number on at every barrier; one that ran ahead or stayed behind would read another.
void barriers_hold(int threads, int calls, int rounds) {
  mar::Pool pool(threads);
  std::vector<int> slots(threads, 0);
  std::atomic<int> wrong{0};
  for (int call = 0; call < calls; ++call)
    pool.run([&](int thread) {
      for (int round = 0; round < rounds; ++round) {
        const int before = slots[(thread + 1) % threads];
        pool.barrier();
        slots[thread] = before + 1;
        pool.barrier();
      }
    });
  for (int slot : slots) wrong += slot != calls * rounds;
  CHECK(wrong == 0);
}

void callers_take_turns() {
  mar::Pool pool(3);
  int counter = 0;  // not atomic: only one call runs at a time
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int call = 0; call < 50; ++call)
        pool.run([&](int thread) {
          if (thread == 0) ++counter;
          pool.barrier();
          if (thread == 2) ++counter;
        });
    });
  for (auto& caller : callers) caller.join();
  CHECK(counter == 4 * 50 * 2);
}

void sleepers_wake_up_and_end() {
  for (int time = 0; time < 20; ++time) mar::Pool unused(4);
  mar::Pool pool(2);
  std::atomic<int> ran{0};
  for (int call = 0; call < 3; ++call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    pool.run([&](int) { ++ran; });
  }
  CHECK(ran == 6);
}

void one_pool_for_a_number_of_threads() {
  const auto first = mar::Pool::shared(2), second = mar::Pool::shared(2), other = mar::Pool::shared(3);
  CHECK(first == second && first != other && other->size() == 3);
  CHECK_THROWS(mar::Pool::shared(0));
}

}  // namespace

void test_pool() {
  shares_cover_everything_once();
  for (int threads : {1, 2, 5, 16}) barriers_hold(threads, 20, 5);
  callers_take_turns();
  sleepers_wake_up_and_end();
  one_pool_for_a_number_of_threads();
  CHECK_THROWS(mar::Pool(0));
  CHECK_THROWS(mar::Pool(-1));
  CHECK_THROWS(mar::Pool(257));
}

void test_isa() {
  using mar::choose_variant;
  CHECK(choose_variant("", {}).name == "generic");
  CHECK(choose_variant("generic", {}).name == "generic");
  CHECK_THROWS(choose_variant("sse9", {}));
#if defined(__x86_64__)
  const std::vector<std::string> all = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"};
  CHECK(choose_variant("", all).name == "avx512");
  std::vector<std::string> tiles = all;
  tiles.insert(tiles.end(), {"amxtile", "amxint8"});
  CHECK(choose_variant("", tiles).name == "amx");
  CHECK(choose_variant("avx512", tiles).name == "avx512");
  tiles.pop_back();
  CHECK(choose_variant("", tiles).name == "avx512");
  CHECK_THROWS(choose_variant("amx", tiles));
  CHECK(choose_variant("avx2", all).name == "avx2");
  CHECK(choose_variant("", {"avx2", "fma"}).name == "avx2");
  CHECK(choose_variant("", {"avx2", "fma", "avxvnni"}).name == "avxvnni");
  CHECK(choose_variant("", {"avx2", "avxvnni"}).name == "generic");
  tiles.push_back("avxvnni");
  CHECK(choose_variant("", tiles).name == "avx512");
  CHECK(choose_variant("", {"avx2"}).name == "generic");
  // Whatever one of its features is missing, a variant is neither chosen nor forced.
  for (const auto& missing : all) {
    std::vector<std::string> rest;
    for (const auto& one : all)
      if (one != missing) rest.push_back(one);
    CHECK(choose_variant("", rest).name == (missing == "avx2" || missing == "fma" ? "generic" : "avx2"));
    std::string message;
    try {
      choose_variant("avx512", rest);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(message == "MAR_ISA is 'avx512', but this CPU lacks " + missing + "; unset it or force a lower one.");
  }
#endif
}
