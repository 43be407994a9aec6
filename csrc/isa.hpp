// Which instruction set the kernels run on: found at run time, never assumed.
// Does: detect, choose, refuse. Does not: hold kernels.
#pragma once

#include <string>
#include <vector>

namespace mar {

struct Kernels;   // kernels.hpp: what the engine calls
struct Training;  // training.hpp: what the training ops call

struct Variant {
  std::string name;      // generic, avx2, avxvnni, avx512 or amx
  std::string reason;    // why it was chosen
  std::vector<std::string> features;  // what of the CPU was found, by its usual names
  const Kernels* kernels;
  const Training* training;
};

// Of what variants need, what this CPU has, by its usual names.
std::vector<std::string> cpu_features();

// The best variant that a CPU with these features runs, or the one that `forced` names (empty: none is forced).
// Throws std::invalid_argument for an unknown name or one that needs more.
Variant choose_variant(const std::string& forced, const std::vector<std::string>& features);

}  // namespace mar
