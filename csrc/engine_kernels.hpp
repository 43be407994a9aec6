// Kernels of the engine that its table (kernels.cpp) takes from other files; kernels.hpp says what they compute.
// Included inside each variant only.
#pragma once

#include "kernels.hpp"

namespace mar::MAR_VARIANT {

// rows.cpp
void rows_f32(Block block, Rows rows, float* acc);
void rows_bf16(Block block, Rows rows, float* acc);
void rows_i8(Block block, Rows rows, std::int32_t* acc);
void rows_i4(Block block, Rows rows, Groups groups, float* out);

// stream.cpp
void stream_i4(Stream stream, Piece piece, const std::int8_t* codes, const std::int32_t* sums, float* out);

// blocks.cpp
void block_f32(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
               std::uint8_t* scratch);
void block_bf16(Block block, int inputs, const float* values, int tokens, float* out, std::size_t out_stride,
                std::uint8_t* scratch);
void block_i8(Block block, int inputs, const float* scales, const std::int8_t* codes, const std::int32_t* sums,
              const float* token_scales, int tokens, float* out, std::size_t out_stride, std::uint8_t* scratch);
void block_i4(Block block, int inputs, const std::uint16_t* scales, std::size_t scale_stride, const std::int8_t* codes,
              const std::int32_t* sums, const float* token_scales, int tokens, float* out, std::size_t out_stride,
              std::uint8_t* scratch);

// head.cpp
void head_step(const Head& head, const float* xbc, const float* gate, float log_decay, float* y, float* scratch);
void head_scan(const Head& head, const float* xbc, std::size_t xbc_stride, const float* gate, std::size_t gate_stride,
               const float* log_decay, std::size_t decay_stride, int tokens, float* y, std::size_t y_stride,
               float* scratch);

// window.cpp
void head_window(const Head& head, const Window& window, const float* xbc, std::size_t xbc_stride, const float* gate,
                 std::size_t gate_stride, const float* turns, std::int64_t position, int tokens, float* y,
                 std::size_t y_stride, float* scratch);

}  // namespace mar::MAR_VARIANT
