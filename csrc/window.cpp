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

inline F widened(const float* from) { return load<F>(from); }
inline F widened(const std::uint16_t* from) { return bf16_to_float(from); }
inline float one_widened(float x) { return x; }
inline float one_widened(std::uint16_t x) { return bf16_to_float(x); }
inline void put(float x, float* to) { *to = x; }
inline void put(float x, std::uint16_t* to) {  // to the nearest, ties to even; what is no number stays none
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = static_cast<std::uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 64);
}

// scores = query (n) times keys (n x stride), for B lines of them: in the keys' order, which memory is fastest in.
template <int B, typename T>
inline void products(const float* query, int n, const T* keys, int stride, float* scores) {
  F sums[B] = {};
  for (int i = 0; i < n; ++i, keys += stride)
    for (int v = 0; v < B; ++v) sums[v] += widened(keys + v * kLanes) * query[i];
  for (int v = 0; v < B; ++v) store(scores + v * kLanes, sums[v]);
}

template <typename T>
void attend(const Window& window, const float* xbc, std::size_t xbc_stride, const float* gate, std::size_t gate_stride,
            const float* turns, std::int64_t position, int tokens, float* y, std::size_t y_stride, float* scratch) {
  const int size = window.size, width = window.width, stride = window_stride(window.tokens);
  T *keys = reinterpret_cast<T*>(window.keys), *values = reinterpret_cast<T*>(window.values);
  T* first_key = keys + static_cast<std::size_t>(size) * stride;
  T* first_value = values + static_cast<std::size_t>(window.tokens) * width;
  float *scores = scratch, *found = scores + stride, *open = found + padded(width), *query = open + padded(width);
  for (int t = 0; t < tokens; ++t, ++position) {
    const float* row = xbc + t * xbc_stride;
    const float* turn = turns + static_cast<std::size_t>(t) * size;
    const int place = static_cast<int>(position % window.tokens);
    const int filled = static_cast<int>(std::min<std::int64_t>(position + 1, window.tokens));
    for (int i = 0; i < size; ++i) {
      put(turned(row + window.b, turn, size, i), keys + static_cast<std::size_t>(i) * stride + place);
      query[i] = turned(row + window.c, turn, size, i);
    }
    T* own_value = values + static_cast<std::size_t>(place) * width;
    for (int p = 0; p < width; ++p) put(row[window.x + p], own_value + p);
    if (position == 0) {
      for (int i = 0; i < size; ++i) first_key[i] = keys[static_cast<std::size_t>(i) * stride];
      std::copy(values, values + width, first_value);
    }
    int at = 0;
    for (; at + 4 * kLanes <= padded(filled); at += 4 * kLanes)
      products<4>(query, size, keys + at, stride, scores + at);
    for (; at < padded(filled); at += kLanes) products<1>(query, size, keys + at, stride, scores + at);
    // Until the first token leaves the window it is one of the last.
    const bool apart = position >= window.tokens;
    float own = apart ? 0.0f : -std::numeric_limits<float>::infinity();
    for (int i = 0; apart && i < size; ++i) own += query[i] * one_widened(first_key[i]);
    float best = own;
    for (int i = 0; i < filled; ++i) best = std::max(best, scores[i]);
    std::fill(scores + filled, scores + padded(filled), -std::numeric_limits<float>::infinity());
    F total{};
    for (at = 0; at < padded(filled); at += kLanes) {
      const F share = exponential(load<F>(scores + at) - best);
      store(scores + at, share);
      total += share;
    }
    // Places without a token are left e^-87, which is nothing beside the best one's 1.
    const float first_share = apart ? std::exp(own - best) : 0.0f;
    const float factor = 1.0f / (sum(total) + first_share);
    int p = 0;
    for (; p + 4 * kLanes <= width; p += 4 * kLanes) {
      F sums[4];
      for (int v = 0; v < 4; ++v) sums[v] = widened(first_value + p + v * kLanes) * first_share;
      for (int i = 0; i < filled; ++i) {
        const T* value = values + static_cast<std::size_t>(i) * width + p;
        for (int v = 0; v < 4; ++v) sums[v] += widened(value + v * kLanes) * scores[i];
      }
      for (int v = 0; v < 4; ++v) store(found + p + v * kLanes, sums[v] * factor);
    }
    for (; p < width; ++p) {
      float one = one_widened(first_value[p]) * first_share;
      for (int i = 0; i < filled; ++i) one += one_widened(values[static_cast<std::size_t>(i) * width + p]) * scores[i];
      found[p] = one * factor;
    }
    for (p = 0; p < width; ++p) open[p] = gate[t * gate_stride + p] + window.gate_bias[p];
    gated(open, found, width, found);
    for (p = 0; p < width; ++p) y[t * y_stride + p] += found[p];
  }
}

}  // namespace

void head_window(const Window& window, const float* xbc, std::size_t xbc_stride, const float* gate,
                 std::size_t gate_stride, const float* turns, std::int64_t position, int tokens, float* y,
                 std::size_t y_stride, float* scratch) {
  const auto work = window.narrow ? attend<std::uint16_t> : attend<float>;
  work(window, xbc, xbc_stride, gate, gate_stride, turns, position, tokens, y, y_stride, scratch);
}

}  // namespace mar::MAR_VARIANT
