// From which share of codes that are not zero it pays to read a linear whole: measured, for it hangs on the machine.
// Does: time both ways of reading a model's own int4 linears. Does not: change any result, as both ways give the same.
#include "crossover.hpp"

#include <algorithm>
#include <array>
#include <chrono>

namespace mar {

namespace {

constexpr int kRounds = 7;
constexpr std::size_t kMostBytes = 256 << 20;  // of weights that are read: more than shared caches hold

struct Work {
  const Linear* linear;
  std::vector<std::int8_t> half, full;  // codes, half of them zero and none
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
    Work work{linear, {}, std::vector<std::int8_t>(linear->inputs, 1)};
    for (int i = 0; i < linear->inputs; ++i) {
      random = random * 1664525u + 1013904223u;
      work.half.push_back(static_cast<std::int8_t>(random >> 31));
    }
    works.push_back(std::move(work));
  }
  if (works.empty()) return 1.0;
  std::vector<Listing> listings(pool.size());
  std::vector<std::vector<float>> outs(pool.size(), std::vector<float>(outputs));
  for (auto& listing : listings) listing.reserve(inputs, outputs);
  auto seconds = [&](std::vector<std::int8_t> Work::*codes, bool all) {
    const auto started = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      Listing& listing = listings[thread];
      for (const Work& work : works) {
        const Linear& linear = *work.linear;
        listing.list_codes(kernels, linear, (work.*codes).data(), 0, linear.inputs, 0, all);
        const Range slices = share_slices(linear, thread, pool.size());
        listing.multiply(kernels, linear, static_cast<int>(slices.begin), static_cast<int>(slices.end), outs[thread].data(),
                         false);
      }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  };
  // A round's three times are of the same moment, as memory is shared with others' work; the middle round is taken.
  std::array<double, kRounds> found;
  for (double& share : found) {
    const double half = seconds(&Work::half, false), full = seconds(&Work::full, false), whole = seconds(&Work::full, true);
    share = full <= half ? 1.0 : std::clamp(0.5 + 0.5 * (whole - half) / (full - half), 0.0, 1.0);
  }
  std::nth_element(found.begin(), found.begin() + kRounds / 2, found.end());
  return found[kRounds / 2];
}

}  // namespace mar
