// The engine's inner loops, one table an instruction set.
// Does: name them and say what they compute. Does not: choose (isa.cpp), share work among threads (model.cpp).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace mar {

// Outputs come in slices of 64: of one row of weights, a slice is one cache line in int8.
constexpr int kSlice = 64;
// Rows go four at a time, so that one instruction multiplies and adds four bytes.
constexpr int kQuad = 4;
// Inputs that share a scale in int4.
constexpr int kGroup = 64;

// A piece of packed weights: `slices` slices of every input's row, rows `stride` bytes apart. In int4 a cache line holds
// two slices, the even one in its low nibbles: pieces start at an even slice and have an even number of them.
struct Block {
  const std::uint8_t* rows;
  std::size_t stride;
  int slices;
};

// Where output j of two slices, 0 to 127, has its scale in int4: as four interleaved rows leave outputs in registers, and
// of every register's place the first slice's beside the second's.
constexpr int scale_place(int j) {
  const int column = j % kSlice;
  return 2 * (column / 4 % 4 * 16 + column / 16 * 4 + column % 4) + j / kSlice;
}

// The rows that are asked for, in ascending order: input index[r] times value[r]. In integer precisions codes[r] is the
// value, in [-127, 127], and `count` is a multiple of kQuad (filled up with code 0). A null index means rows 0, 1, ...
// count - 1.
struct Rows {
  const std::int32_t* index;
  const std::int8_t* codes;
  const float* values;
  int count;
};

// How an int4 list falls into groups of inputs that share scales: `ends` in the list, ascending, multiples of kQuad, none of
// them empty, the last one the list's; sums of the codes of each; bf16 scales of the block's outputs by `scale_place`,
// `scale_stride` apart from group to group.
struct Groups {
  const int* ends;
  const std::int32_t* sums;
  const std::uint16_t* scales;
  std::size_t scale_stride;
};

// Weights in int4 for reading them whole, in the order of the multiplying instruction: of each two slices, the first half of
// their outputs and then the second; of a half, for every kQuad inputs two lines with the outputs of the one slice in low
// and of the other in high nibbles, an output's inputs side by side. Scales: bf16, of each two slices [group][output].
struct Stream {
  const std::uint8_t* weights;
  const std::uint16_t* scales;
  int quads;  // of inputs
  int pairs;  // of slices
  int groups() const { return (quads * kQuad + kGroup - 1) / kGroup; }
  std::size_t weight_bytes() const { return static_cast<std::size_t>(pairs) * quads * kQuad * kSlice; }
  std::size_t scale_bytes() const { return static_cast<std::size_t>(pairs) * groups() * 4 * kSlice; }
};

// A piece of it: pairs of slices, and groups of inputs.
struct Piece {
  int pair, pairs, group, groups;
};

struct Encoder {
  int low, high;    // codes are clamped to these: -T or 0, and T
  float precharge;  // p: the part of V that a membrane starts with
};

// One head of one layer: where its parameters, inputs, outputs and state lie. P is the head's width, N the state's.
struct Head {
  int width, size, taps;       // P, N, K
  int channels;                // of the convolution: x, B and C of all heads
  int x, b, c;                 // the head's first channel of each
  bool gain, unit;             // scale x by 1 - decay; B and C of unit length, C times sqrt(N)
  float skip;                  // D
  const float* conv_weight;    // K x channels, the current token's tap last
  const float* conv_bias;      // channels
  const float* gate_bias;      // P
  float* conv_state;           // K - 1 x channels, the newest token last
  float* state;                // N x P
};

// What a head's attention over the last `tokens` tokens and the first one needs beside its Head.
struct Window {
  int tokens;     // the last so many, the current one included
  // In fp32 whatever the weights' precision: a rounded key flips the codes of all that follows (docs/lab-log.md).
  float* keys;    // rows of N: B, turned, of the last ones, their number filled up to 16; then of the first one
  float* values;  // rows of P: x of the last ones; then of the first one
};
// Rows are filled up to 16 numbers, and hold zeros where there is nothing.
inline std::size_t filled16(int n) { return static_cast<std::size_t>(n + 15) / 16 * 16; }
inline std::size_t window_keys(int tokens, int size) { return (filled16(tokens) + 1) * filled16(size); }
inline std::size_t window_values(int tokens, int width) { return (tokens + std::size_t{1}) * filled16(width); }

struct Kernels {
  // Slices of one panel of weights, at most: how long a piece of a row is best.
  int panel;

  // y = x / sqrt(mean(x^2) + eps) * weight.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
  // codes = clamp(trunc((x + p V sign(x)) / V)).
  void (*encode)(const float* x, const float* threshold, int n, Encoder encoder, std::int8_t* codes);
  // codes = round(x / scale), scale = max |x| / 127; returns the scale. Zeros for x = 0.
  float (*quantise)(const float* x, int n, std::int8_t* codes);
  // The places [first, last) of codes that are not zero to `index`, these codes to `listed`; returns how many. Up to 7
  // beyond them are written.
  int (*list_nonzero)(const std::int8_t* codes, int first, int last, std::int32_t* index, std::int8_t* listed);
  // Sum of x y.
  float (*dot)(const float* x, const float* y, int n);
  float (*dot_i8)(const float* x, const std::int8_t* y, int n);
  // y += x.
  void (*add)(const float* x, int n, float* y);
  // y = silu(gate) * up.
  void (*gated)(const float* gate, const float* up, int n, float* y);

  // acc (slices x 64) = sum over rows of value times weights. In int8 the weights are taken as they are stored, off by
  // 128: the caller takes away that much times the sum of codes.
  void (*rows_f32)(Block block, Rows rows, float* acc);
  void (*rows_bf16)(Block block, Rows rows, float* acc);
  void (*rows_i8)(Block block, Rows rows, std::int32_t* acc);
  void (*rows_i4)(Block block, Rows rows, Groups groups, float* out);

  // out = a piece's weights times its groups' codes, kGroup of each, zeros where there are no inputs; sums: of each group's
  // codes.
  void (*stream_i4)(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out);

  // out (tokens x slices * 64, `out_stride` floats apart) = inputs x weights for many tokens.
  // f32 and bf16: values (tokens x inputs). scratch holds what scratch_bytes(inputs) says.
  void (*block_f32)(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
                    std::uint8_t* scratch);
  void (*block_bf16)(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
                     std::uint8_t* scratch);
  // i8: out = scales[j] * token_scales[m] * (sum code * weight - 128 * sums[m]); inputs a multiple of kQuad.
  void (*block_i8)(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
                   const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch);
  // i4: scales (bf16) are `scale_stride` apart from group to group; sums is tokens x groups.
  void (*block_i4)(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride,
                   const std::int8_t* codes, const std::int32_t* sums, const float* token_scales, int tokens,
                   float* out, std::size_t out_stride, std::uint8_t* scratch);

  // One token through one head: convolution, state, skip and gate. xbc: all channels of this token; gate: the head's P
  // gate values; y: P outputs. Updates both states.
  void (*head_step)(const Head& head, const float* xbc, const float* gate, float log_decay, float* y, float* scratch);
  // The same for `tokens` tokens: rows of xbc, gate and y are the given numbers of floats apart, log_decay too.
  void (*head_scan)(const Head& head, const float* xbc, std::size_t xbc_stride, const float* gate,
                    std::size_t gate_stride, const float* log_decay, std::size_t decay_stride, int tokens, float* y,
                    std::size_t y_stride, float* scratch);
  // y += softmax(C . B of what is looked at) times x of the same, before the convolution, gated; for tokens from
  // `position` of their sequence on; N is even.
  // turns (tokens x N): for each pair of channels i and i + N / 2 the angle's cosine at i, its sine at i + N / 2.
  void (*head_window)(const Head& head, const Window& window, const float* xbc, std::size_t xbc_stride,
                      const float* gate, std::size_t gate_stride, const float* turns, std::int64_t position,
                      int tokens, float* y, std::size_t y_stride, float* scratch);
};

// Tokens of one chunk of head_scan.
constexpr int kChunk = 64;

// Floats of scratch that head_scan needs (head_step needs less) and head_window after it; and bytes that blocks need.
inline std::size_t head_scratch(int width, int size, int window) {
  const std::size_t p = filled16(width), n = filled16(size);
  return std::max(kChunk * (3 * p + 4 * n + kChunk + 8) + 16 * n, filled16(window) + n + 2 * p);
}
inline std::size_t block_scratch(int inputs) { return (static_cast<std::size_t>(inputs) + 64) * kSlice * 4; }

}  // namespace mar
