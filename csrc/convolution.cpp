// The depthwise causal convolution, forward and backward: an item is a panel of channels of one row of the batch.
// Compiled once per instruction set. Does: keep documents apart. Does not: take more than 4 taps, or add up the
// gradients of several rows.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {
namespace {

constexpr int kVectors = 8;  // of a panel
constexpr Count kPanel = kVectors * W;
constexpr Count kSegment = 64;  // tokens that one vector of channels takes at a time, so that a panel stays in cache

Count panels(const ConvCall& call) { return (call.channels + kPanel - 1) / kPanel; }

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

}  // namespace

Count conv_items(const ConvCall& call) { return call.batch * panels(call); }

void conv_forward(const ConvCall& call, Count item) {
  call.bf16 ? conv_of<BFloat>(call, item, false) : conv_of<float>(call, item, false);
}
void conv_backward(const ConvCall& call, Count item) {
  call.bf16 ? conv_of<BFloat>(call, item, true) : conv_of<float>(call, item, true);
}

}  // namespace mar::MAR_VARIANT
