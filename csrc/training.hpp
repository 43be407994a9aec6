// What the training ops call: kernels over one work item each, and the calls that describe their work.
// Does: say what the pointers mean. Does not: check them (mar.kernels.native does), allocate, or start threads.
#pragma once

#include <cstdint>

namespace mar {

using Address = std::uintptr_t;  // of a tensor's first element, 0 where there is none

// A tensor of rows whose last dimension is contiguous; strides count elements.
struct View {
  Address data = 0;
  std::int64_t batch = 0, token = 0, head = 0;
};

// y_t = S_t C_t with S_t = decay_t S_{t-1} + gain_t x_t B_t^T per head; then, where asked for, + D x_t and times
// silu(z + z_bias). Activations are all bf16 or all fp32; parameters, decay and states are fp32.
struct ScanCall {
  std::int64_t batch = 0, length = 0, heads = 0, width = 0, size = 0;  // width P of x and y, size N of B and C
  bool bf16 = false;
  bool gain = false;           // 1 - decay, else 1
  bool unit = false;           // B scaled to length 1 and C to sqrt(N)
  View x, b, c;
  Address log_decay = 0;       // (batch, length, heads)
  Address document_ids = 0;    // int64 (batch, length) or none
  Address first = 0;           // (batch, heads, width, size) or none
  Address skip = 0;            // D (heads) or none
  View z;                      // or none
  Address z_bias = 0;          // (heads * width); with z
  View out;
  Address kept = 0;            // y before the gate, for the backward pass: (batch, length, heads * width), with z
  Address states = 0;          // before each chunk: (batch, heads, chunks, width, size), or none
  Address last = 0;            // (batch, heads, width, size)
  // Backward. Gradients with `parts` are sums per row of the batch, which the caller adds up.
  View dout;
  Address dlast = 0;           // or none
  View dx, db, dc, dz;
  Address dlog_decay = 0;      // (batch, length, heads)
  Address dfirst = 0;          // or none
  Address dskip_parts = 0;     // (batch, heads)
  Address dz_bias_parts = 0;   // (batch, heads * width)
};

// y_t = bias + sum_j weight[taps - 1 - j] x_{t-j} over the tokens of t's document; `past` goes before the first one.
struct ConvCall {
  std::int64_t batch = 0, length = 0, channels = 0, taps = 0;
  bool bf16 = false;
  View x, y;
  Address past = 0;            // (batch, taps - 1, channels), of x's dtype, or none
  Address weight = 0;          // fp32 (taps, channels)
  Address bias = 0;            // fp32 (channels)
  Address document_ids = 0;    // int64 (batch, length) or none
  View dy, dx;
  Address dpast = 0;           // fp32 (batch, taps - 1, channels)
  Address dweight_parts = 0;   // fp32 (batch, taps, channels)
  Address dbias_parts = 0;     // fp32 (batch, channels)
};

// V clamp(trunc(I / V + p sign(I))) of mar.neurons, p being `precharge`.
struct StaircaseCall {
  std::int64_t rows = 0, channels = 0;
  bool bf16 = false;
  float precharge = 0;
  float low = 0, high = 0;             // the outermost codes
  float pass_low = 0, pass_high = 0;   // gradients pass strictly between these values of I / V
  Address current = 0, output = 0;     // (rows, channels)
  Address threshold = 0;               // fp32 (channels)
  Address doutput = 0, dcurrent = 0;   // dcurrent or none
  Address dthreshold_parts = 0;        // fp32 (items, channels) or none
  Address spikes_parts = 0;            // of spikes_forward, sum_t |s_t| of all its elements: fp64 (items)
  float share = 0;                     // of spikes_backward: the gradient of one element's spikes
};

// int8 products: out = scales[m] * column_scales[n] * sum_k codes[m][k] * weights[k][n], all sums exact. A panel holds 32
// columns of the inner dimension's rows, four rows' bytes of a column side by side; weights in panels are off by 128.
// Numbers of columns, and of inputs and outputs, are multiples of 32; inner dimensions of 4.

// codes = round(x * by / scale) of each row, scale = max |x * by| / 127 or 1, and NaN where something is not finite. For
// int8_maxima: max |x| of each column.
struct Int8Rows {
  std::int64_t rows = 0, columns = 0, stride = 0;
  bool whole = false;          // x * by are whole numbers, at most 127: scale 1
  Address input = 0;           // fp32 (rows, columns), rows `stride` apart
  Address by = 0;              // fp32 (columns); not for int8_maxima
  Address codes = 0;           // int8 (rows, columns)
  Address scales = 0;          // fp32 (rows); of int8_maxima the result, fp32 (columns)
  Address sums = 0;            // int32 (rows): of a row's codes
};

// Weights times `by`, rounded with a scale for each output, in panels for x W^T.
struct Int8Weights {
  std::int64_t outputs = 0, inputs = 0, stride = 0;
  Address weight = 0;          // fp32 (outputs, inputs), rows `stride` apart
  Address by = 0;              // fp32 (inputs)
  Address scales = 0;          // fp32 (outputs)
  Address panels = 0;          // uint8: panels of outputs over inputs
  Address scratch = 0;         // int8 (outputs / 32, inputs)
};

// Rows in panels: of codes, off by 128; else of x * by (by of each row), rounded with a scale for each column.
struct Int8Turned {
  std::int64_t rows = 0, columns = 0, stride = 0;
  bool weights = false;        // rounded ones are off by 128, too
  Address codes = 0;           // int8 (rows, columns), or none
  Address input = 0;           // fp32 (rows, columns)
  Address by = 0;              // fp32 (rows)
  Address scales = 0;          // fp32 (columns)
  Address sums = 0;            // int32 (columns)
  Address panels = 0;          // 8 bits: panels of columns over rows
};

struct Int8Product {
  std::int64_t rows = 0, columns = 0, inner = 0, stride = 0;
  bool turned = false;         // codes lie in panels of 32 rows
  Address codes = 0;           // int8 (rows, inner)
  Address scales = 0;          // fp32 (rows)
  Address sums = 0;            // int32 (rows)
  Address panels = 0;          // uint8, of columns over inner
  Address column_scales = 0;   // fp32 (columns)
  Address out = 0;             // fp32 (rows, columns), rows `stride` apart
};

// One item is done by one thread; items of a call are independent of each other.
struct Training {
  std::int64_t chunk;                                    // tokens between two kept states
  std::int64_t (*scan_scratch)(const ScanCall&);         // floats, 64-byte aligned, of one thread
  void (*scan_forward)(const ScanCall&, std::int64_t item, float* scratch);   // items: batch * heads
  void (*scan_backward)(const ScanCall&, std::int64_t item, float* scratch);
  std::int64_t (*conv_items)(const ConvCall&);
  void (*conv_forward)(const ConvCall&, std::int64_t item);
  void (*conv_backward)(const ConvCall&, std::int64_t item);
  std::int64_t (*staircase_items)(const StaircaseCall&);
  void (*staircase_forward)(const StaircaseCall&, std::int64_t item);
  void (*staircase_backward)(const StaircaseCall&, std::int64_t item);
  void (*spikes_forward)(const StaircaseCall&, std::int64_t item);
  void (*spikes_backward)(const StaircaseCall&, std::int64_t item);
  std::int64_t (*int8_row_items)(const Int8Rows&);
  void (*int8_rows)(const Int8Rows&, std::int64_t item);
  void (*int8_maxima)(const Int8Rows&, std::int64_t item);      // items: columns / 32
  void (*int8_weights)(const Int8Weights&, std::int64_t item);  // items: outputs / 32
  void (*int8_turned)(const Int8Turned&, std::int64_t item);    // items: columns / 32
  std::int64_t (*int8_product_items)(const Int8Product&);
  void (*int8_product)(const Int8Product&, std::int64_t item);
};

}  // namespace mar
