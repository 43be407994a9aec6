// The table of the training kernels, compiled once per instruction set (MAR_VARIANT). Their code is in scan.cpp,
// convolution.cpp and staircase.cpp.
#include "training_kernels.hpp"

namespace mar::MAR_VARIANT {

extern const Training training;
const Training training = {kChunk,       scan_scratch,  scan_forward,    scan_backward,     conv_items,
                           conv_forward, conv_backward, staircase_items, staircase_forward, staircase_backward,
                           spikes_forward, spikes_backward};

}  // namespace mar::MAR_VARIANT
