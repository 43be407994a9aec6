// What the C++ tests share: a check that names its place, random numbers, and arrays without a byte to spare.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../isa.hpp"
#include "../linear.hpp"

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);        \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

#define CHECK_THROWS(expression)   \
  do {                             \
    bool thrown = false;           \
    try {                          \
      expression;                  \
    } catch (const std::exception&) { \
      thrown = true;               \
    }                              \
    CHECK(thrown);                 \
  } while (false)

namespace tests {

inline std::mt19937& generator() {
  static std::mt19937 generator(1);
  return generator;
}

inline int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator()); }
inline float normal(float scale = 1.0f) { return std::normal_distribution<float>(0.0f, scale)(generator()); }

inline std::vector<float> normals(std::size_t count, float scale = 1.0f) {
  std::vector<float> values(count);
  for (auto& value : values) value = normal(scale);
  return values;
}

// Codes in [low, high], about `share` of them not zero.
inline std::vector<std::int8_t> codes(int count, int low, int high, double share) {
  std::vector<std::int8_t> values(count);
  for (auto& value : values)
    value = std::bernoulli_distribution(share)(generator()) ? static_cast<std::int8_t>(integer(low, high)) : 0;
  return values;
}

inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}
inline float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Random weights of one linear, in arrays that end where they must, and what each stands for.
struct Weights {
  std::vector<std::uint8_t> bytes, lines;
  std::vector<float> scales8, bias;
  std::vector<std::uint16_t> scales4, lines_scales;
  mar::Linear linear{};

  Weights() = default;
  Weights(mar::Precision precision, int inputs, int outputs, bool biased = false, int panel = 5) {
    linear.precision = precision;
    linear.inputs = inputs;
    const int unit = precision == mar::Precision::i4 ? 2 : 1;
    linear.rows = linear.integer() ? (inputs + mar::kQuad - 1) / mar::kQuad * mar::kQuad : inputs;
    linear.slices = (outputs + unit * mar::kSlice - 1) / (unit * mar::kSlice) * unit;
    const int panels = (linear.slices + panel - 1) / panel;
    linear.panel = (linear.slices + panels * unit - 1) / (panels * unit) * unit;
    bytes.resize(linear.weight_bytes());
    if (linear.integer()) {
      for (auto& byte : bytes) byte = static_cast<std::uint8_t>(integer(0, 255));
    } else {
      const std::size_t size = precision == mar::Precision::f32 ? 4 : 2;
      for (std::size_t at = 0; at < bytes.size(); at += size) {
        const float value = normal(0.3f);
        const std::uint16_t half = to_bf16(value);
        std::memcpy(bytes.data() + at, size == 4 ? static_cast<const void*>(&value) : &half, size);
      }
    }
    linear.weights = bytes.data();
    if (precision == mar::Precision::i8) {
      scales8 = normals(linear.outputs(), 0.005f);
      linear.scales = scales8.data();
    } else if (precision == mar::Precision::i4) {
      for (int i = 0; i < linear.groups() * linear.outputs(); ++i) scales4.push_back(to_bf16(normal(0.05f)));
      linear.scales = scales4.data();
      add_stream();
    }
    if (biased) {
      bias = normals(linear.outputs(), 0.2f);
      linear.bias = bias.data();
    }
  }
  Weights(const Weights&) = delete;
  Weights(Weights&&) = default;
  Weights& operator=(Weights&&) = default;

  // The same int4 weights in the order of a stream.
  void add_stream() {
    mar::Stream& stream = linear.stream;
    stream = {nullptr, nullptr, linear.rows / mar::kQuad, linear.slices / 2};
    lines.resize(stream.weight_bytes());
    lines_scales.resize(stream.scale_bytes() / 2);
    for (int pair = 0; pair < stream.pairs; ++pair)
      for (int input = 0; input < linear.rows; ++input)
        for (int column = 0; column < mar::kSlice; ++column) {
          const mar::Block block = linear.block(2 * pair, 2);
          constexpr int half = mar::kSlice / 2;
          const std::size_t quad = (2 * static_cast<std::size_t>(pair) + column / half) * stream.quads + input / mar::kQuad;
          lines[(quad * half + column % half) * mar::kQuad + input % mar::kQuad] = block.rows[block.stride * input + column];
        }
    for (int pair = 0; pair < stream.pairs; ++pair)
      for (int group = 0; group < linear.groups(); ++group)
        for (int j = 0; j < 2 * mar::kSlice; ++j)
          lines_scales[(static_cast<std::size_t>(pair) * linear.groups() + group) * 2 * mar::kSlice + j] =
              scales4[linear.scale_index(group, pair * 2 * mar::kSlice + j)];
    stream.weights = lines.data();
    stream.scales = lines_scales.data();
  }

  double at(int input, int output) const {
    const int slice = output / mar::kSlice, column = output % mar::kSlice;
    const bool pairs = linear.precision == mar::Precision::i4;
    const mar::Block block = linear.block(pairs ? slice / 2 * 2 : slice, 1);
    const std::uint8_t* row = block.rows + block.stride * input;
    switch (linear.precision) {
      case mar::Precision::f32: {
        float value;
        std::memcpy(&value, row + 4 * column, 4);
        return value;
      }
      case mar::Precision::bf16: {
        std::uint16_t value;
        std::memcpy(&value, row + 2 * column, 2);
        return from_bf16(value);
      }
      case mar::Precision::i8: return (row[column] - 128) * static_cast<double>(scales8[output]);
      default: {
        const int nibble = slice % 2 ? row[column] >> 4 : row[column] & 15;
        return (nibble - 8) * static_cast<double>(from_bf16(scales4[linear.scale_index(input / mar::kGroup, output)]));
      }
    }
  }
};

inline bool near(double found, double wanted, double scale, double relative = 1e-5) {
  return std::fabs(found - wanted) <= relative * (std::fabs(wanted) + scale) + 1e-30;
}

}  // namespace tests

void test_kernels(const mar::Variant& variant);
void test_model(const mar::Variant& variant);
void test_training(const mar::Variant& variant);
void test_pool();
void test_isa();
