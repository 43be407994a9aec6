// One head's attention over the last tokens and the first one, beside its scan. Compiled once per instruction set.
// Does: turn, remember, weigh and gate, a token at a time. Does not: compute angles (model.cpp, once a token).
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

#include <limits>

namespace mar::MAR_VARIANT {
namespace {

// Channel i with channel i + n / 2, by the angle whose cosine and sine are turn[i] and turn[i + n / 2].
inline float turned(const float* v, const float* turn, int n, int i) {
  const int half = n / 2;
  return i < half ? v[i] * turn[i] - v[i + half] * turn[i + half] : v[i] * turn[i - half] + v[i - half] * turn[i];
}

}  // namespace

void head_window(const Window& window, const float* xbc, std::size_t xbc_stride, const float* gate,
                 std::size_t gate_stride, const float* turns, std::int64_t position, int tokens, float* y,
                 std::size_t y_stride, float* scratch) {
  const int size = window.size, width = window.width, stride = window_stride(window.tokens);
  float *scores = scratch, *found = scores + stride, *open = found + padded(width), *query = open + padded(width);
  for (int t = 0; t < tokens; ++t, ++position) {
    const float* row = xbc + t * xbc_stride;
    const float* turn = turns + static_cast<std::size_t>(t) * size;
    // The first token has place 0 for good, later ones take turns in the others.
    const int place = position == 0 ? 0 : 1 + static_cast<int>((position - 1) % window.tokens);
    const int filled = 1 + static_cast<int>(std::min<std::int64_t>(position, window.tokens));
    for (int i = 0; i < size; ++i) {
      window.keys[static_cast<std::size_t>(i) * stride + place] = turned(row + window.b, turn, size, i);
      query[i] = turned(row + window.c, turn, size, i);
    }
    std::memcpy(window.values + static_cast<std::size_t>(place) * width, row + window.x, sizeof(float) * width);
    float best = -std::numeric_limits<float>::infinity();
    for (int at = 0; at < padded(filled); at += kLanes) {
      F sums[2] = {};
      const float* key = window.keys + at;
      int i = 0;
      for (; i + 2 <= size; i += 2, key += 2 * stride) {
        sums[0] += load<F>(key) * query[i];
        sums[1] += load<F>(key + stride) * query[i + 1];
      }
      store(scores + at, sums[0] + sums[1]);
    }
    for (int i = 0; i < filled; ++i) best = std::max(best, scores[i]);
    std::fill(scores + filled, scores + padded(filled), -std::numeric_limits<float>::infinity());
    F total{};
    for (int at = 0; at < padded(filled); at += kLanes) {
      const F share = exponential(load<F>(scores + at) - best);
      store(scores + at, share);
      total += share;
    }
    // What `exponential` leaves of places without a token is too little to tell, but what lies there may be anything.
    std::fill(scores + filled, scores + padded(filled), 0.0f);
    const float factor = 1.0f / sum(total);
    int p = 0;
    for (; p + 4 * kLanes <= width; p += 4 * kLanes) {
      F sums[4] = {};
      for (int i = 0; i < filled; ++i) {
        const float* value = window.values + static_cast<std::size_t>(i) * width + p;
        for (int v = 0; v < 4; ++v) sums[v] += load<F>(value + v * kLanes) * scores[i];
      }
      for (int v = 0; v < 4; ++v) store(found + p + v * kLanes, sums[v] * factor);
    }
    for (; p < width; ++p) {
      float one = 0;
      for (int i = 0; i < filled; ++i) one += window.values[static_cast<std::size_t>(i) * width + p] * scores[i];
      found[p] = one * factor;
    }
    for (p = 0; p < width; ++p) open[p] = gate[t * gate_stride + p] + window.gate_bias[p];
    gated(open, found, width, found);
    for (p = 0; p < width; ++p) y[t * y_stride + p] += found[p];
  }
}

}  // namespace mar::MAR_VARIANT
