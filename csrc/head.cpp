// One head of a mixer: convolution, state, skip and gate, a token at a time or in chunks. Compiled once per instruction
// set. Does: keep the head's two states. Does not: project its inputs, or keep anything for a backward pass (scan.cpp).
#include "engine_kernels.hpp"
#include "engine_vectors.hpp"

namespace mar::MAR_VARIANT {
namespace {

// `count` channels from `first` of the convolution at one token, whose predecessors are the rows before it.
inline void convolve(const Head& head, const float* const* rows, int first, int count, float* y) {
  for (int i = 0; i < count; ++i) y[i] = head.conv_bias[first + i];
  for (int k = 0; k < head.taps; ++k) {
    const float* weight = head.conv_weight + static_cast<std::size_t>(k) * head.channels + first;
    const float* row = rows[k] + first;
    for (int i = 0; i < count; ++i) y[i] += weight[i] * row[i];
  }
}

inline void to_length(float* v, int n, float length) {
  const float factor = length / std::sqrt(dot(v, v, n) + 1e-5f);
  for (int i = 0; i < n; ++i) v[i] *= factor;
}

constexpr int kMostTaps = 16;

inline void remember(const Head& head, const float* xbc, int first, int count) {
  for (int k = 0; k + 2 < head.taps; ++k) {
    float* to = head.conv_state + static_cast<std::size_t>(k) * head.channels + first;
    std::memcpy(to, to + head.channels, sizeof(float) * count);
  }
  if (head.taps > 1)
    std::memcpy(head.conv_state + static_cast<std::size_t>(head.taps - 2) * head.channels + first, xbc + first,
                sizeof(float) * count);
}

// out (rows x columns) = or += a (rows x k) times b (k x columns); strides in floats, columns padded to lanes.
inline void small_product(const float* a, int a_stride, const float* b, int b_stride, int k, int rows, int columns,
                          float* out, int out_stride, bool plus) {
  int j = 0;
  for (; j + kSlice <= columns; j += kSlice)
    product(a, a_stride, b + j, b_stride, k, rows, out + j, out_stride, plus);
  for (; j < columns; j += kLanes)
    for (int m = 0; m < rows; ++m) {
      F total = plus ? load<F>(out + m * out_stride + j) : F{};
      for (int i = 0; i < k; ++i) total += load<F>(b + i * b_stride + j) * a[m * a_stride + i];
      store(out + m * out_stride + j, total);
    }
}

// One token through V registers' columns of a state, whose part of y stays in registers.
template <int V>
inline void advance(float* state, int width, int size, float decay, float gain, const float* x, const float* b,
                    const float* c, float* y) {
  F scaled[V], total[V] = {};
  for (int v = 0; v < V; ++v) scaled[v] = load<F>(x + v * kLanes) * gain;
  for (int n = 0; n < size; ++n, state += width)
    for (int v = 0; v < V; ++v) {
      const F s = load<F>(state + v * kLanes) * decay + scaled[v] * b[n];
      store(state + v * kLanes, s);
      total[v] += s * c[n];
    }
  for (int v = 0; v < V; ++v) store(y + v * kLanes, total[v]);
}

}  // namespace

void head_step(const Head& head, const float* xbc, const float* gate, float log_decay, float* y, float* scratch) {
  const int width = head.width, size = head.size;
  float *x = scratch, *b = x + padded(width), *c = b + padded(size);
  const float* rows[kMostTaps];
  for (int k = 0; k + 1 < head.taps; ++k) rows[k] = head.conv_state + static_cast<std::size_t>(k) * head.channels;
  rows[head.taps - 1] = xbc;
  convolve(head, rows, head.x, width, x);
  convolve(head, rows, head.b, size, b);
  convolve(head, rows, head.c, size, c);
  remember(head, xbc, head.x, width);
  remember(head, xbc, head.b, size);
  remember(head, xbc, head.c, size);
  if (head.unit) {
    to_length(b, size, 1.0f);
    to_length(c, size, std::sqrt(static_cast<float>(size)));
  }
  const float decay = std::exp(log_decay);
  const float gain = head.gain ? -std::expm1(log_decay) : 1.0f;
  int at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes)
    advance<4>(head.state + at, width, size, decay, gain, x + at, b, c, y + at);
  for (; at + kLanes <= width; at += kLanes) advance<1>(head.state + at, width, size, decay, gain, x + at, b, c, y + at);
  std::fill(y + at, y + width, 0.0f);
  for (int n = 0; n < size; ++n) {
    float* state = head.state + static_cast<std::size_t>(n) * width;
    for (int p = at; p < width; ++p) {
      state[p] = state[p] * decay + x[p] * gain * b[n];
      y[p] += state[p] * c[n];
    }
  }
  for (int p = 0; p < width; ++p) {
    y[p] += head.skip * x[p];
    x[p] = gate[p] + head.gate_bias[p];
  }
  gated(x, y, width, y);
}

void head_scan(const Head& head, const float* xbc, std::size_t xbc_stride, const float* gate, std::size_t gate_stride,
               const float* log_decay, std::size_t decay_stride, int tokens, float* y, std::size_t y_stride,
               float* scratch) {
  const int width = head.width, size = head.size, p = padded(width), n = padded(size);
  if (tokens == 1) return head_step(head, xbc, gate, log_decay[0], y, scratch);
  float* x = scratch;                  // chunk x p: after the convolution
  float* scaled = x + kChunk * p;      // chunk x p: times gain
  float* result = scaled + kChunk * p; // chunk x p
  float* b = result + kChunk * p;      // chunk x n
  float* c = b + kChunk * n;           // chunk x n
  float* turned = c + kChunk * n;      // n x chunk: B transposed
  float* seen = turned + kChunk * n;   // chunk x n: C times what is left of the state before the chunk
  float* mix = seen + kChunk * n;      // chunk x chunk
  float* decay = mix + kChunk * kChunk;  // chunk
  float* left = decay + kChunk;          // chunk: what is left now of each token of the chunk
  std::fill(scratch, scratch + head_scratch(width, size, 0), 0.0f);
  for (int start = 0; start < tokens; start += kChunk) {
    const int q = std::min(kChunk, tokens - start);
    for (int t = 0; t < q; ++t) {
      const float* rows[kMostTaps];
      for (int k = 0; k < head.taps; ++k) {
        const int back = start + t - (head.taps - 1 - k);
        rows[k] = back >= 0 ? xbc + back * xbc_stride
                            : head.conv_state + static_cast<std::ptrdiff_t>(head.taps - 1 + back) * head.channels;
      }
      convolve(head, rows, head.x, width, x + t * p);
      convolve(head, rows, head.b, size, b + t * n);
      convolve(head, rows, head.c, size, c + t * n);
      if (head.unit) {
        to_length(b + t * n, size, 1.0f);
        to_length(c + t * n, size, std::sqrt(static_cast<float>(size)));
      }
      const float step = log_decay[(start + t) * decay_stride];
      decay[t] = std::exp(step);
      const float gain = head.gain ? -std::expm1(step) : 1.0f;
      for (int i = 0; i < width; ++i) scaled[t * p + i] = x[t * p + i] * gain;
    }
    float carry = 1.0f;
    for (int t = 0; t < q; ++t) {
      for (int i = 0; i < size; ++i) turned[i * kChunk + t] = b[t * n + i];
      carry *= decay[t];
      for (int i = 0; i < n; i += kLanes) store(seen + t * n + i, load<F>(c + t * n + i) * carry);
    }
    small_product(c, n, turned, kChunk, size, q, padded(q), mix, kChunk, false);
    // Decays are multiplied up: differences of their logarithms' sums would be rounded where one of them is strong.
    std::fill(left, left + kChunk, 0.0f);
    for (int t = 0; t < q; ++t) {
      for (int s = 0; s < padded(t + 1); s += kLanes) store(left + s, load<F>(left + s) * decay[t]);
      left[t] = 1.0f;
      for (int s = 0; s < padded(t + 1); s += kLanes)
        store(mix + t * kChunk + s, load<F>(mix + t * kChunk + s) * load<F>(left + s));
      std::fill(mix + t * kChunk + t + 1, mix + t * kChunk + kChunk, 0.0f);
    }
    small_product(mix, kChunk, scaled, p, q, q, p, result, p, false);
    // The state's rows are `width` apart, which the products read in whole lanes: go through a padded copy.
    if (p == width) {
      small_product(seen, n, head.state, p, size, q, p, result, p, true);
    } else {
      for (int t = 0; t < q; ++t)
        for (int i = 0; i < size; ++i)
          for (int j = 0; j < width; ++j)
            result[t * p + j] += seen[t * n + i] * head.state[static_cast<std::size_t>(i) * width + j];
    }
    for (int i = 0; i < size; ++i)
      for (int t = 0; t < padded(q); t += kLanes)
        store(turned + i * kChunk + t, load<F>(turned + i * kChunk + t) * load<F>(left + t));
    for (std::size_t i = 0; i < static_cast<std::size_t>(size) * width; ++i) head.state[i] *= carry;
    if (p == width) {
      small_product(turned, kChunk, scaled, p, q, size, p, head.state, p, true);
    } else {
      for (int i = 0; i < size; ++i)
        for (int t = 0; t < q; ++t)
          for (int j = 0; j < width; ++j)
            head.state[static_cast<std::size_t>(i) * width + j] += turned[i * kChunk + t] * scaled[t * p + j];
    }
    for (int t = 0; t < q; ++t) {
      float* to = y + (start + t) * y_stride;
      const float* z = gate + (start + t) * gate_stride;
      float* open = scaled + t * p;
      for (int i = 0; i < width; ++i) {
        to[i] = result[t * p + i] + head.skip * x[t * p + i];
        open[i] = z[i] + head.gate_bias[i];
      }
      gated(open, to, width, to);
    }
  }
  // The last K - 1 tokens, older ones from the state before.
  const int kept = head.taps - 1;
  const int firsts[3] = {head.x, head.b, head.c}, counts[3] = {width, size, size};
  for (int part = 0; part < 3; ++part)
    for (int k = 0; k < kept; ++k) {
      const int from = tokens - kept + k;
      const float* row = from >= 0 ? xbc + from * xbc_stride
                                   : head.conv_state + static_cast<std::size_t>(kept + from) * head.channels;
      std::memmove(head.conv_state + static_cast<std::size_t>(k) * head.channels + firsts[part], row + firsts[part],
                   sizeof(float) * counts[part]);
    }
}

}  // namespace mar::MAR_VARIANT
