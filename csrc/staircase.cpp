// The staircase V clamp(trunc(I / V + p sign(I))) of a neuron at tau = 1 (ATMN), forward and backward. An item is a block
// of rows.
// Compiled once per instruction set. Does: give the very codes of the closed form in mar.neurons, and count their spikes.
// Does not: add up what the blocks give, spikes and gradients of V.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {
namespace {

constexpr Count kRowsOfItem = 64;
constexpr Count kAhead = 2048;  // bytes, that memory is asked for before they are read

// sum_t s_t of a quotient, with the quotient's sign even where it is zero, and NaN for NaN.
Floats staircase(Floats v, Floats low, Floats high) {
  const Floats inside = v < low ? low : v > high ? high : v;
  Floats code = __builtin_convertvector(__builtin_convertvector(inside, Ints), Floats);
  code = (Floats)((Words)code | ((Words)inside & 0x80000000u));
  return v == v ? code : v;
}

template <class T, bool Charged>
struct Staircase {
  const StaircaseCall& call;
  const Count n = call.channels;
  const float* threshold = input<float>(call.threshold);
  const Floats precharge = splat(call.precharge);
  const Floats low = splat(call.low), high = splat(call.high);
  const Floats pass_low = splat(call.pass_low), pass_high = splat(call.pass_high);

  // Calls part(channel, lanes) over a row; lanes is a constant but for the last few channels.
  template <class Part>
  void over_channels(Part part) const {
    Count j = 0;
    for (; j + W <= n; j += W) part(j, Count{W});
    if (j < n) part(j, n - j);
  }

  // I / V with what the membrane starts with. The sign is put on as bits, so that no compiler fuses product and sum.
  Floats charged(Floats drive, Floats v) const {
    if (!Charged) return drive / v;
    return (drive + (Floats)((Words)(v * precharge) | ((Words)drive & 0x80000000u))) / v;
  }

  void forward(Count i) const {
    const T* current = input<T>(call.current, i * n);
    T* out = output<T>(call.output, i * n);
    over_channels([&](Count j, Count lanes) __attribute__((always_inline)) {
      fetch(current + j);
      const Floats v = load(threshold + j, lanes);
      store(out + j, staircase(charged(load(current + j, lanes), v), low, high) * v, lanes);
    });
  }

  void backward(Count i, float* sums) const {
    const T* current = input<T>(call.current, i * n);
    const T* gradients = input<T>(call.doutput, i * n);
    T* out = call.dcurrent ? output<T>(call.dcurrent, i * n) : nullptr;
    over_channels([&](Count j, Count lanes) __attribute__((always_inline)) {
      fetch(current + j);
      fetch(gradients + j);
      const Floats drive = load(current + j, lanes), gradient = load(gradients + j, lanes);
      const Floats level = load(threshold + j, lanes), v = drive / level;
      const Floats passed = (v > pass_low) & (v < pass_high) ? gradient : Floats{};
      if (out) store(out + j, passed, lanes);
      if (!sums) return;
      const Floats code = staircase(Charged ? charged(drive, level) : v, low, high);
      store(sums + j, load(sums + j, lanes) + (code * gradient - passed * v), lanes);
    });
  }

  // sum_t |s_t| over a row's channels: whole numbers, exact in fp32 below 2^24 a row.
  double spikes(Count i) const {
    const T* current = input<T>(call.current, i * n);
    Floats total{};
    double rest = 0;
    over_channels([&](Count j, Count lanes) __attribute__((always_inline)) {
      fetch(current + j);
      const Floats v = load(threshold + j, lanes);
      const Floats size = (Floats)((Words)staircase(charged(load(current + j, lanes), v), low, high) & 0x7fffffffu);
      if (lanes == W) {
        total += size;
        return;
      }
      float last[W];
      store(last, size);
      for (Count lane = 0; lane < lanes; ++lane) rest += last[lane];
    });
    return rest + sum(total);
  }

  // Gradients of the mean |I| / V, cut at the outermost codes, which stands for the mean of the spikes.
  void spikes_backward(Count i, float* sums) const {
    const T* current = input<T>(call.current, i * n);
    T* out = call.dcurrent ? output<T>(call.dcurrent, i * n) : nullptr;
    const Floats share = splat(call.share);
    over_channels([&](Count j, Count lanes) __attribute__((always_inline)) {
      fetch(current + j);
      const Floats level = load(threshold + j, lanes), v = load(current + j, lanes) / level;
      const Floats size = v < 0.0f ? -share : v > 0.0f ? share : Floats{};
      const Floats slope = (v >= low) & (v <= high) ? size / level : Floats{};
      if (out) store(out + j, slope, lanes);
      if (sums) store(sums + j, load(sums + j, lanes) - slope * v, lanes);
    });
  }

  static void fetch(const T* from) { __builtin_prefetch(from + kAhead / sizeof(T), 0, 2); }
};

enum class Pass { forward, backward, spikes, spikes_backward };

template <class T, bool Charged>
void staircase_rows(const StaircaseCall& call, Count item, Pass pass) {
  const Staircase<T, Charged> of{call};
  const Count begin = item * kRowsOfItem;
  const Count end = begin + kRowsOfItem < call.rows ? begin + kRowsOfItem : call.rows;
  if (pass == Pass::forward) {
    for (Count i = begin; i < end; ++i) of.forward(i);
    return;
  }
  if (pass == Pass::spikes) {
    double total = 0;
    for (Count i = begin; i < end; ++i) total += of.spikes(i);
    *output<double>(call.spikes_parts, item) = total;
    return;
  }
  float* sums = call.dthreshold_parts ? output<float>(call.dthreshold_parts, item * call.channels) : nullptr;
  if (sums)
    for (Count j = 0; j < call.channels; ++j) sums[j] = 0;
  for (Count i = begin; i < end; ++i) pass == Pass::backward ? of.backward(i, sums) : of.spikes_backward(i, sums);
}

void staircase_item(const StaircaseCall& call, Count item, Pass pass) {
  if (call.bf16)
    call.precharge > 0 ? staircase_rows<BFloat, true>(call, item, pass)
                       : staircase_rows<BFloat, false>(call, item, pass);
  else
    call.precharge > 0 ? staircase_rows<float, true>(call, item, pass)
                       : staircase_rows<float, false>(call, item, pass);
}

}  // namespace

Count staircase_items(const StaircaseCall& call) { return (call.rows + kRowsOfItem - 1) / kRowsOfItem; }
void staircase_forward(const StaircaseCall& call, Count item) { staircase_item(call, item, Pass::forward); }
void staircase_backward(const StaircaseCall& call, Count item) { staircase_item(call, item, Pass::backward); }
void spikes_forward(const StaircaseCall& call, Count item) { staircase_item(call, item, Pass::spikes); }
void spikes_backward(const StaircaseCall& call, Count item) { staircase_item(call, item, Pass::spikes_backward); }

}  // namespace mar::MAR_VARIANT
