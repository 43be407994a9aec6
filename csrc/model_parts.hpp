// What model.cpp (one token) and prefill.cpp (many) share: the memory of threads and blocks, and small conversions.
#pragma once

#include <cmath>
#include <vector>

#include "model.hpp"

namespace mar {

// What one thread needs for one token.
struct Model::Thread {
  Lines<float> hidden, normed, local, scratch, turns, partial_out, partial_down;
  Lines<std::int8_t> codes;        // of the head's first step
  std::vector<std::int32_t> sums;  // of the codes of each group
  float best = 0;                  // logit among its own words
  Listing listing;
  std::vector<Counts> counts;
};

// What a block of many tokens needs; threads share it.
struct Model::Wide {
  Lines<float> hidden, normed, projected, mixed, gate_up, product, out, decay, turns, token_scales, values;
  Lines<std::int8_t> codes;
  Lines<std::int32_t> sums;
  std::vector<Lines<std::uint8_t>> scratch;
  std::vector<Lines<float>> head_scratch;
};

inline float log_decay_of(float logit) {
  // -softplus
  return logit > 20.0f ? -logit : -std::log1p(std::exp(logit));
}

}  // namespace mar
