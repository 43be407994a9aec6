// One head's attention over the last tokens and the first one, beside its scan. Compiled once per instruction set.
// Does: turn, remember, weigh and gate, a token at a time. Does not: compute angles (model.cpp, once a token).
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace mar::MAR_VARIANT {
namespace {

// y = v, channel i turned with channel i + n / 2 by the angle of cosine turn[i] and sine turn[i + n / 2].
inline void turned(const float* v, const float* turn, int n, float* y) {
  const int half = n / 2;
  for (int i = 0; i < half; ++i) {
    y[i] = v[i] * turn[i] - v[i + half] * turn[i + half];
    y[i + half] = v[i + half] * turn[i] + v[i] * turn[i + half];
  }
}

// Half of the sums of a's and b's lanes that are D apart: a's where a lane's number lacks D, b's where it has it.
template <int D>
inline F folded(F a, F b) {
  I straight, across;
  for (int l = 0; l < kLanes; ++l) {
    straight[l] = l & D ? kLanes + l : l;
    across[l] = l & D ? kLanes + (l ^ D) : l ^ D;
  }
  return __builtin_shuffle(a, b, straight) + __builtin_shuffle(a, b, across);
}

template <int D>
inline F folded_all(F* sums) {
  for (int k = 0; k < D; ++k) sums[k] = folded<D>(sums[k], sums[k + D]);
  if constexpr (D > 1)
    return folded_all<D / 2>(sums);
  else
    return sums[0];
}

// scores = query (n) times each of kLanes keys (n each).
inline F products(const float* query, int n, const float* keys) {
  F sums[kLanes];
  for (auto& one : sums) {
    one = load<F>(keys) * load<F>(query);
    for (int i = kLanes; i < n; i += kLanes) one += load<F>(keys + i) * load<F>(query + i);
    keys += n;
  }
  return folded_all<kLanes / 2>(sums);
}

}  // namespace

void head_window(const Head& head, const Window& window, const float* xbc, std::size_t xbc_stride, const float* gate,
                 std::size_t gate_stride, const float* turns, std::int64_t position, int tokens, float* y,
                 std::size_t y_stride, float* scratch) {
  const int size = head.size, width = head.width, n = padded(size), p = padded(width), last = window.tokens;
  float* first_key = window.keys + static_cast<std::size_t>(padded(last)) * n;
  float* first_value = window.values + static_cast<std::size_t>(last) * p;
  float *scores = scratch, *query = scores + padded(last), *open = query + n, *found = open + p;
  std::fill(query + size, query + n, 0.0f);
  for (int t = 0; t < tokens; ++t, ++position) {
    const float* row = xbc + t * xbc_stride;
    const float* turn = turns + static_cast<std::size_t>(t) * size;
    const int place = static_cast<int>(position % last);
    const int filled = static_cast<int>(std::min<std::int64_t>(position + 1, last));
    turned(row + head.c, turn, size, query);
    turned(row + head.b, turn, size, window.keys + static_cast<std::size_t>(place) * n);
    std::copy(row + head.x, row + head.x + width, window.values + static_cast<std::size_t>(place) * p);
    if (position == 0) {
      std::copy(window.keys, window.keys + n, first_key);
      std::copy(window.values, window.values + p, first_value);
    }
    for (int at = 0; at < filled; at += kLanes)
      store(scores + at, products(query, n, window.keys + static_cast<std::size_t>(at) * n));
    std::fill(scores + filled, scores + padded(filled), -std::numeric_limits<float>::infinity());
    // Until the first token leaves the window it is one of the last.
    F apart{};
    for (int i = 0; position >= last && i < n; i += kLanes) apart += load<F>(first_key + i) * load<F>(query + i);
    const float own = position >= last ? sum(apart) : -std::numeric_limits<float>::infinity();
    F peaks = splat(own);
    for (int at = 0; at < filled; at += kLanes) peaks = most(peaks, load<F>(scores + at));
    float best = own;
    for (int l = 0; l < kLanes; ++l) best = std::max(best, peaks[l]);
    F total{};
    for (int at = 0; at < filled; at += kLanes) {
      // Places without a token are left e^-87, which is nothing beside the best one's 1.
      const F share = exponential(load<F>(scores + at) - best);
      store(scores + at, share);
      total += share;
    }
    const float first_share = position >= last ? std::exp(own - best) : 0.0f;
    const float factor = 1.0f / (sum(total) + first_share);
    for (int at = 0; at < p; at += 4 * kLanes) {
      const int parts = std::min(4, (p - at) / kLanes);
      F sums[4] = {};
      for (int v = 0; v < parts; ++v) sums[v] = load<F>(first_value + at + v * kLanes) * first_share;
      // The number of parts is a constant where it can be, so that sums stay in registers.
      const auto add = [&](auto number) {
        const float* value = window.values + at;
        for (int i = 0; i < filled; ++i, value += p)
          for (int v = 0; v < number; ++v) sums[v] += load<F>(value + v * kLanes) * scores[i];
      };
      if (parts == 4)
        add(std::integral_constant<int, 4>{});
      else
        add(parts);
      for (int v = 0; v < parts; ++v) store(found + at + v * kLanes, sums[v] * factor);
    }
    for (int i = 0; i < width; ++i) open[i] = gate[t * gate_stride + i] + head.gate_bias[i];
    gated(open, found, width, found);
    for (int i = 0; i < width; ++i) y[t * y_stride + i] += found[i];
  }
}

}  // namespace mar::MAR_VARIANT
