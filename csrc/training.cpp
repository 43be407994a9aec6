// The table of the training kernels, compiled once per instruction set (MAR_VARIANT). Their code is in scan.cpp,
// convolution.cpp, staircase.cpp and int8.cpp.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {

extern const Training training;
const Training training = {kChunk,       scan_scratch,  scan_forward,    scan_backward,     conv_items,
                           conv_forward, conv_backward, staircase_items, staircase_forward, staircase_backward,
                           spikes_forward, spikes_backward, int8_row_items, int8_rows, int8_maxima,
                           int8_weights, int8_turned, int8_product_items, int8_product};

}  // namespace mar::MAR_VARIANT
