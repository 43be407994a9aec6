// From which share of codes that are not zero it pays to read a linear whole.
#pragma once

#include <vector>

#include "linear.hpp"
#include "pool.hpp"

namespace mar {

// A linear of a model, one of its kind; threads share its rows, or else its outputs.
struct Timed {
  Linear* linear;
  int kind;
  bool by_rows;
};

// Sets `whole_above` of the linears, the same for all of a kind, to the share, 0 to 1, above which they are read faster
// whole than by rows, on this machine and so many threads. Takes tenths of a second. Leaves what cannot be read whole.
void set_crossovers(const Kernels& kernels, Pool& pool, const std::vector<Timed>& linears);

}  // namespace mar
