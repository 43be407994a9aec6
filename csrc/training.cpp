// The training kernels, compiled once per instruction set (MAR_VARIANT): scan, depthwise convolution, staircase.
//
// Nothing of the standard library's templates is used here: the linker would merge their code across instruction sets.
#include "training.hpp"

#include <math.h>

#include "training_vectors.hpp"

namespace mar::MAR_VARIANT {
namespace {

using Count = std::int64_t;

template <class T>
const T* input(Address address, Count offset = 0) {
  return reinterpret_cast<const T*>(address) + offset;
}
template <class T>
T* output(Address address, Count offset = 0) {
  return reinterpret_cast<T*>(address) + offset;
}
template <class T>
T* row(const View& view, Count batch, Count token, Count head = 0) {
  return reinterpret_cast<T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}
bool starts_document(Address ids, Count batch, Count length, Count token) {
  if (!ids || token == 0) return false;
  const std::int64_t* id = input<std::int64_t>(ids, batch * length + token);
  return id[0] != id[-1];
}
Count padded(Count n) { return (n + W - 1) / W * W; }

// ---- scan: an item is one head of one row of the batch -------------------------------------------------------------
//
// Within a chunk y = (C B^T o L) X + (enter o C) S, where L[t][s] is the product of the decays after s up to t. These
// products are built by multiplying, a decay of 0 standing for the beginning of a document: nothing is lost to
// differences of large sums of logarithms. Buffers are padded with zeros to whole vectors.

constexpr Count kChunk = 64;

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

void scan_forward(const ScanCall& call, Count item, float* memory) {
  call.bf16 ? Scan<BFloat>(call, item, memory).forward() : Scan<float>(call, item, memory).forward();
}

void scan_backward(const ScanCall& call, Count item, float* memory) {
  call.bf16 ? Scan<BFloat>(call, item, memory).backward() : Scan<float>(call, item, memory).backward();
}

// ---- convolution: an item is a panel of channels of one row of the batch -------------------------------------------

constexpr int kVectors = 8;  // of a panel
constexpr Count kPanel = kVectors * W;
constexpr Count kSegment = 64;  // tokens that one vector of channels takes at a time, so that a panel stays in cache

Count panels(const ConvCall& call) { return (call.channels + kPanel - 1) / kPanel; }
Count conv_items(const ConvCall& call) { return call.batch * panels(call); }

template <int Taps, class T>
struct Conv {
  const ConvCall& call;
  const Count batch, panel;
  Count begin = 0, end = 0;  // of the segment
  int reach[kSegment];       // how many of the Taps - 1 tokens before it a token sees
  bool whole = true;         // all of them, everywhere in the segment

  Conv(const ConvCall& of, Count item) : call(of), batch(item / panels(of)), panel(item % panels(of) * kPanel) {}

  // Calls body(vector, channel, lanes) for the vectors of a segment, one segment after the other.
  template <class Body>
  void over_segments(Body body) {
    for (begin = 0; begin < call.length; begin = end) {
      end = begin + kSegment < call.length ? begin + kSegment : call.length;
      whole = true;
      for (Count t = begin; t < end; ++t) {
        int& count = reach[t - begin];
        count = 0;
        while (count < Taps - 1 && (count >= t || !starts_document(call.document_ids, batch, call.length, t - count)))
          ++count;
        whole = whole && count == Taps - 1;
      }
      for (int v = 0; v < kVectors && panel + v * W < call.channels; ++v) {
        const Count lanes = call.channels - panel - v * W;
        body(v, panel + v * W, lanes < W ? lanes : W);
      }
    }
  }

  // taps[i] goes with the token i before.
  void load_taps(Floats* taps, Count j, Count lanes) const {
    for (int i = 0; i < Taps; ++i) taps[i] = load(input<float>(call.weight, (Taps - 1 - i) * call.channels + j), lanes);
  }

  // window[i] is x at i tokens before the segment's first.
  void load_window(Floats* window, Count j, Count lanes) const {
    for (int i = 1; i < Taps; ++i) {
      const Count token = begin - i;
      window[i] = Floats{};
      if (token >= 0)
        window[i] = load(row<T>(call.x, batch, token) + j, lanes);
      else if (call.past)
        window[i] = load(input<T>(call.past, (batch * (Taps - 1) + Taps - 1 + token) * call.channels + j), lanes);
    }
  }

  static void shift(Floats* window) {
    for (int i = Taps - 1; i > 0; --i) window[i] = window[i - 1];
  }

  template <bool Whole, bool Full>
  void forward(Count j, Count lanes) const {
    Floats taps[Taps], window[Taps];
    load_taps(taps, j, lanes);
    load_window(window, j, lanes);
    const Floats bias = load(input<float>(call.bias, j), lanes);
    const T* x = row<T>(call.x, batch, begin) + j;
    T* y = row<T>(call.y, batch, begin) + j;
    for (Count t = begin; t < end; ++t, x += call.x.token, y += call.y.token) {
      __builtin_prefetch(x + kSegment * call.x.token);
      window[0] = Full ? load(x) : load(x, lanes);
      Floats total = bias + taps[0] * window[0];
      for (int i = 1; i < Taps; ++i)
        if (Whole || i <= reach[t - begin]) total += taps[i] * window[i];
      Full ? store(y, total) : store(y, total, lanes);
      shift(window);
    }
  }

  struct Sums {
    Floats taps[Taps], bias, dx[Taps];  // dx[i] is unfinished and belongs to the token i before
  };

  void store_dx(Floats value, Count token, Count j, Count lanes) const {
    if (token >= 0)
      store(row<T>(call.dx, batch, token) + j, value, lanes);
    else if (call.dpast)
      store(output<float>(call.dpast, (batch * (Taps - 1) + Taps - 1 + token) * call.channels + j), value, lanes);
  }

  template <bool Whole, bool Full>
  void backward(Sums& sums, Count j, Count lanes) const {
    Floats taps[Taps], window[Taps], dtaps[Taps] = {}, dbias{}, dx[Taps];
    load_taps(taps, j, lanes);
    load_window(window, j, lanes);
    for (int i = 0; i < Taps; ++i) dx[i] = sums.dx[i];
    const T* x = row<T>(call.x, batch, begin) + j;
    const T* dy = row<T>(call.dy, batch, begin) + j;
    for (Count t = begin; t < end; ++t, x += call.x.token, dy += call.dy.token) {
      __builtin_prefetch(x + kSegment * call.x.token);
      __builtin_prefetch(dy + kSegment * call.dy.token);
      window[0] = Full ? load(x) : load(x, lanes);
      const Floats gradient = Full ? load(dy) : load(dy, lanes);
      dbias += gradient;
      for (int i = 0; i < Taps; ++i)
        if (Whole || i <= reach[t - begin]) {
          dtaps[i] += gradient * window[i];
          dx[i] += gradient * taps[i];
        }
      if (Full && t >= Taps - 1)
        store(row<T>(call.dx, batch, t - (Taps - 1)) + j, dx[Taps - 1]);
      else
        store_dx(dx[Taps - 1], t - (Taps - 1), j, lanes);
      shift(window);
      shift(dx);
      dx[0] = Floats{};
    }
    for (int i = 0; i < Taps; ++i) {
      sums.taps[i] += dtaps[i];
      sums.dx[i] = dx[i];
    }
    sums.bias += dbias;
  }

  void forward() {
    over_segments([this](int, Count j, Count lanes) {
      if (lanes < W)
        forward<false, false>(j, lanes);
      else
        whole ? forward<true, true>(j, lanes) : forward<false, true>(j, lanes);
    });
  }

  void backward() {
    Sums sums[kVectors] = {};
    over_segments([this, &sums](int v, Count j, Count lanes) {
      if (lanes < W)
        backward<false, false>(sums[v], j, lanes);
      else
        whole ? backward<true, true>(sums[v], j, lanes) : backward<false, true>(sums[v], j, lanes);
      if (end < call.length) return;
      for (int i = 1; i < Taps; ++i) store_dx(sums[v].dx[i], call.length - i, j, lanes);
      for (int i = 0; i < Taps; ++i)
        store(output<float>(call.dweight_parts, (batch * Taps + Taps - 1 - i) * call.channels + j), sums[v].taps[i],
              lanes);
      store(output<float>(call.dbias_parts, batch * call.channels + j), sums[v].bias, lanes);
    });
  }
};

template <int Taps, class T>
void conv(const ConvCall& call, Count item, bool backward) {
  Conv<Taps, T> of(call, item);
  backward ? of.backward() : of.forward();
}

template <class T>
void conv_of(const ConvCall& call, Count item, bool backward) {
  switch (call.taps) {
    case 1: return conv<1, T>(call, item, backward);
    case 2: return conv<2, T>(call, item, backward);
    case 3: return conv<3, T>(call, item, backward);
    case 4: return conv<4, T>(call, item, backward);
  }
}

void conv_forward(const ConvCall& call, Count item) {
  call.bf16 ? conv_of<BFloat>(call, item, false) : conv_of<float>(call, item, false);
}
void conv_backward(const ConvCall& call, Count item) {
  call.bf16 ? conv_of<BFloat>(call, item, true) : conv_of<float>(call, item, true);
}

// ---- staircase: an item is a block of rows -------------------------------------------------------------------------

constexpr Count kRowsOfItem = 64;

Count staircase_items(const StaircaseCall& call) { return (call.rows + kRowsOfItem - 1) / kRowsOfItem; }

// sum_t s_t of a quotient I / V, with the quotient's sign even where it is zero, and NaN for NaN.
template <bool Round>
Floats staircase(Floats v, Floats low, Floats high) {
  const Floats inside = choose(v < low, low, choose(v > high, high, v));
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, halves to even
  Floats code = Round ? (inside + magic) - magic
                      : __builtin_convertvector(__builtin_convertvector(inside, Ints), Floats);
  code = (Floats)((Words)code | ((Words)inside & 0x80000000u));
  return choose(v == v, code, v);
}

template <class T, bool Round>
void staircase_rows(const StaircaseCall& call, Count item, bool backward) {
  const Count n = call.channels, begin = item * kRowsOfItem;
  const Count end = begin + kRowsOfItem < call.rows ? begin + kRowsOfItem : call.rows;
  const Floats low = splat(call.low), high = splat(call.high);
  const Floats pass_low = splat(call.pass_low), pass_high = splat(call.pass_high);
  const float* threshold = input<float>(call.threshold);
  const float* divisor = input<float>(call.divisor);
  float* sums = call.dthreshold_parts ? output<float>(call.dthreshold_parts, item * n) : nullptr;
  if (backward && sums)
    for (Count j = 0; j < n; ++j) sums[j] = 0;
  for (Count i = begin; i < end; ++i) {
    const T* current = input<T>(call.current, i * n);
    if (!backward) {
      T* out = output<T>(call.output, i * n);
      for (Count j = 0; j < n; j += W) {
        const Count lanes = n - j;
        const Floats v = load(current + j, lanes) / load(divisor + j, lanes);
        store(out + j, staircase<Round>(v, low, high) * load(threshold + j, lanes), lanes);
      }
      continue;
    }
    const T* gradients = input<T>(call.doutput, i * n);
    T* out = call.dcurrent ? output<T>(call.dcurrent, i * n) : nullptr;
    for (Count j = 0; j < n; j += W) {
      const Count lanes = n - j;
      const Floats drive = load(current + j, lanes), gradient = load(gradients + j, lanes);
      const Floats v = drive / load(threshold + j, lanes);
      const Floats passed = choose((v > pass_low) & (v < pass_high), gradient, Floats{});
      if (out) store(out + j, passed, lanes);
      if (!sums) continue;
      const Floats code = staircase<Round>(Round ? drive / load(divisor + j, lanes) : v, low, high);
      store(sums + j, load(sums + j, lanes) + (code * gradient - passed * v), lanes);
    }
  }
}

void staircase_item(const StaircaseCall& call, Count item, bool backward) {
  if (call.bf16)
    call.precharge ? staircase_rows<BFloat, true>(call, item, backward)
                   : staircase_rows<BFloat, false>(call, item, backward);
  else
    call.precharge ? staircase_rows<float, true>(call, item, backward)
                   : staircase_rows<float, false>(call, item, backward);
}
void staircase_forward(const StaircaseCall& call, Count item) { staircase_item(call, item, false); }
void staircase_backward(const StaircaseCall& call, Count item) { staircase_item(call, item, true); }

}  // namespace

extern const Training training;
const Training training = {kChunk,        Scan<float>::floats, scan_forward,    scan_backward,     conv_items,
                           conv_forward,  conv_backward, staircase_items, staircase_forward, staircase_backward};

}  // namespace mar::MAR_VARIANT
