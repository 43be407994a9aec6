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
};

}  // namespace mar
