// A model's memory, embedding and counters, and one token through all its layers; prefill.cpp takes many at once.
#include "model.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>

#include "crossover.hpp"
#include "model_parts.hpp"

namespace mar {

namespace {

float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Two-step head: channels of a token's values that are read in int8, for they are many times the others' size; and how
// far below the best logit words are still read in int8. What it costs: docs/engine.md.
constexpr int kLarge = 16;
constexpr float kNear = 5.0f;

}  // namespace

Model::Model(const Kernels* kernels, int threads) : kernels_(kernels), pool_(Pool::shared(threads)) {}

Model::~Model() = default;

void Model::finish() {
  // Outputs are filled up to one slice, in int4 to two.
  const int most = std::max({shape.hidden, shape.inner(), shape.ffn}) + 2 * kSlice;
  int widest = head.outputs();
  for (const auto& layer : layers)
    for (const Site* site : {&layer.in_proj, &layer.out_proj, &layer.gate_up, &layer.down_proj})
      widest = std::max(widest, site->linear.outputs());
  for (int thread = 0; thread < pool_->size(); ++thread) {
    auto t = std::make_unique<Thread>();
    t->hidden.resize(most);
    t->normed.resize(most);
    t->local.resize(2 * most + 2 * kSlice);
    t->scratch.resize(head_scratch(shape.width, shape.size, shape.window));
    t->turns.resize(shape.size);
    t->partial_out.resize(most);
    t->partial_down.resize(most);
    t->listing.reserve(most, widest);
    t->codes.resize(most);
    t->counts.resize(layers.size() * kSites);
    threads_.push_back(std::move(t));
  }
  std::vector<Timed> linears;
  for (auto& layer : layers) {
    linears.push_back({&layer.in_proj.linear, 0, false});
    linears.push_back({&layer.out_proj.linear, 1, true});
    linears.push_back({&layer.gate_up.linear, 2, false});
    linears.push_back({&layer.down_proj.linear, 3, true});
  }
  linears.push_back({&head, kSites, false});
  set_crossovers(*kernels_, *pool_, linears);
  for (int i = 0; i < shape.size / 2; ++i) rates_.push_back(std::pow(shape.rotary_base, -i / (shape.size / 2.0)));
  hidden_.resize(most);
  projected_.resize(shape.channels() + shape.inner() + 2 * kSlice);
  mixed_.resize(most);
  product_.resize(most);
  rough_.resize(static_cast<std::size_t>(rough.pairs) * 2 * kSlice);
}

std::array<double, kSites + 1> Model::crossovers() const {
  const Layer& first = layers.front();
  return {first.in_proj.linear.whole_above, first.out_proj.linear.whole_above, first.gate_up.linear.whole_above,
          first.down_proj.linear.whole_above, head.whole_above};
}

std::size_t Model::conv_floats() const {
  return static_cast<std::size_t>(shape.layers) * (shape.taps - 1) * shape.channels();
}

std::size_t Model::ssm_floats() const {
  return static_cast<std::size_t>(shape.layers) * shape.heads * shape.size * shape.width;
}

State Model::new_state() const {
  State state;
  state.conv.assign(conv_floats(), 0.0f);
  state.ssm.assign(ssm_floats(), 0.0f);
  state.window.assign(window_floats(), 0);
  return state;
}

void Model::check(std::int32_t token) const {
  if (token < 0 || token >= shape.vocab)
    throw std::out_of_range("Token " + std::to_string(token) + " is not in the vocabulary of " +
                            std::to_string(shape.vocab) + "; use 0 to " + std::to_string(shape.vocab - 1) + ".");
}

std::vector<Counts> Model::counts() const {
  std::vector<Counts> total(layers.size() * kSites);
  for (const auto& thread : threads_)
    for (std::size_t i = 0; i < total.size(); ++i) {
      total[i].spikes += thread->counts[i].spikes;
      total[i].nonzero += thread->counts[i].nonzero;
      total[i].rows += thread->counts[i].rows;
      total[i].bytes += thread->counts[i].bytes;
    }
  return total;
}

void Model::reset_counts() {
  counted_tokens = 0;
  for (auto& thread : threads_) std::fill(thread->counts.begin(), thread->counts.end(), Counts{});
}

// Inputs [begin, end) of a token's embedding: its column of the tied head, or its row.
void Model::embed(std::int32_t token, int begin, int end, float* to) const {
  if (embedding) {
    std::memcpy(to + begin, embedding + (static_cast<std::size_t>(token) * shape.hidden + begin) * 4,
                sizeof(float) * (end - begin));
    return;
  }
  if (words) {
    const std::int8_t* row = words + static_cast<std::size_t>(token) * shape.hidden;
    for (int i = begin; i < end; ++i) to[i] = row[i] * static_cast<const float*>(head.scales)[token];
    return;
  }
  const int slice = token / kSlice, column = token % kSlice;
  const Block block = head.block(head.precision == Precision::i4 ? slice / 2 * 2 : slice, 1);
  for (int i = begin; i < end; ++i) {
    const std::uint8_t* row = block.rows + block.stride * i;
    switch (head.precision) {
      case Precision::f32: std::memcpy(to + i, row + 4 * column, 4); break;
      case Precision::bf16: {
        std::uint16_t raw;
        std::memcpy(&raw, row + 2 * column, 2);
        to[i] = from_bf16(raw);
        break;
      }
      case Precision::i8: to[i] = (row[column] - 128) * static_cast<const float*>(head.scales)[token]; break;
      case Precision::i4: {
        const int packed = row[column];
        const std::uint16_t scale = static_cast<const std::uint16_t*>(head.scales)[head.scale_index(i / kGroup, token)];
        to[i] = ((slice % 2 ? packed >> 4 : packed & 15) - 8) * from_bf16(scale);
        break;
      }
    }
  }
}

Head Model::head_of(const Layer& layer, int index, float* conv, float* ssm) const {
  Head head{};
  head.width = shape.width;
  head.size = shape.size;
  head.taps = shape.taps;
  head.channels = shape.channels();
  head.x = index * shape.width;
  head.b = shape.inner() + index * shape.size;
  head.c = shape.inner() + (shape.heads + index) * shape.size;
  head.gain = shape.gain;
  head.unit = shape.unit;
  head.skip = layer.skip[index];
  head.conv_weight = layer.conv_weight;
  head.conv_bias = layer.conv_bias;
  head.gate_bias = layer.gate_bias + index * shape.width;
  head.conv_state = conv;
  head.state = ssm + static_cast<std::size_t>(index) * shape.size * shape.width;
  return head;
}

Window Model::window_of(State& state, int layer, int head) const {
  float* own = state.window.data() + one_window() * (static_cast<std::size_t>(layer) * shape.heads + head);
  return {shape.window, own, own + window_keys(shape.window, shape.size)};
}

// Cosines and sines (N) of a position's angles.
void Model::turn(std::int64_t position, float* to) const {
  const int half = shape.size / 2;
  for (int i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * rates_[i];
    to[i] = static_cast<float>(std::cos(angle));
    to[half + i] = static_cast<float>(std::sin(angle));
  }
}

std::size_t Model::code_count() const {
  return static_cast<std::size_t>(shape.layers) * (2 * shape.hidden + shape.inner() + shape.ffn);
}

void Model::step(State& state, std::int32_t token, float* logits, const std::int8_t* given, std::int8_t* taken,
                 bool whole) {
  check(token);
  pool_->run([&](int thread) { step_thread(thread, state, token, logits, given, taken, whole); });
  ++state.tokens;
  ++counted_tokens;
}

void Model::step_thread(int thread, State& state, std::int32_t token, float* logits, const std::int8_t* given,
                        std::int8_t* taken, bool whole) {
  Thread& t = *threads_[thread];
  const Kernels& k = *kernels_;
  const int parts = pool_->size();

  // Lists rows [begin, end) of the next site and counts them. `alike`: every thread lists all, so only one counts.
  auto list = [&](const Site& site, const float* x, int begin, int end, bool alike, Counts& counts) {
    t.listing.list(k, site, x, begin, end, given, alike && thread != 0 ? nullptr : taken);
    if (given) given += site.linear.inputs;
    if (taken) taken += site.linear.inputs;
    if (alike && thread != 0) return;
    counts.spikes += t.listing.spikes();
    counts.nonzero += t.listing.nonzero();
    counts.rows += t.listing.rows();
    counts.bytes += static_cast<std::int64_t>(t.listing.rows() * site.linear.slices * site.linear.slice_bytes());
  };
  auto multiply = [&](const Linear& linear, Range slices, float* to, bool plain) {
    t.listing.multiply(k, linear, static_cast<int>(slices.begin), static_cast<int>(slices.end), to, plain);
  };

  // h += the sum of every thread's part. Integer parts add up exactly, so int8 gives the same for any number of threads.
  auto gather = [&](const Site& site, Lines<float> Thread::*partial, float* h) {
    const Linear& linear = site.linear;
    const int n = shape.hidden;
    if (linear.precision == Precision::i8) {
      const float* scales = static_cast<const float*>(linear.scales);
      for (int j = 0; j < n; ++j) {
        std::int32_t total = 0;
        for (const auto& other : threads_) total += reinterpret_cast<const std::int32_t*>(((*other).*partial).data())[j];
        const float sum = static_cast<float>(total) * (scales[j] * t.listing.token_scale());
        h[j] += linear.bias ? sum + linear.bias[j] : sum;
      }
    } else {
      for (const auto& other : threads_) k.add(((*other).*partial).data(), n, h);
      if (linear.bias) k.add(linear.bias, n, h);
    }
  };

  const Range own = share(shape.hidden, thread, parts);
  embed(token, static_cast<int>(own.begin), static_cast<int>(own.end), hidden_.data());
  pool_->barrier();
  float* h = t.hidden.data();
  std::memcpy(h, hidden_.data(), sizeof(float) * shape.hidden);

  if (shape.window) turn(state.tokens, t.turns.data());
  const Range heads = share(shape.heads, thread, parts);
  const int first = static_cast<int>(heads.begin) * shape.width, last = static_cast<int>(heads.end) * shape.width;
  for (int index = 0; index < shape.layers; ++index) {
    const Layer& layer = layers[index];
    Counts* counts = t.counts.data() + index * kSites;
    float* conv = state.conv.data() + static_cast<std::size_t>(index) * (shape.taps - 1) * shape.channels();
    float* ssm = state.ssm.data() + static_cast<std::size_t>(index) * shape.heads * shape.size * shape.width;

    k.rms_norm(h, layer.mixer_norm, shape.eps, shape.hidden, t.normed.data());
    list(layer.in_proj, t.normed.data(), 0, shape.hidden, true, counts[0]);
    // Decay logits in fp32 whatever the precision, for this thread's heads only.
    if (layer.in_proj.threshold)
      for (int i = 0; i < shape.hidden; ++i) t.normed[i] = t.listing.codes()[i];
    const Range slices = share_slices(layer.in_proj.linear, thread, parts);
    multiply(layer.in_proj.linear, slices, projected_.data() + slices.begin * kSlice, false);
    pool_->barrier();
    for (auto i = heads.begin; i < heads.end; ++i) {
      const int one = static_cast<int>(i);
      const float logit = k.dot(layer.decay_weight + i * shape.hidden, t.normed.data(), shape.hidden);
      const Head head = head_of(layer, one, conv, ssm);
      const float* gate = projected_.data() + shape.channels() + one * shape.width;
      float* mixed = mixed_.data() + one * shape.width;
      k.head_step(head, projected_.data(), gate, log_decay_of(logit + layer.decay_bias[i]), mixed, t.scratch.data());
      if (shape.window)
        k.head_window(head, window_of(state, index, one), projected_.data(), 0, gate, 0, t.turns.data(), state.tokens,
                      1, mixed, 0, t.scratch.data());
    }
    if (!layer.out_proj.threshold && layer.out_proj.linear.integer()) pool_->barrier();
    list(layer.out_proj, mixed_.data(), first, last, false, counts[1]);
    multiply(layer.out_proj.linear, {0, layer.out_proj.linear.slices}, t.partial_out.data(), true);
    pool_->barrier();
    gather(layer.out_proj, &Thread::partial_out, h);

    k.rms_norm(h, layer.ffn_norm, shape.eps, shape.hidden, t.normed.data());
    list(layer.gate_up, t.normed.data(), 0, shape.hidden, true, counts[2]);
    const Range pairs = share(layer.gate_up.linear.slices / 2, thread, parts);
    multiply(layer.gate_up.linear, {2 * pairs.begin, 2 * pairs.end}, t.local.data(), false);
    if (layer.gate_up.linear.bias)
      k.add(layer.gate_up.linear.bias + pairs.begin * 2 * kSlice, static_cast<int>(pairs.end - pairs.begin) * 2 * kSlice,
            t.local.data());
    const int from = static_cast<int>(pairs.begin) * kSlice;
    const int to = std::min(shape.ffn, static_cast<int>(pairs.end) * kSlice);
    for (int at = from; at < to; at += kSlice) {
      const float* gate = t.local.data() + (at - from) * 2;
      k.gated(gate, gate + kSlice, std::min(kSlice, to - at), product_.data() + at);
    }
    if (!layer.down_proj.threshold && layer.down_proj.linear.integer()) pool_->barrier();
    list(layer.down_proj, product_.data(), from, std::max(from, to), false, counts[3]);
    multiply(layer.down_proj.linear, {0, layer.down_proj.linear.slices}, t.partial_down.data(), true);
    pool_->barrier();
    gather(layer.down_proj, &Thread::partial_down, h);
  }

  if (logits == nullptr) return;
  k.rms_norm(h, norm, shape.eps, shape.hidden, t.normed.data());
  if (words && !whole) return two_step_head(thread, logits);
  Counts ignored;
  Site dense;
  dense.linear = head;
  list(dense, t.normed.data(), 0, shape.hidden, true, ignored);
  const Range slices = share_slices(head, thread, parts);
  multiply(head, slices, logits + slices.begin * kSlice, false);
}

// Logits of a token's normed values in int4, but for its few large channels, which are read in int8; then those of the
// words near the best again, in int8 rows and with values in fp32.
void Model::two_step_head(int thread, float* logits) {
  Thread& t = *threads_[thread];
  const Kernels& k = *kernels_;
  const int n = shape.hidden;
  const float* x = t.normed.data();
  // Every thread finds the same large channels; hidden is of no more use to it.
  float *rest = t.hidden.data(), *large = t.local.data();
  float least_large = 0;
  if (n > kLarge) {
    for (int i = 0; i < n; ++i) large[i] = std::fabs(x[i]);
    std::nth_element(large, large + kLarge, large + n, std::greater<>());
    least_large = large[kLarge];
  }
  for (int i = 0; i < n; ++i) {
    const bool is_large = std::fabs(x[i]) > least_large;
    rest[i] = is_large ? 0.0f : x[i];
    large[i] = is_large ? x[i] : 0.0f;
  }
  std::int8_t* codes = t.codes.data();
  const float scale = k.quantise(rest, n, codes);
  std::fill(codes + n, codes + rough.groups() * kGroup, static_cast<std::int8_t>(0));
  std::vector<std::int32_t>& sums = t.sums;
  sums.assign(rough.groups(), 0);
  for (int i = 0; i < n; ++i) sums[i / kGroup] += codes[i];
  const Range pairs = share(rough.pairs, thread, pool_->size());
  // The last pair may have a slice more than the head.
  const int begin = static_cast<int>(pairs.begin) * 2, end = std::min(static_cast<int>(pairs.end) * 2, head.slices);
  k.stream_i4(rough, {begin / 2, static_cast<int>(pairs.end - pairs.begin), 0, rough.groups()}, codes, sums.data(),
              rough_.data() + begin * kSlice);
  Site site;
  site.linear = head;
  t.listing.list(k, site, large, 0, n, nullptr, nullptr);
  t.listing.multiply(k, head, begin, end, logits + begin * kSlice, false);
  const int from = begin * kSlice, to = std::min(end * kSlice, shape.vocab);
  for (int word = from; word < end * kSlice; ++word) logits[word] += rough_[word] * scale;
  t.best = to > from ? *std::max_element(logits + from, logits + to) : -std::numeric_limits<float>::infinity();
  pool_->barrier();
  float best = t.best;
  for (const auto& other : threads_) best = std::max(best, other->best);
  const float* scales = static_cast<const float*>(head.scales);
  for (int word = from; word < to; ++word)
    if (logits[word] >= best - kNear)
      logits[word] = k.dot_i8(x, words + static_cast<std::size_t>(word) * n, n) * scales[word];
}

}  // namespace mar
