// From which share of codes that are not zero it pays to read a linear whole: measured, for it hangs on the machine, and on
// how long a row is, so on the kind of linear.
// Does: time both ways of reading a model's own int4 linears. Does not: change any result, as both ways give the same.
#include "crossover.hpp"

#include <algorithm>
#include <array>
#include <chrono>

namespace mar {

namespace {

constexpr int kRounds = 5;
constexpr std::size_t kMostBytes = 256 << 20;  // of weights that are read: more than shared caches hold
// Of codes that are not zero. Time is no straight line over them: where memory is slow, half of the rows in pieces can cost
// as much as all of them in order.
constexpr std::array kShares = {0.125, 0.25, 0.375, 0.5, 0.75, 1.0};

struct Work {
  Timed timed;
  std::array<std::vector<std::int8_t>, kShares.size()> codes;
};

// Of one round: times[s] at kShares[s], the last one's beside the time of reading all whole.
double crossing(const std::array<double, kShares.size()>& times, double whole) {
  double before = 0, time_before = 0;
  for (std::size_t at = 0; at < kShares.size(); ++at) {
    if (times[at] > whole)
      return before + (kShares[at] - before) * std::max(0.0, whole - time_before) / (times[at] - time_before);
    before = kShares[at];
    time_before = times[at];
  }
  return 1.0;
}

}  // namespace

void set_crossovers(const Kernels& kernels, Pool& pool, const std::vector<Timed>& linears) {
  std::vector<Work> works;
  std::size_t bytes = 0;
  int inputs = 0, outputs = 0, kinds = 0;
  std::uint32_t random = 1;
  for (const Timed& timed : linears) {
    const Linear& linear = *timed.linear;
    if (!linear.stream.weights || bytes > kMostBytes) continue;
    bytes += linear.weight_bytes();
    inputs = std::max(inputs, linear.inputs);
    outputs = std::max(outputs, linear.outputs());
    kinds = std::max(kinds, timed.kind + 1);
    Work work{timed, {}};
    for (std::size_t at = 0; at < kShares.size(); ++at)
      for (int i = 0; i < linear.inputs; ++i) {
        random = random * 1664525u + 1013904223u;
        work.codes[at].push_back(static_cast<std::int8_t>(random < kShares[at] * 4294967296.0));
      }
    works.push_back(std::move(work));
  }
  if (works.empty()) return;
  std::vector<Listing> listings(pool.size());
  std::vector<std::vector<float>> outs(pool.size(), std::vector<float>(outputs));
  for (auto& listing : listings) listing.reserve(inputs, outputs);
  // Seconds of each kind in one pass through all, as the first thread sees them: by kind alone, small ones would be timed in
  // the cache.
  auto pass = [&](std::size_t at, bool all) {
    std::vector<double> seconds(kinds);
    pool.run([&](int thread) {
      Listing& listing = listings[thread];
      for (const Work& work : works) {
        const Linear& linear = *work.timed.linear;
        const std::int8_t* codes = work.codes[at].data();
        const bool by_rows = work.timed.by_rows;
        const auto started = std::chrono::steady_clock::now();
        Range rows{0, linear.inputs}, slices{0, linear.slices};
        if (by_rows) {
          rows = share((linear.inputs + kSlice - 1) / kSlice, thread, pool.size());
          rows = {rows.begin * kSlice, std::min<decltype(rows.end)>(rows.end * kSlice, linear.inputs)};
        } else {
          slices = share_slices(linear, thread, pool.size());
        }
        const int begin = static_cast<int>(rows.begin), end = static_cast<int>(rows.end);
        listing.list_codes(kernels, linear, codes, begin, end, all ? end - begin : 0, all);
        listing.multiply(kernels, linear, static_cast<int>(slices.begin), static_cast<int>(slices.end), outs[thread].data(),
                         false);
        if (thread == 0)
          seconds[work.timed.kind] += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
      }
    });
    return seconds;
  };
  // A round's times are of the same moment, as memory is shared with others' work; the middle round is taken.
  std::vector<std::array<double, kRounds>> found(kinds);
  for (int round = 0; round < kRounds; ++round) {
    const auto whole = pass(kShares.size() - 1, true);
    std::vector<std::array<double, kShares.size()>> times(kinds);
    for (std::size_t at = 0; at < kShares.size(); ++at) {
      const auto seconds = pass(at, false);
      for (int kind = 0; kind < kinds; ++kind) times[kind][at] = seconds[kind];
    }
    for (int kind = 0; kind < kinds; ++kind) found[kind][round] = crossing(times[kind], whole[kind]);
  }
  for (auto& rounds : found) std::nth_element(rounds.begin(), rounds.begin() + kRounds / 2, rounds.end());
  for (const Timed& timed : linears)
    if (timed.linear->stream.weights) timed.linear->whole_above = found[timed.kind][kRounds / 2];
}

}  // namespace mar
