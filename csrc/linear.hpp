// One linear on one token: which rows of weights its input asks for, and their sum.
// Does: list rows, multiply them. Does not: start threads (callers give each thread its slices or its rows).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace mar {

enum class Precision { f32, bf16, i8, i4 };

// Weights of one linear, input-major: panels of `panel` slices, each holding that piece of all inputs' rows.
struct Linear {
  Precision precision;
  int inputs;                 // logical
  int rows;                   // stored: inputs, in integers filled up to a multiple of kQuad
  int slices;                 // outputs / 64, filled up
  int panel;                  // slices of a full panel
  const std::uint8_t* weights;
  const void* scales;         // i8: float a output; i4: bf16 [group][output], of two slices by scale_place; else null
  const float* bias;          // slices * 64, or null
  Stream stream;              // i4: the same weights once more, for inputs that ask for most of them; else empty
  double whole_above = 1;     // share of codes not zero above which the stream is read

  int outputs() const { return slices * kSlice; }
  int groups() const { return precision == Precision::i4 ? (inputs + kGroup - 1) / kGroup : 1; }
  bool integer() const { return precision == Precision::i8 || precision == Precision::i4; }
  std::size_t slice_bytes() const;
  std::size_t weight_bytes() const { return static_cast<std::size_t>(rows) * slices * slice_bytes(); }
  std::size_t scale_bytes() const;
  Block block(int slice, int count) const;  // within one panel
  std::size_t scale_index(int group, int output) const {  // int4
    constexpr int two = 2 * kSlice;
    return static_cast<std::size_t>(group) * outputs() + output / two * two + scale_place(output % two);
  }
};

// Where a neuron may sit. Without thresholds the linear sees dense values.
struct Site {
  const float* threshold = nullptr;  // inputs: V
  // inputs, in integers: codes are multiplied by these and rows stored divided by them, so that channels of large V do
  // not set the scale for all others; null means ones.
  const std::int8_t* multiplier = nullptr;
  Encoder encoder{};
  Linear linear{};
};

// Loops over codes, apart and with sums of their own: bytes may alias anything, and what is stored or read again in each
// turn of a loop keeps compilers from using vectors.
inline std::int32_t sum_codes(const std::int8_t* codes, int count) {
  std::int32_t total = 0;
  for (int i = 0; i < count; ++i) total += codes[i];
  return total;
}
inline std::int32_t count_spikes(const std::int8_t* codes, int count) {
  std::int32_t spikes = 0;
  for (int i = 0; i < count; ++i) spikes += std::abs(codes[i]);
  return spikes;
}
inline std::int32_t count_nonzero(const std::int8_t* codes, int count) {
  std::int32_t nonzero = 0;
  for (int i = 0; i < count; ++i) nonzero += codes[i] != 0;
  return nonzero;
}
inline void multiply_codes(std::int8_t* __restrict codes, const std::int8_t* __restrict by, int count) {
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::int8_t>(codes[i] * by[i]);
}

// Slices of one thread; in int4 they come in twos.
Range share_slices(const Linear& linear, int part, int parts);

// Memory that starts at a cache line.
template <typename T>
class Lines {
 public:
  void resize(std::size_t count) {
    data_.reset(static_cast<T*>(::operator new(sizeof(T) * count + 64, std::align_val_t(64))));
    std::memset(data_.get(), 0, sizeof(T) * count + 64);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T& operator[](std::size_t i) { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// The rows of one site's input that ask for weights. One of these belongs to one thread.
class Listing {
 public:
  void reserve(int inputs, int outputs);  // the most of any linear

  // Rows [begin, end) of x: encoded by the site's neuron, else quantised (over the whole of x) or as they are.
  // given: codes to use instead of the neuron's; taken: where to write the neuron's; both over all inputs, or null.
  void list(const Kernels& kernels, const Site& site, const float* x, int begin, int end, const std::int8_t* given,
            std::int8_t* taken);
  // Rows whose codes are already known, so many of them not zero; `all`: zeros too.
  void list_codes(const Kernels& kernels, const Linear& linear, const std::int8_t* codes, int begin, int end,
                  std::int64_t nonzero, bool all);

  // Slices [begin, end) of the listed rows' product into to[0 ...]. plain: int8 sums unscaled, as 32-bit integers.
  void multiply(const Kernels& kernels, const Linear& linear, int begin, int end, float* to, bool plain);

  const std::int8_t* codes() const { return codes_.data(); }  // of all inputs in the range, multiplied
  float token_scale() const { return token_scale_; }
  std::int64_t spikes() const { return spikes_; }    // sum of |code| before multipliers; 0 without a neuron
  std::int64_t nonzero() const { return nonzero_; }
  std::size_t rows() const { return static_cast<std::size_t>(rows_.count); }

 private:
  Lines<std::int32_t> index_, sums_;
  Lines<std::int8_t> codes_, listed_;  // the list; or, where the stream is read, codes of whole groups
  Lines<float> values_;
  std::vector<int> group_ends_;
  std::vector<std::int32_t> group_sums_;
  Rows rows_{};
  Piece piece_{};  // of the stream that is read, where its groups are not 0
  float token_scale_ = 1.0f;
  std::int64_t spikes_ = 0, nonzero_ = 0;
};

}  // namespace mar
