// The chunked scan with gain, unit vectors, skip and gate, forward and backward: an item is one head of one row of the
// batch. Compiled once per instruction set. Does: recompute in the backward pass all but the states between chunks.
// Does not: convolve (convolution.cpp).
//
// Within a chunk y = (C B^T o L) X + (enter o C) S, where L[t][s] is the product of the decays after s up to t. These
// products are built by multiplying, a decay of 0 standing for the beginning of a document: nothing is lost to
// differences of large sums of logarithms. Buffers are padded with zeros to whole vectors.
#include <math.h>

#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {
namespace {

Count padded(Count n) { return (n + W - 1) / W * W; }

template <class T>
struct ArithmeticOf {
  using Type = Plain;
};
#if defined(__AVX512BF16__)
template <>
struct ArithmeticOf<BFloat> {
  using Type = Pairs;
};
#endif

template <class T>
struct Scan {
  using P = typename ArithmeticOf<T>::Type;

  const ScanCall& call;
  const Count batch, head, width, size;   // P and N, padded
  Count begin = 0, tokens = 0, rows = 0;  // of the current chunk; rows is tokens, padded
  float *x, *y, *dx;                      // tokens by P
  float *b, *c, *db, *dc;                 // tokens by N
  float *entered, *left;                  // enter o C, leave o B
  float *factor, *mixed, *dmixed;         // L, C B^T o L and its gradient
  float *state, *turned, *dstate;         // P by N; turned is N by P
  float *arena, *factors;                 // the chunk's packed factors, and where the next one goes
  float decay[kChunk], gain[kChunk], b_scale[kChunk], c_scale[kChunk], enter[kChunk], leave[kChunk];

  static Count floats(const ScanCall& call) {
    const Count width = padded(call.width), size = padded(call.size);
    const Count wider = width > size ? width : size, rows = kChunk > wider ? kChunk : wider;
    // Sixteen packed factors take half of that each.
    return kChunk * (3 * width + 6 * size + 3 * kChunk) + 3 * width * size + 8 * rows * rows;
  }

  Scan(const ScanCall& of, Count item, float* memory)
      : call(of), batch(item / of.heads), head(item % of.heads), width(padded(of.width)), size(padded(of.size)) {
    const auto take = [&memory](Count count) { return (memory += count) - count; };
    x = take(kChunk * width), y = take(kChunk * width), dx = take(kChunk * width);
    b = take(kChunk * size), c = take(kChunk * size), db = take(kChunk * size);
    dc = take(kChunk * size), entered = take(kChunk * size), left = take(kChunk * size);
    factor = take(kChunk * kChunk), mixed = take(kChunk * kChunk), dmixed = take(kChunk * kChunk);
    state = take(width * size), turned = take(width * size), dstate = take(width * size);
    arena = factors = memory;
  }

  // Factors of a product, from the chunk's tokens by `columns`, and from a state.
  Factor packed_rows(const float* m, Count columns) { return P::rows(m, columns, rows, columns, factors); }
  Factor packed_columns(const float* m, Count columns) { return P::columns(m, columns, rows, columns, factors); }
  Factor turned_rows(const float* m, Count columns) { return P::turned(m, columns, rows, columns, factors); }
  Factor packed_state(const float* m, Count height, Count columns) {
    return P::columns(m, columns, height, columns, factors);
  }

  Count chunks() const { return (call.length + kChunk - 1) / kChunk; }
  Count state_offset() const { return (batch * call.heads + head) * call.width * call.size; }
  Count decay_offset(Count t) const { return (batch * call.length + begin + t) * call.heads + head; }
  float carry() const { return enter[tokens - 1]; }

  // The chunk's x with its gain, B and C at their lengths, decays and their products.
  void load_chunk(Count index) {
    begin = index * kChunk;
    tokens = call.length - begin < kChunk ? call.length - begin : kChunk;
    rows = padded(tokens);
    for (Count t = 0; t < rows; ++t) {
      if (t >= tokens) {
        for (Count j = 0; j < width; j += W) store(x + t * width + j, Floats{});
        for (Count j = 0; j < size; j += W) {
          store(b + t * size + j, Floats{});
          store(c + t * size + j, Floats{});
        }
        decay[t] = enter[t] = leave[t] = 0;
        continue;
      }
      const float logarithm = *input<float>(call.log_decay, decay_offset(t));
      decay[t] = starts_document(call.document_ids, batch, call.length, begin + t) ? 0 : expf(logarithm);
      gain[t] = call.gain ? -expm1f(logarithm) : 1;
      enter[t] = (t ? enter[t - 1] : 1) * decay[t];
      copy(x + t * width, row<T>(call.x, batch, begin + t, head), call.width, gain[t]);
      b_scale[t] = vector(b + t * size, row<T>(call.b, batch, begin + t, head), 1);
      c_scale[t] = vector(c + t * size, row<T>(call.c, batch, begin + t, head), static_cast<float>(call.size));
    }
    leave[tokens - 1] = 1;
    for (Count t = tokens - 1; t > 0; --t) leave[t - 1] = leave[t] * decay[t];
    for (Count t = 0; t < rows; ++t)
      for (Count j = 0; j < size; j += W) {
        store(entered + t * size + j, load(c + t * size + j) * enter[t]);
        store(left + t * size + j, load(b + t * size + j) * leave[t]);
      }
    Floats products[kChunk / W] = {};
    for (Count t = 0; t < rows; ++t) {
      float diagonal[W] = {};
      diagonal[t % W] = 1;
      for (Count j = 0; j * W < rows; ++j) {
        products[j] = products[j] * decay[t] + (j == t / W ? load(diagonal) : Floats{});
        store(factor + t * kChunk + j * W, products[j]);
      }
    }
    factors = arena;
    product<P, false, Band::full, true>(mixed, kChunk, by_rows(packed_rows(c, size)), turned_rows(b, size), rows, rows,
                                        size);
  }

  void copy(float* to, const T* from, Count count, float scale) const {
    for (Count j = 0; j < count; j += W) store(to + j, load(from + j, count - j) * scale);
  }

  // Loads a B or C and returns what it was multiplied by.
  float vector(float* to, const T* from, float square_length) const {
    float scale = 1;
    if (call.unit) {
      Floats squares{};
      for (Count j = 0; j < call.size; j += W) {
        const Floats v = load(from + j, call.size - j);
        squares += v * v;
      }
      scale = sqrtf(square_length / (sum(squares) + 1e-5f));
    }
    copy(to, from, call.size, scale);
    return scale;
  }

  // The gradient of a vector before its scaling from that after it.
  void store_vector(T* to, const float* scaled, const float* gradient, float scale, float square_length) const {
    Floats along{};
    if (call.unit) {
      for (Count j = 0; j < size; j += W) along += load(scaled + j) * load(gradient + j);
    }
    const float share = sum(along) / square_length;
    for (Count j = 0; j < call.size; j += W)
      store(to + j, (load(gradient + j) - load(scaled + j) * share) * scale, call.size - j);
  }

  // A state (P, N) of the caller's into a padded buffer, and back.
  void load_state(const float* from) const {
    for (Count i = 0; i < width; ++i)
      for (Count j = 0; j < size; j += W)
        store(state + i * size + j, from && i < call.width ? load_some(from + i * call.size, j) : Floats{});
  }
  Floats load_some(const float* from, Count j) const {
    return j < call.size ? load(from + j, call.size - j) : Floats{};
  }
  void store_state(float* to, const float* from) const {
    for (Count i = 0; i < call.width; ++i)
      for (Count j = 0; j < call.size; j += W)
        store(to + i * call.size + j, load(from + i * size + j), call.size - j);
  }

  // turned = carry turned + from^T right, right being tokens by P.
  void advance(const float* from, Factor right) {
    for (Count i = 0; i < size * width; i += W) store(turned + i, load(turned + i) * carry());
    product<P, true>(turned, width, by_columns(packed_columns(from, size)), right, size, width, tokens);
  }

  float skip() const { return call.skip ? input<float>(call.skip)[head] : 0; }

  void forward() {
    load_state(call.first ? input<float>(call.first, state_offset()) : nullptr);
    transpose(turned, width, state, size, width, size);
    const Count chunk_states = call.width * call.size;
    for (Count index = 0; index < chunks(); ++index) {
      load_chunk(index);
      if (call.states) {
        transpose(state, size, turned, width, size, width);
        store_state(output<float>(call.states, state_offset() * chunks() + index * chunk_states), state);
      }
      for (Count t = 0; t < rows; ++t)
        for (Count j = 0; j <= t; j += W)
          store(mixed + t * kChunk + j, load(mixed + t * kChunk + j) * load(factor + t * kChunk + j));
      const Factor inputs = packed_columns(x, width);
      product<P, false, Band::lower>(y, width, by_rows(P::rows(mixed, kChunk, rows, rows, factors)), inputs, rows, width,
                                     tokens);
      product<P, true>(y, width, by_rows(packed_rows(entered, size)), packed_state(turned, size, width), rows, width,
                       size);
      advance(left, inputs);
      for (Count t = 0; t < tokens; ++t) finish(t);
    }
    transpose(state, size, turned, width, size, width);
    store_state(output<float>(call.last, state_offset()), state);
  }

  // Skip and gate.
  void finish(Count t) const {
    const Count channel = head * call.width;
    T* out = row<T>(call.out, batch, begin + t, head);
    const T* raw = row<T>(call.x, batch, begin + t, head);
    T* kept = call.kept ? output<T>(call.kept, (batch * call.length + begin + t) * call.heads * call.width + channel)
                        : nullptr;
    for (Count j = 0; j < call.width; j += W) {
      const Count count = call.width - j;
      Floats v = load(y + t * width + j);
      if (call.skip) v += load(raw + j, count) * skip();
      if (call.z.data) {
        if (kept) store(kept + j, v, count);
        const Floats u = gate_logits(t, j);
        v *= u * sigmoid(u);
      }
      store(out + j, v, count);
    }
  }

  Floats gate_logits(Count t, Count j) const {
    const Count count = call.width - j;
    return load(row<T>(call.z, batch, begin + t, head) + j, count) +
           load(input<float>(call.z_bias, head * call.width + j), count);
  }

  // y <- the gradient of what the scan itself gives; writes the gate's and the skip's gradients. dx <- D y's.
  void begin_backward(Count t, Floats& dskip) {
    const Count channel = head * call.width;
    const T* dout = row<T>(call.dout, batch, begin + t, head);
    const T* raw = row<T>(call.x, batch, begin + t, head);
    const T* kept = input<T>(call.kept, (batch * call.length + begin + t) * call.heads * call.width + channel);
    float* dz_bias = output<float>(call.dz_bias_parts, batch * call.heads * call.width + channel);
    for (Count j = 0; j < call.width; j += W) {
      const Count count = call.width - j;
      Floats dy = load(dout + j, count);
      if (call.z.data) {
        const Floats u = gate_logits(t, j), open = sigmoid(u);
        const Floats du = dy * load(kept + j, count) * open * (1.0f + u * (1.0f - open));
        store(row<T>(call.dz, batch, begin + t, head) + j, du, count);
        store(dz_bias + j, load(dz_bias + j, count) + du, count);
        dy *= u * open;
      }
      if (call.skip) dskip += dy * load(raw + j, count);
      store(y + t * width + j, dy);
    }
  }

  void backward() {
    load_state(call.dlast ? input<float>(call.dlast, state_offset()) : nullptr);
    transpose(turned, width, state, size, width, size);
    if (call.z.data) {
      float* dz_bias = output<float>(call.dz_bias_parts, (batch * call.heads + head) * call.width);
      for (Count j = 0; j < call.width; ++j) dz_bias[j] = 0;
    }
    Floats dskip{};
    for (Count index = chunks() - 1; index >= 0; --index) {
      load_chunk(index);
      load_state(input<float>(call.states, state_offset() * chunks() + index * call.width * call.size));
      transpose(dstate, size, turned, width, size, width);
      for (Count t = 0; t < tokens; ++t) begin_backward(t, dskip);
      for (Count t = tokens; t < rows; ++t)
        for (Count j = 0; j < width; j += W) store(y + t * width + j, Floats{});
      chunk_backward();
    }
    if (call.dfirst) {
      transpose(dstate, size, turned, width, size, width);
      store_state(output<float>(call.dfirst, state_offset()), dstate);
    }
    if (call.skip) output<float>(call.dskip_parts)[batch * call.heads + head] = sum(dskip);
  }

  // A decay's logarithm enters as a factor's exponent: its gradient is the factor times the factor's gradient, summed
  // over all factors that span the token. The sums run over the chunk in double, as they take back what they added.
  void chunk_backward() {
    const Factor dy_rows = packed_rows(y, width), dy_columns = packed_columns(y, width);
    product<P, false, Band::full, true>(dmixed, kChunk, by_rows(dy_rows), turned_rows(x, width), rows, rows, width);
    Floats below[kChunk / W] = {};  // column sums under the diagonal
    float before[kChunk];           // row sums left of it
    for (Count t = 0; t < rows; ++t) {
      float off_diagonal[W];
      for (Count j = 0; j < W; ++j) off_diagonal[j] = j < t % W ? 1.0f : 0.0f;
      Floats whole{};
      for (Count j = 0; j <= t; j += W) {
        const Count place = t * kChunk + j;
        const Floats l = load(factor + place), m = load(mixed + place) * l, d = load(dmixed + place);
        store(mixed + place, m);
        store(dmixed + place, d * l);
        Floats span = m * d;
        if (j == t / W * W) span *= load(off_diagonal);
        below[j / W] += span;
        whole += span;
      }
      before[t] = sum(whole);
    }
    float under[kChunk];
    for (Count j = 0; j < rows; j += W) store(under + j, below[j / W]);

    product<P, false, Band::upper>(dx, width, by_columns(P::columns(mixed, kChunk, rows, rows, factors)), dy_columns,
                                   rows, width, tokens);
    product<P, true>(dx, width, by_rows(packed_rows(left, size)), packed_state(turned, size, width), rows, width, size);

    float entering[kChunk], leaving[kChunk];
    product<P, false>(dc, size, by_rows(dy_rows), packed_state(state, width, size), rows, size, width);
    product<P, false>(db, size, by_rows(packed_rows(x, width)), packed_state(dstate, width, size), rows, size, width);
    for (Count t = 0; t < tokens; ++t) {
      entering[t] = scale_row(dc + t * size, c + t * size, enter[t]);
      leaving[t] = scale_row(db + t * size, b + t * size, leave[t]);
    }
    product<P, true, Band::lower>(dc, size, by_rows(P::rows(dmixed, kChunk, rows, rows, factors)),
                                  packed_columns(b, size), rows, size, tokens);
    product<P, true, Band::upper>(db, size, by_columns(P::columns(dmixed, kChunk, rows, rows, factors)),
                                  packed_columns(c, size), rows, size, tokens);

    double kept = 0;
    for (Count i = 0; i < width; ++i) {
      Floats along{};
      for (Count j = 0; j < size; j += W) along += load(state + i * size + j) * load(dstate + i * size + j);
      kept += sum(along);
    }
    double spanning = kept * carry();
    for (Count t = 0; t < tokens; ++t) spanning += entering[t];
    for (Count t = 0; t < tokens; ++t) {
      const bool cut = starts_document(call.document_ids, batch, call.length, begin + t);
      float gradient = cut ? 0 : static_cast<float>(spanning);
      T* to = row<T>(call.dx, batch, begin + t, head);
      const T* raw = row<T>(call.x, batch, begin + t, head);
      Floats along{};
      for (Count j = 0; j < call.width; j += W) {
        const Count count = call.width - j;
        const Floats inside = load(dx + t * width + j);
        if (call.gain) along += inside * load(raw + j, count);
        store(to + j, inside * gain[t] + load(y + t * width + j) * skip(), count);
      }
      if (call.gain) gradient -= (1 - gain[t]) * sum(along);
      *output<float>(call.dlog_decay, decay_offset(t)) = gradient;
      store_vector(row<T>(call.db, batch, begin + t, head), b + t * size, db + t * size, b_scale[t], 1);
      store_vector(row<T>(call.dc, batch, begin + t, head), c + t * size, dc + t * size, c_scale[t],
                   static_cast<float>(call.size));
      spanning += static_cast<double>(under[t]) - before[t] + leaving[t] - entering[t];
    }
    advance(entered, dy_columns);
  }

  // Scales a gradient and returns its product with the vector that it is of.
  float scale_row(float* gradient, const float* vector, float scale) const {
    Floats along{};
    for (Count j = 0; j < size; j += W) {
      const Floats scaled = load(gradient + j) * scale;
      along += scaled * load(vector + j);
      store(gradient + j, scaled);
    }
    return sum(along);
  }
};

}  // namespace

Count scan_scratch(const ScanCall& call) { return Scan<float>::floats(call); }

void scan_forward(const ScanCall& call, Count item, float* memory) {
  call.bf16 ? Scan<BFloat>(call, item, memory).forward() : Scan<float>(call, item, memory).forward();
}

void scan_backward(const ScanCall& call, Count item, float* memory) {
  call.bf16 ? Scan<BFloat>(call, item, memory).backward() : Scan<float>(call, item, memory).backward();
}

}  // namespace mar::MAR_VARIANT
