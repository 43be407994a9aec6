// The staircase V clamp(round(I / V)) of a neuron at tau = 1 (ATMN), forward and backward: an item is a block of rows.
// Compiled once per instruction set. Does: give the very codes of the closed form in mar.neurons. Does not: add up the
// blocks' gradients of V.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {
namespace {

constexpr Count kRowsOfItem = 64;
constexpr Count kAhead = 2048;  // bytes, that memory is asked for before they are read

// sum_t s_t of a quotient I / V, with the quotient's sign even where it is zero, and NaN for NaN.
template <bool Round>
Floats staircase(Floats v, Floats low, Floats high) {
  const Floats inside = v < low ? low : v > high ? high : v;
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, halves to even
  Floats code = Round ? (inside + magic) - magic
                      : __builtin_convertvector(__builtin_convertvector(inside, Ints), Floats);
  code = (Floats)((Words)code | ((Words)inside & 0x80000000u));
  return v == v ? code : v;
}

template <class T, bool Round>
struct Staircase {
  const StaircaseCall& call;
  const Count n = call.channels;
  const float* threshold = input<float>(call.threshold);
  const float* divisor = input<float>(call.divisor);
  const Floats low = splat(call.low), high = splat(call.high);
  const Floats pass_low = splat(call.pass_low), pass_high = splat(call.pass_high);

  // Calls part(channel, lanes) over a row; lanes is a constant but for the last few channels.
  template <class Part>
  void over_channels(Part part) const {
    Count j = 0;
    for (; j + W <= n; j += W) part(j, Count{W});
    if (j < n) part(j, n - j);
  }

  void forward(Count i) const {
    const T* current = input<T>(call.current, i * n);
    T* out = output<T>(call.output, i * n);
    over_channels([&](Count j, Count lanes) __attribute__((always_inline)) {
      fetch(current + j);
      const Floats v = load(current + j, lanes) / load(divisor + j, lanes);
      store(out + j, staircase<Round>(v, low, high) * load(threshold + j, lanes), lanes);
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
      const Floats v = drive / load(threshold + j, lanes);
      const Floats passed = (v > pass_low) & (v < pass_high) ? gradient : Floats{};
      if (out) store(out + j, passed, lanes);
      if (!sums) return;
      const Floats code = staircase<Round>(Round ? drive / load(divisor + j, lanes) : v, low, high);
      store(sums + j, load(sums + j, lanes) + (code * gradient - passed * v), lanes);
    });
  }

  static void fetch(const T* from) { __builtin_prefetch(from + kAhead / sizeof(T), 0, 2); }
};

template <class T, bool Round>
void staircase_rows(const StaircaseCall& call, Count item, bool backward) {
  const Staircase<T, Round> of{call};
  const Count begin = item * kRowsOfItem;
  const Count end = begin + kRowsOfItem < call.rows ? begin + kRowsOfItem : call.rows;
  if (!backward) {
    for (Count i = begin; i < end; ++i) of.forward(i);
    return;
  }
  float* sums = call.dthreshold_parts ? output<float>(call.dthreshold_parts, item * call.channels) : nullptr;
  if (sums)
    for (Count j = 0; j < call.channels; ++j) sums[j] = 0;
  for (Count i = begin; i < end; ++i) of.backward(i, sums);
}

void staircase_item(const StaircaseCall& call, Count item, bool backward) {
  if (call.bf16)
    call.precharge ? staircase_rows<BFloat, true>(call, item, backward)
                   : staircase_rows<BFloat, false>(call, item, backward);
  else
    call.precharge ? staircase_rows<float, true>(call, item, backward)
                   : staircase_rows<float, false>(call, item, backward);
}

}  // namespace

Count staircase_items(const StaircaseCall& call) { return (call.rows + kRowsOfItem - 1) / kRowsOfItem; }
void staircase_forward(const StaircaseCall& call, Count item) { staircase_item(call, item, false); }
void staircase_backward(const StaircaseCall& call, Count item) { staircase_item(call, item, true); }

}  // namespace mar::MAR_VARIANT
