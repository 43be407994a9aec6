// The depthwise causal convolution, forward and backward: an item is a panel of channels of one row of the batch.
// Compiled once per instruction set. Does: keep documents apart. Does not: take more than 4 taps, or add up the
// gradients of several rows.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {
namespace {

constexpr int kVectors = 8;  // of a panel
constexpr Count kPanel = kVectors * W;
constexpr Count kSegment = 64;  // tokens that a few vectors of channels take at a time, so that a panel stays in cache
// Vectors that a token takes at once: more bytes of each of its rows, whose lines fall on few sets of the cache where a row
// is a multiple of a page. As measured on a Zen 5: more of them are slower where registers are short.
constexpr int kForward = 4;
#if defined(__AVX512F__)
constexpr int kBackward = 2;
#else
constexpr int kBackward = 1;
#endif

Count panels(const ConvCall& call) { return (call.channels + kPanel - 1) / kPanel; }

template <int Taps, class T>
struct Conv {
  const ConvCall& call;
  const Count batch, panel;
  Count begin = 0, end = 0;  // of the segment
  int reach[kSegment];       // how many of the Taps - 1 tokens before it a token sees
  bool whole = true;         // all of them, everywhere in the segment

  Conv(const ConvCall& of, Count item) : call(of), batch(item / panels(of)), panel(item % panels(of) * kPanel) {}

  // Calls body(vector, channel, lanes) for the vectors of a segment, one segment after the other; whole ones come by V,
  // where so many are left.
  template <int V, class Body>
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
      for (int v = 0; v < kVectors && panel + v * W < call.channels;) {
        const Count lanes = call.channels - panel - v * W;
        const bool together = v % V == 0 && lanes >= V * W;
        body(v, panel + v * W, together ? V * W : lanes < W ? lanes : W);
        v += together ? V : 1;
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

  // Of V vectors; Full: each of W lanes.
  template <bool Whole, bool Full, int V>
  void forward(Count j, Count lanes) const {
    Floats taps[V][Taps], window[V][Taps], bias[V];
    for (int v = 0; v < V; ++v) {
      load_taps(taps[v], j + v * W, lanes);
      load_window(window[v], j + v * W, lanes);
      bias[v] = load(input<float>(call.bias, j + v * W), lanes);
    }
    const T* x = row<T>(call.x, batch, begin) + j;
    T* y = row<T>(call.y, batch, begin) + j;
    for (Count t = begin; t < end; ++t, x += call.x.token, y += call.y.token) {
      for (Count line = 0; line < V * W; line += 64 / Count{sizeof(T)}) __builtin_prefetch(x + kSegment * call.x.token + line);
      for (int v = 0; v < V; ++v) {
        window[v][0] = Full ? load(x + v * W) : load(x, lanes);
        Floats total = bias[v] + taps[v][0] * window[v][0];
        for (int i = 1; i < Taps; ++i)
          if (Whole || i <= reach[t - begin]) total += taps[v][i] * window[v][i];
        Full ? store(y + v * W, total) : store(y, total, lanes);
        shift(window[v]);
      }
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

  template <bool Whole, bool Full, int V>
  void backward(Sums* sums, Count j, Count lanes) const {
    Floats taps[V][Taps], window[V][Taps], dtaps[V][Taps] = {}, dbias[V] = {}, dx[V][Taps];
    for (int v = 0; v < V; ++v) {
      load_taps(taps[v], j + v * W, lanes);
      load_window(window[v], j + v * W, lanes);
      for (int i = 0; i < Taps; ++i) dx[v][i] = sums[v].dx[i];
    }
    const T* x = row<T>(call.x, batch, begin) + j;
    const T* dy = row<T>(call.dy, batch, begin) + j;
    for (Count t = begin; t < end; ++t, x += call.x.token, dy += call.dy.token) {
      for (Count line = 0; line < V * W; line += 64 / Count{sizeof(T)}) {
        __builtin_prefetch(x + kSegment * call.x.token + line);
        __builtin_prefetch(dy + kSegment * call.dy.token + line);
      }
      for (int v = 0; v < V; ++v) {
        window[v][0] = Full ? load(x + v * W) : load(x, lanes);
        const Floats gradient = Full ? load(dy + v * W) : load(dy, lanes);
        dbias[v] += gradient;
        for (int i = 0; i < Taps; ++i)
          if (Whole || i <= reach[t - begin]) {
            dtaps[v][i] += gradient * window[v][i];
            dx[v][i] += gradient * taps[v][i];
          }
        if (Full && t >= Taps - 1)
          store(row<T>(call.dx, batch, t - (Taps - 1)) + j + v * W, dx[v][Taps - 1]);
        else
          store_dx(dx[v][Taps - 1], t - (Taps - 1), j + v * W, lanes);
        shift(window[v]);
        shift(dx[v]);
        dx[v][0] = Floats{};
      }
    }
    for (int v = 0; v < V; ++v) {
      for (int i = 0; i < Taps; ++i) {
        sums[v].taps[i] += dtaps[v][i];
        sums[v].dx[i] = dx[v][i];
      }
      sums[v].bias += dbias[v];
    }
  }

  void forward() {
    over_segments<kForward>([this](int, Count j, Count lanes) {
      if (lanes < W)
        forward<false, false, 1>(j, lanes);
      else if (lanes == W)
        whole ? forward<true, true, 1>(j, W) : forward<false, true, 1>(j, W);
      else
        whole ? forward<true, true, kForward>(j, W) : forward<false, true, kForward>(j, W);
    });
  }

  void backward() {
    Sums sums[kVectors] = {};
    over_segments<kBackward>([this, &sums](int first, Count j, Count lanes) {
      Sums* of = sums + first;
      if (lanes < W)
        backward<false, false, 1>(of, j, lanes);
      else if (lanes == W)
        whole ? backward<true, true, 1>(of, j, W) : backward<false, true, 1>(of, j, W);
      else
        whole ? backward<true, true, kBackward>(of, j, W) : backward<false, true, kBackward>(of, j, W);
      if (end < call.length) return;
      for (; lanes > 0; lanes -= W, j += W, ++of) {
        const Count some = lanes < W ? lanes : W;
        for (int i = 1; i < Taps; ++i) store_dx(of->dx[i], call.length - i, j, some);
        for (int i = 0; i < Taps; ++i)
          store(output<float>(call.dweight_parts, (batch * Taps + Taps - 1 - i) * call.channels + j), of->taps[i], some);
        store(output<float>(call.dbias_parts, batch * call.channels + j), of->bias, some);
      }
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
