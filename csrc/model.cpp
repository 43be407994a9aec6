#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace mar {

namespace {

// Tokens of one block of `forward`: their codes stay in the second-level cache beside a slice of weights.
constexpr int kBlock = 256;

float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace

// What one thread needs for one token.
struct Model::Thread {
  Lines<float> hidden, normed, local, scratch, partial_out, partial_down;
  Listing listing;
  std::vector<Counts> counts;
};

// What a block of many tokens needs; threads share it.
struct Model::Wide {
  Lines<float> hidden, normed, projected, mixed, gate_up, product, out, decay, token_scales, values;
  Lines<std::int8_t> codes;
  Lines<std::int32_t> sums;
  std::vector<Lines<std::uint8_t>> scratch;
  std::vector<Lines<float>> head_scratch;
};

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
    t->scratch.resize(head_scratch(shape.width, shape.size));
    t->partial_out.resize(most);
    t->partial_down.resize(most);
    t->listing.reserve(most, widest);
    t->counts.resize(layers.size() * kSites);
    threads_.push_back(std::move(t));
  }
  hidden_.resize(most);
  projected_.resize(shape.channels() + shape.inner() + 2 * kSlice);
  mixed_.resize(most);
  product_.resize(most);
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
        const std::uint16_t scale =
            static_cast<const std::uint16_t*>(head.scales)[static_cast<std::size_t>(i / kGroup) * head.outputs() + token];
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

namespace {

float log_decay_of(float logit) {
  // -softplus
  return logit > 20.0f ? -logit : -std::log1p(std::exp(logit));
}

}  // namespace

std::size_t Model::code_count() const {
  return static_cast<std::size_t>(shape.layers) * (2 * shape.hidden + shape.inner() + shape.ffn);
}

void Model::step(State& state, std::int32_t token, float* logits, const std::int8_t* given, std::int8_t* taken) {
  check(token);
  pool_->run([&](int thread) { step_thread(thread, state, token, logits, given, taken); });
  ++state.tokens;
  ++counted_tokens;
}

void Model::step_thread(int thread, State& state, std::int32_t token, float* logits, const std::int8_t* given,
                        std::int8_t* taken) {
  Thread& t = *threads_[thread];
  const Kernels& k = *kernels_;
  const int parts = pool_->size();

  // Lists rows [begin, end) of the next site and counts them. `whole`: every thread lists all, so only one counts.
  auto list = [&](const Site& site, const float* x, int begin, int end, bool whole, Counts& counts) {
    t.listing.list(k, site, x, begin, end, given, whole && thread != 0 ? nullptr : taken);
    if (given) given += site.linear.inputs;
    if (taken) taken += site.linear.inputs;
    if (whole && thread != 0) return;
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
    if (layer.in_proj.divisor)
      for (int i = 0; i < shape.hidden; ++i) t.normed[i] = t.listing.codes()[i];
    const Range slices = share_slices(layer.in_proj.linear, thread, parts);
    multiply(layer.in_proj.linear, slices, projected_.data() + slices.begin * kSlice, false);
    pool_->barrier();
    for (auto i = heads.begin; i < heads.end; ++i) {
      const int one = static_cast<int>(i);
      const float logit = k.dot(layer.decay_weight + i * shape.hidden, t.normed.data(), shape.hidden);
      k.head_step(head_of(layer, one, conv, ssm), projected_.data(), projected_.data() + shape.channels() + one * shape.width,
                  log_decay_of(logit + layer.decay_bias[i]), mixed_.data() + one * shape.width, t.scratch.data());
    }
    if (!layer.out_proj.divisor && layer.out_proj.linear.integer()) pool_->barrier();
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
    if (!layer.down_proj.divisor && layer.down_proj.linear.integer()) pool_->barrier();
    list(layer.down_proj, product_.data(), from, std::max(from, to), false, counts[3]);
    multiply(layer.down_proj.linear, {0, layer.down_proj.linear.slices}, t.partial_down.data(), true);
    pool_->barrier();
    gather(layer.down_proj, &Thread::partial_down, h);
  }

  if (logits == nullptr) return;
  k.rms_norm(h, norm, shape.eps, shape.hidden, t.normed.data());
  Counts ignored;
  Site dense;
  dense.linear = head;
  list(dense, t.normed.data(), 0, shape.hidden, true, ignored);
  const Range slices = share_slices(head, thread, parts);
  multiply(head, slices, logits + slices.begin * kSlice, false);
}

void Model::forward(const std::vector<State*>& states, const std::int32_t* tokens, std::int64_t count, bool all,
                    float* logits) {
  for (std::int64_t i = 0; i < count; ++i) check(tokens[i]);
  if (states.size() == 1) {
    for (std::int64_t start = 0; start < count; start += kBlock) {
      const int here = static_cast<int>(std::min<std::int64_t>(kBlock, count - start));
      const bool wanted = logits != nullptr && (all || start + here == count);
      float* to = !wanted ? nullptr : all ? logits + start * head.outputs() : logits;
      if (here == 1)
        step(*states[0], tokens[start], to);
      else
        wide_block(states, tokens + start, here, all, to);
    }
    return;
  }
  for (std::size_t start = 0; start < states.size(); start += kBlock) {
    const std::size_t here = std::min<std::size_t>(kBlock, states.size() - start);
    const std::vector<State*> some(states.begin() + start, states.begin() + start + here);
    float* to = logits ? logits + start * head.outputs() : nullptr;
    if (here == 1)
      step(*some[0], tokens[start], to);
    else
      wide_block(some, tokens + start, static_cast<int>(here), true, to);
  }
}

// Tokens [begin, end) of one site: codes first, each thread its own tokens, then the product. With few tokens threads
// share slices, with many they share tokens, and so need no barrier between the two.
void Model::wide_site(int thread, int layer, int which, const Site& site, const float* values, int count, float* out) {
  Wide& w = *wide_;
  const Kernels& k = *kernels_;
  const Linear& linear = site.linear;
  const int parts = pool_->size(), groups = linear.groups();
  const bool by_tokens = count >= 32 * parts;
  const Range mine = share(count, thread, parts);
  const bool coded = site.divisor || linear.integer();
  Counts ignored;
  Counts& counts = layer < 0 ? ignored : threads_[thread]->counts[layer * kSites + which];
  for (auto m = mine.begin; m < mine.end; ++m) {
    const float* x = values + m * linear.inputs;
    std::int8_t* codes = w.codes.data() + m * linear.rows;
    if (!coded) {
      counts.nonzero += linear.inputs;
      continue;
    }
    if (site.divisor) {
      k.encode(x, site.divisor, linear.inputs, site.encoder, codes);
      w.token_scales[m] = 1.0f;
    } else {
      w.token_scales[m] = k.quantise(x, linear.inputs, codes);
    }
    std::fill(codes + linear.inputs, codes + linear.rows, static_cast<std::int8_t>(0));
    std::int64_t spikes = 0, nonzero = 0;
    for (int g = 0; g < groups; ++g) {
      std::int32_t total = 0;
      const int end = groups == 1 ? linear.inputs : std::min(linear.inputs, (g + 1) * kGroup);
      for (int i = g * kGroup; i < end; ++i) {
        spikes += std::abs(codes[i]);
        if (site.multiplier) codes[i] = static_cast<std::int8_t>(codes[i] * site.multiplier[i]);
        total += codes[i];
        nonzero += codes[i] != 0;
      }
      w.sums[m * groups + g] = total;
    }
    if (!linear.integer())
      for (int i = 0; i < linear.inputs; ++i) w.values[m * linear.inputs + i] = codes[i];
    if (site.divisor) counts.spikes += spikes;
    counts.nonzero += nonzero;
  }
  // Every row is read once a block, for all its tokens together.
  if (thread == 0) {
    counts.rows += linear.inputs;
    counts.bytes += static_cast<std::int64_t>(linear.weight_bytes());
  }
  if (!by_tokens) pool_->barrier();
  const Range tokens = by_tokens ? mine : Range{0, count};
  const Range slices = by_tokens ? Range{0, linear.slices} : share_slices(linear, thread, parts);
  const int n = static_cast<int>(tokens.end - tokens.begin);
  const std::size_t stride = linear.outputs();
  std::uint8_t* scratch = w.scratch[thread].data();
  const float* dense = (coded ? w.values.data() : values) + tokens.begin * linear.inputs;
  const std::int8_t* codes = w.codes.data() + tokens.begin * linear.rows;
  const std::int32_t* sums = w.sums.data() + tokens.begin * groups;
  const float* token_scales = w.token_scales.data() + tokens.begin;
  for (auto slice = slices.begin; slice < slices.end && n > 0;) {
    const int s = static_cast<int>(slice);
    const int here = std::min(static_cast<int>(slices.end), (s / linear.panel + 1) * linear.panel) - s;
    const Block block = linear.block(s, here);
    float* to = out + tokens.begin * stride + s * kSlice;
    switch (linear.precision) {
      case Precision::f32: k.block_f32(block, linear.inputs, dense, n, to, stride, scratch); break;
      case Precision::bf16: k.block_bf16(block, linear.inputs, dense, n, to, stride, scratch); break;
      case Precision::i8:
        k.block_i8(block, linear.rows, static_cast<const float*>(linear.scales) + s * kSlice, codes, sums, token_scales,
                   n, to, stride, scratch);
        break;
      case Precision::i4:
        k.block_i4(block, linear.rows, static_cast<const std::uint16_t*>(linear.scales) + s * kSlice, stride, codes, sums,
                   token_scales, n, to, stride, scratch);
        break;
    }
    if (linear.bias)
      for (auto m = tokens.begin; m < tokens.end; ++m) k.add(linear.bias + s * kSlice, here * kSlice, out + m * stride + s * kSlice);
    slice += here;
  }
}

void Model::wide_block(const std::vector<State*>& states, const std::int32_t* tokens, int count, bool all, float* logits) {
  const Kernels& k = *kernels_;
  const int parts = pool_->size();
  if (!wide_) {
    auto w = std::make_unique<Wide>();
    const int most = std::max({shape.hidden, shape.inner(), shape.ffn}) + kSlice;
    int widest = 0;
    for (const auto& layer : layers) widest = std::max({widest, layer.out_proj.linear.outputs(), layer.down_proj.linear.outputs()});
    w->hidden.resize(static_cast<std::size_t>(kBlock) * shape.hidden);
    w->normed.resize(static_cast<std::size_t>(kBlock) * shape.hidden);
    w->projected.resize(static_cast<std::size_t>(kBlock) * layers[0].in_proj.linear.outputs());
    w->mixed.resize(static_cast<std::size_t>(kBlock) * shape.inner());
    w->gate_up.resize(static_cast<std::size_t>(kBlock) * layers[0].gate_up.linear.outputs());
    w->product.resize(static_cast<std::size_t>(kBlock) * shape.ffn);
    w->out.resize(static_cast<std::size_t>(kBlock) * widest);
    w->decay.resize(static_cast<std::size_t>(kBlock) * shape.heads);
    w->token_scales.resize(kBlock);
    w->values.resize(static_cast<std::size_t>(kBlock) * most);
    w->codes.resize(static_cast<std::size_t>(kBlock) * most);
    w->sums.resize(static_cast<std::size_t>(kBlock) * (most / kGroup + 1));
    w->scratch.resize(parts);
    w->head_scratch.resize(parts);
    for (auto& one : w->scratch) one.resize(block_scratch(most));
    for (auto& one : w->head_scratch) one.resize(head_scratch(shape.width, shape.size));
    wide_ = std::move(w);
  }
  Wide& w = *wide_;
  // One sequence of `count` tokens, or `count` sequences of one.
  const int sequences = static_cast<int>(states.size()), length = count / sequences;

  pool_->run([&](int thread) {
    const Range mine = share(count, thread, parts);
    const int begin = static_cast<int>(mine.begin), end = static_cast<int>(mine.end);
    for (int m = begin; m < end; ++m) embed(tokens[m], 0, shape.hidden, w.hidden.data() + m * static_cast<std::size_t>(shape.hidden));
    // A thread that norms, encodes and adds up its own tokens needs barriers only where it takes others' results.
    for (int index = 0; index < shape.layers; ++index) {
      const Layer& layer = layers[index];
      const std::size_t wide = layer.in_proj.linear.outputs(), pair = layer.gate_up.linear.outputs();
      for (int m = begin; m < end; ++m)
        k.rms_norm(w.hidden.data() + m * static_cast<std::size_t>(shape.hidden), layer.mixer_norm, shape.eps, shape.hidden,
                   w.normed.data() + m * static_cast<std::size_t>(shape.hidden));
      wide_site(thread, index, 0, layer.in_proj, w.normed.data(), count, w.projected.data());
      for (int m = begin; m < end; ++m) {
        float* x = w.normed.data() + m * static_cast<std::size_t>(shape.hidden);
        if (layer.in_proj.divisor)
          for (int i = 0; i < shape.hidden; ++i) x[i] = w.codes[m * static_cast<std::size_t>(layer.in_proj.linear.rows) + i];
        for (int i = 0; i < shape.heads; ++i)
          w.decay[m * static_cast<std::size_t>(shape.heads) + i] = log_decay_of(
              k.dot(layer.decay_weight + i * static_cast<std::size_t>(shape.hidden), x, shape.hidden) + layer.decay_bias[i]);
      }
      pool_->barrier();
      const Range items = share(static_cast<std::int64_t>(sequences) * shape.heads, thread, parts);
      for (auto item = items.begin; item < items.end; ++item) {
        const int sequence = static_cast<int>(item / shape.heads), one = static_cast<int>(item % shape.heads);
        State& state = *states[sequence];
        float* conv = state.conv.data() + static_cast<std::size_t>(index) * (shape.taps - 1) * shape.channels();
        float* ssm = state.ssm.data() + static_cast<std::size_t>(index) * shape.heads * shape.size * shape.width;
        const std::size_t m = static_cast<std::size_t>(sequence) * length;
        const float* projected = w.projected.data() + m * wide;
        k.head_scan(head_of(layer, one, conv, ssm), projected, wide, projected + shape.channels() + one * shape.width, wide,
                    w.decay.data() + m * shape.heads + one, shape.heads, length,
                    w.mixed.data() + m * shape.inner() + one * shape.width, shape.inner(), w.head_scratch[thread].data());
      }
      pool_->barrier();
      wide_site(thread, index, 1, layer.out_proj, w.mixed.data(), count, w.out.data());
      pool_->barrier();
      for (int m = begin; m < end; ++m) {
        float* h = w.hidden.data() + m * static_cast<std::size_t>(shape.hidden);
        k.add(w.out.data() + m * static_cast<std::size_t>(layer.out_proj.linear.outputs()), shape.hidden, h);
        k.rms_norm(h, layer.ffn_norm, shape.eps, shape.hidden, w.normed.data() + m * static_cast<std::size_t>(shape.hidden));
      }
      wide_site(thread, index, 2, layer.gate_up, w.normed.data(), count, w.gate_up.data());
      pool_->barrier();
      for (int m = begin; m < end; ++m)
        for (int at = 0; at < shape.ffn; at += kSlice) {
          const float* gate = w.gate_up.data() + m * pair + 2 * at;
          k.gated(gate, gate + kSlice, std::min(kSlice, shape.ffn - at), w.product.data() + m * static_cast<std::size_t>(shape.ffn) + at);
        }
      wide_site(thread, index, 3, layer.down_proj, w.product.data(), count, w.out.data());
      pool_->barrier();
      for (int m = begin; m < end; ++m)
        k.add(w.out.data() + m * static_cast<std::size_t>(layer.down_proj.linear.outputs()), shape.hidden,
              w.hidden.data() + m * static_cast<std::size_t>(shape.hidden));
    }
    if (logits == nullptr) return;
    pool_->barrier();
    const int wanted = all ? count : 1, start = count - wanted;
    const Range last = share(wanted, thread, parts);
    for (auto m = last.begin; m < last.end; ++m)
      k.rms_norm(w.hidden.data() + (start + m) * shape.hidden, norm, shape.eps, shape.hidden, w.normed.data() + m * shape.hidden);
    Site dense;
    dense.linear = head;
    wide_site(thread, -1, 0, dense, w.normed.data(), wanted, logits);
  });
  for (State* state : states) state->tokens += length;
  counted_tokens += count;
}

}  // namespace mar
