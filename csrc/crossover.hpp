// From which share of codes that are not zero it pays to read a linear whole.
#pragma once

#include <vector>

#include "linear.hpp"
#include "pool.hpp"

namespace mar {

// The share, 0 to 1, above which the linears are read faster whole than by rows, on this machine and so many threads.
// Takes tens of milliseconds. 1 where none of them can be read whole.
double crossover(const Kernels& kernels, Pool& pool, const std::vector<const Linear*>& linears);

}  // namespace mar
