// From which share of codes that are not zero it pays to read a linear whole: measured, for it hangs on the machine.
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
  const Linear* linear;
  std::array<std::vector<std::int8_t>, kShares.size()> codes;
};

}  // namespace

double crossover(const Kernels& kernels, Pool& pool, const std::vector<const Linear*>& linears) {
  std::vector<Work> works;
  std::size_t bytes = 0;
  int inputs = 0, outputs = 0;
  std::uint32_t random = 1;
  for (const Linear* linear : linears) {
    if (!linear->stream.weights || bytes > kMostBytes) continue;
    bytes += linear->weight_bytes();
    inputs = std::max(inputs, linear->inputs);
    outputs = std::max(outputs, linear->outputs());
    Work work{linear, {}};
    for (std::size_t at = 0; at < kShares.size(); ++at)
      for (int i = 0; i < linear->inputs; ++i) {
        random = random * 1664525u + 1013904223u;
        work.codes[at].push_back(static_cast<std::int8_t>(random < kShares[at] * 4294967296.0));
      }
    works.push_back(std::move(work));
  }
  if (works.empty()) return 1.0;
  std::vector<Listing> listings(pool.size());
  std::vector<std::vector<float>> outs(pool.size(), std::vector<float>(outputs));
  for (auto& listing : listings) listing.reserve(inputs, outputs);
  auto seconds = [&](std::size_t at, bool all) {
    const auto started = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      Listing& listing = listings[thread];
      for (const Work& work : works) {
        const Linear& linear = *work.linear;
        listing.list_codes(kernels, linear, work.codes[at].data(), 0, linear.inputs, 0, all);
        const Range slices = share_slices(linear, thread, pool.size());
        listing.multiply(kernels, linear, static_cast<int>(slices.begin), static_cast<int>(slices.end), outs[thread].data(),
                         false);
      }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  // A round's times are of the same moment, as memory is shared with others' work; the middle round is taken.
  std::array<double, kRounds> found;
  for (double& crossing : found) {
    const double whole = seconds(kShares.size() - 1, true);
    crossing = 1.0;
    double before = 0, time_before = 0;
    for (std::size_t at = 0; at < kShares.size(); ++at) {
      const double time = seconds(at, false);
      if (time > whole) {
        crossing = before + (kShares[at] - before) * std::max(0.0, whole - time_before) / (time - time_before);
        break;
      }
      before = kShares[at];
      time_before = time;
    }
  }
  std::nth_element(found.begin(), found.begin() + kRounds / 2, found.end());
  return found[kRounds / 2];
}

}  // namespace mar
