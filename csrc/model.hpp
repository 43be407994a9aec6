// A packed MAR model: one token through all layers, or many, without Python in between.
// Does: hold pointers into packed arrays, share every layer's work among the pool's threads, count what was read.
// Does not: own weights, sample, tokenise.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "linear.hpp"
#include "pool.hpp"

namespace mar {

struct Layer {
  Site in_proj, out_proj, gate_up, down_proj;  // gate_up: slices of gate and up in turn
  const float *mixer_norm, *ffn_norm;          // hidden
  const float* decay_weight;                   // heads x hidden, for the codes or values of in_proj
  const float* decay_bias;                     // heads
  const float *conv_weight, *conv_bias;        // taps x channels; channels
  const float *gate_bias, *skip;               // inner; heads
};

struct Shape {
  int vocab, hidden, ffn, layers, heads, width, size, taps;
  float eps;
  bool gain, unit;
  int window;          // tokens that attention beside the scan looks back at; 0: none
  double rotary_base;  // of its positions
  int inner() const { return heads * width; }
  int channels() const { return inner() + 2 * heads * size; }
};

// What a sequence has left behind: per layer the convolution's last inputs, the heads' states and their windows.
struct State {
  std::vector<float> conv;  // layers x taps - 1 x channels
  std::vector<float> ssm;   // layers x heads x N x P
  std::vector<float> window;  // layers x heads x keys and values of `Window`
  std::int64_t tokens = 0;
};

constexpr int kSites = 4;

struct Counts {
  std::int64_t spikes = 0;   // sum of |code|
  std::int64_t nonzero = 0;  // codes that ask for their row
  std::int64_t rows = 0;     // rows read, those that fill up a quad included
  std::int64_t bytes = 0;    // of weights, in those rows
};

class Model {
 public:
  Shape shape{};
  std::vector<Layer> layers;
  const float* norm = nullptr;
  Linear head{};
  // A head in two steps: an int8 head beside the same in int4 and in rows of one word each (vocab x hidden); else empty.
  Stream rough{};
  const std::int8_t* words = nullptr;
  const std::uint8_t* embedding = nullptr;  // vocab x hidden in float, where the head is not tied; else null

  Model(const Kernels* kernels, int threads);
  ~Model();
  void finish();  // after the fields are set: allocate what a token needs, and time how linears are best read

  State new_state() const;
  std::size_t conv_floats() const;
  std::size_t ssm_floats() const;
  std::size_t window_floats() const { return shape.window ? one_window() * shape.heads * shape.layers : 0; }
  // Logits (outputs of the head, filled up) after one token. Throws std::out_of_range for an unknown token.
  // given: codes to use in place of the neurons' own; taken: where to write the neurons' own; each code_count() bytes,
  // layer by layer and site by site in their order, or null.
  // whole: all words by the head itself, where it has two steps.
  void step(State& state, std::int32_t token, float* logits, const std::int8_t* given = nullptr,
            std::int8_t* taken = nullptr, bool whole = false);
  std::size_t code_count() const;
  // Many: tokens of one sequence in order (`spans` = 1 state), or one token for each of several states.
  // logits: for the last token of each state, or for every token where `all`; of several tokens' by the head itself.
  void forward(const std::vector<State*>& states, const std::int32_t* tokens, std::int64_t count, bool all,
               float* logits);

  int threads() const { return pool_->size(); }
  // Share of codes not zero above which a site's linears are read whole; the head's last.
  std::array<double, kSites + 1> crossovers() const;
  std::vector<Counts> counts() const;  // layers x kSites
  void reset_counts();
  std::int64_t counted_tokens = 0;

 private:
  struct Thread;
  struct Wide;
  void embed(std::int32_t token, int begin, int end, float* to) const;
  void check(std::int32_t token) const;
  void step_thread(int thread, State& state, std::int32_t token, float* logits, const std::int8_t* given,
                   std::int8_t* taken, bool whole);
  void two_step_head(int thread, float* logits);
  void wide_block(const std::vector<State*>& states, const std::int32_t* tokens, int count, bool all, float* logits);
  void wide_site(int thread, int layer, int which, const Site& site, const float* values, int count, float* out);
  Head head_of(const Layer& layer, int index, float* conv, float* ssm) const;
  std::size_t one_window() const {
    return window_keys(shape.window, shape.size) + window_values(shape.window, shape.width);
  }
  Window window_of(State& state, int layer, int head) const;
  void turn(std::int64_t position, float* to) const;

  const Kernels* kernels_;
  std::shared_ptr<Pool> pool_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::unique_ptr<Wide> wide_;
  std::vector<double> rates_;  // of the rotary angles, N / 2
  std::vector<float> hidden_, projected_, mixed_, product_, rough_;
};

}  // namespace mar
