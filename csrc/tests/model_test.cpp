// Whole models of random packed weights: every way to read the same tokens gives the same, nothing is read out of bounds.
#include "../model.hpp"

#include <algorithm>
#include <stdexcept>

#include "check.hpp"

using namespace tests;
using mar::Precision;

namespace {

struct Sizes {
  int vocab, hidden, ffn, heads, width, size, taps;
  int window = 0;
};

// A model's arrays; a model points into them.
struct Arrays {
  struct Layer {
    Weights linears[4];
    std::vector<float> thresholds[4];
    std::vector<std::int8_t> multipliers[4];
    std::vector<float> mixer_norm, ffn_norm, decay_weight, decay_bias, conv_weight, conv_bias, gate_bias, skip;
  };
  mar::Shape shape{};
  std::vector<Layer> layers;
  std::vector<float> norm, embedding;
  std::vector<std::int8_t> words;  // of a head in two steps
  Weights head, rough;

  Arrays(const Sizes& s, Precision precision, Precision head_precision, bool spiking) {
    shape = {s.vocab, s.hidden, s.ffn, 2, s.heads, s.width, s.size, s.taps, 1e-5f, true, true, s.window, 100.0};
    const int inner = shape.inner(), channels = shape.channels();
    const int slices = (s.ffn + mar::kSlice - 1) / mar::kSlice;
    const int inputs[4] = {s.hidden, inner, s.hidden, s.ffn};
    const int outputs[4] = {channels + inner, s.hidden, 2 * slices * mar::kSlice, s.hidden};
    for (int index = 0; index < shape.layers; ++index) {
      Layer layer;
      for (int site = 0; site < 4; ++site) {
        layer.linears[site] = Weights(precision, inputs[site], outputs[site], spiking && site >= 2);
        if (!spiking || (index == 1 && site == 1)) continue;
        for (int i = 0; i < inputs[site]; ++i) {
          layer.thresholds[site].push_back(0.3f + 0.2f * std::fabs(normal()));
          layer.multipliers[site].push_back(static_cast<std::int8_t>(integer(1, 127 / steps(site))));
        }
      }
      layer.mixer_norm = normals(s.hidden), layer.ffn_norm = normals(s.hidden);
      layer.decay_weight = normals(static_cast<std::size_t>(s.heads) * s.hidden, 0.1f), layer.decay_bias = normals(s.heads);
      layer.conv_weight = normals(static_cast<std::size_t>(s.taps) * channels, 0.5f), layer.conv_bias = normals(channels, 0.1f);
      layer.gate_bias = normals(inner), layer.skip = normals(s.heads);
      layers.push_back(std::move(layer));
    }
    norm = normals(s.hidden);
    head = Weights(head_precision, s.hidden, s.vocab);
    if (spiking) embedding = normals(static_cast<std::size_t>(s.vocab) * s.hidden);
  }

  // The head in two steps: its weights word by word, and in int4 with the high halves of their codes.
  void in_two_steps() {
    rough = Weights(Precision::i4, shape.hidden, shape.vocab);
    for (int word = 0; word < rough.linear.outputs(); ++word)
      for (int i = 0; i < shape.hidden; ++i) {
        const double value = word < shape.vocab ? head.at(i, word) : 0;
        const float scale = word < shape.vocab ? head.scales8[word] : 1;
        const int code = static_cast<int>(std::lround(value / scale));
        if (word < shape.vocab) words.push_back(static_cast<std::int8_t>(code));
        const int half = std::clamp(static_cast<int>(std::lround(code / 16.0)), -8, 7) + 8;
        const mar::Block block = rough.linear.block(word / mar::kSlice / 2 * 2, 2);
        std::uint8_t& byte = rough.bytes[block.rows - rough.bytes.data() + block.stride * i + word % mar::kSlice];
        byte = static_cast<std::uint8_t>(word / mar::kSlice % 2 ? (byte & 15) | half << 4 : (byte & 240) | half);
        rough.scales4[rough.linear.scale_index(i / mar::kGroup, word)] = to_bf16(16 * scale);
      }
    rough.add_stream();
  }

  static int steps(int site) { return site == 3 ? 16 : site + 1; }

  void fill(mar::Model& model) const {
    model.shape = shape;
    for (const auto& from : layers) {
      mar::Layer layer{};
      mar::Site* sites[4] = {&layer.in_proj, &layer.out_proj, &layer.gate_up, &layer.down_proj};
      for (int site = 0; site < 4; ++site) {
        sites[site]->linear = from.linears[site].linear;
        if (from.thresholds[site].empty()) continue;
        sites[site]->threshold = from.thresholds[site].data();
        if (sites[site]->linear.integer()) sites[site]->multiplier = from.multipliers[site].data();
        sites[site]->encoder = {site == 1 ? 0 : -steps(site), steps(site), 0.25f * static_cast<float>(site)};
      }
      layer.mixer_norm = from.mixer_norm.data(), layer.ffn_norm = from.ffn_norm.data();
      layer.decay_weight = from.decay_weight.data(), layer.decay_bias = from.decay_bias.data();
      layer.conv_weight = from.conv_weight.data(), layer.conv_bias = from.conv_bias.data();
      layer.gate_bias = from.gate_bias.data(), layer.skip = from.skip.data();
      model.layers.push_back(layer);
    }
    model.norm = norm.data();
    model.head = head.linear;
    if (!words.empty()) model.rough = rough.linear.stream, model.words = words.data();
    if (!embedding.empty()) model.embedding = reinterpret_cast<const std::uint8_t*>(embedding.data());
    model.finish();
  }
};

double difference(const std::vector<float>& found, const std::vector<float>& wanted) {
  CHECK(found.size() == wanted.size());
  double error = 0, size = 1e-30;
  for (std::size_t i = 0; i < found.size(); ++i) {
    CHECK(std::isfinite(found[i]));
    error += std::pow(static_cast<double>(found[i]) - wanted[i], 2);
    size += std::pow(static_cast<double>(wanted[i]), 2);
  }
  return std::sqrt(error / size);
}

void ways_to_read(const mar::Variant& variant, const Sizes& sizes, Precision precision, Precision head, bool spiking) {
  const Arrays arrays(sizes, precision, head, spiking);
  const bool exact = precision == Precision::i8;
  const int wide = arrays.head.linear.outputs(), count = 300;
  std::vector<std::int32_t> tokens(count);
  for (auto& token : tokens) token = integer(0, sizes.vocab - 1);
  std::vector<float> first, steps_first;
  for (int threads : {1, 3}) {
    mar::Model model(variant.kernels, threads);
    arrays.fill(model);
    // A block and what is over, with logits of all tokens and of the last.
    mar::State whole = model.new_state(), last = model.new_state();
    std::vector<float> all(static_cast<std::size_t>(count) * wide), end(wide);
    model.forward({&whole}, tokens.data(), count, true, all.data());
    model.forward({&last}, tokens.data(), count, false, end.data());
    CHECK(std::equal(end.begin(), end.end(), all.end() - wide));
    CHECK(last.ssm == whole.ssm && last.conv == whole.conv && last.window == whole.window && whole.tokens == count);
    model.forward({&last}, tokens.data(), count, false, nullptr);
    if (threads == 1)
      first = all;
    else if (exact)
      CHECK(all == first);
    // Token by token: codes may flip where sums are rounded otherwise, so spiking models are compared on a few tokens.
    mar::State state = model.new_state(), replay = model.new_state();
    std::vector<float> steps;
    std::vector<std::int8_t> taken(model.code_count()), again(model.code_count());
    for (int t = 0; t < 40; ++t) {
      std::vector<float> one(wide), other(wide);
      model.step(state, tokens[t], one.data(), nullptr, taken.data());
      model.step(replay, tokens[t], other.data(), taken.data(), again.data());
      CHECK(one == other && taken == again);
      steps.insert(steps.end(), one.begin(), one.end());
    }
    if (threads == 1)
      steps_first = steps;
    else if (exact)
      CHECK(steps == steps_first);
    all.resize(steps.size());
    if (precision == Precision::f32 && !spiking) CHECK(difference(all, steps) < 1e-4);
    // Several sequences at once, each as by itself.
    std::vector<mar::State> together(7, model.new_state()), alone(7, model.new_state());
    std::vector<mar::State*> pointers;
    for (auto& one : together) pointers.push_back(&one);
    for (int t = 0; t < 3; ++t) {
      std::vector<float> batch(static_cast<std::size_t>(7) * wide), single(wide);
      model.forward(pointers, tokens.data() + 7 * t, 7, true, batch.data());
      for (int i = 0; i < 7; ++i) {
        model.step(alone[i], tokens[7 * t + i], single.data());
        const std::vector<float> row(batch.begin() + static_cast<std::ptrdiff_t>(i) * wide, batch.begin() + static_cast<std::ptrdiff_t>(i + 1) * wide);
        if (exact && head == Precision::i8) CHECK(row == single);
        if (precision == Precision::f32 && !spiking) CHECK(difference(row, single) < 1e-4);
      }
    }
    CHECK(model.counted_tokens == 3 * count + 80 + 42);
    std::int64_t spikes = 0;
    for (const auto& one : model.counts()) {
      CHECK(one.rows > 0 && one.bytes > 0);
      spikes += one.spikes;
    }
    CHECK((spikes > 0) == spiking);
    model.reset_counts();
    for (const auto& one : model.counts()) CHECK(one.spikes == 0 && one.rows == 0);
    for (std::int32_t token : {-1, sizes.vocab, INT32_MAX, INT32_MIN}) {
      CHECK_THROWS(model.step(state, token, end.data()));
      const std::int32_t pair[2] = {0, token};
      CHECK_THROWS(model.forward({&state}, pair, 2, false, end.data()));
    }
  }
}

// A head in two steps: near the best word as the whole int8 head has it, elsewhere as int4 has it, on any way to read.
void two_step_head(const mar::Variant& variant, const Sizes& sizes) {
  Arrays arrays(sizes, Precision::i8, Precision::i8, true);
  mar::Model plain(variant.kernels, 1);
  arrays.fill(plain);
  arrays.in_two_steps();
  const int wide = arrays.head.linear.outputs();
  std::vector<std::vector<float>> found;
  std::vector<float> exact(wide);
  const std::int32_t tokens[3] = {1, 0, sizes.vocab - 1};
  for (int threads : {1, 3}) {
    mar::Model model(variant.kernels, threads);
    arrays.fill(model);
    mar::State state = model.new_state(), whole = model.new_state(), other = plain.new_state();
    std::vector<float> steps(wide), prefill(wide);
    for (std::int32_t token : tokens) model.step(state, token, steps.data()), plain.step(other, token, exact.data());
    model.forward({&whole}, tokens, 3, false, prefill.data());
    found.insert(found.end(), {steps, prefill});
  }
  const auto best = std::max_element(exact.begin(), exact.begin() + sizes.vocab);
  double far = 0;
  for (int word = 0; word < sizes.vocab; ++word) far = std::max(far, static_cast<double>(std::fabs(exact[word])));
  CHECK(found[0] == found[2] && found[1] == found[3]);
  for (const auto& one : found) {
    CHECK(std::max_element(one.begin(), one.begin() + sizes.vocab) - one.begin() == best - exact.begin());
    // Values rounded to 8 bits lie between the two; int4 words may be off by more.
    for (int word = 0; word < sizes.vocab; ++word) CHECK(near(one[word], exact[word], far, exact[word] > *best - 4 ? 0.05 : 0.5));
  }
}

}  // namespace

void test_model(const mar::Variant& variant) {
  const Sizes ragged = {300, 40, 200, 3, 8, 6, 4}, odd = {7, 129, 5, 1, 70, 3, 1}, small = {64, 3, 1, 2, 2, 1, 9};
  Sizes windowed = ragged, wide = {50, 40, 70, 1, 70, 34, 4, 64};
  windowed.window = 5;
  for (Precision precision : {Precision::f32, Precision::bf16, Precision::i8, Precision::i4}) {
    for (bool spiking : {false, true}) ways_to_read(variant, ragged, precision, precision, spiking);
    ways_to_read(variant, odd, precision, Precision::i4, true);
    ways_to_read(variant, small, precision, Precision::f32, false);
    ways_to_read(variant, windowed, precision, precision, true);
    ways_to_read(variant, wide, precision, precision, false);
  }
  two_step_head(variant, ragged);
}
