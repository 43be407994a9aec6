// Many tokens through all layers of a model, in blocks that threads share: a prompt, or one token of each of several
// sequences. Does not: take a single token (model.cpp), whose weights are read row by row.
#include <algorithm>

#include "model_parts.hpp"

namespace mar {

namespace {

// Tokens of one block of `forward`: their codes stay in the second-level cache beside a slice of weights.
constexpr int kBlock = 256;

}  // namespace

void Model::forward(const std::vector<State*>& states, const std::int32_t* tokens, std::int64_t count, bool all,
                    float* logits) {
  for (std::int64_t i = 0; i < count; ++i) check(tokens[i]);
  if (states.size() == 1) {
    for (std::int64_t start = 0; start < count; start += kBlock) {
      const int here = static_cast<int>(std::min<std::int64_t>(kBlock, count - start));
      const bool wanted = logits != nullptr && (all || start + here == count);
      float* to = !wanted ? nullptr : all ? logits + start * head.outputs() : logits;
      if (here == 1)
        step(*states[0], tokens[start], to, nullptr, nullptr, all);
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
      step(*some[0], tokens[start], to, nullptr, nullptr, true);
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
  const bool coded = site.threshold || linear.integer();
  Counts ignored;
  Counts& counts = layer < 0 ? ignored : threads_[thread]->counts[layer * kSites + which];
  for (auto m = mine.begin; m < mine.end; ++m) {
    const float* x = values + m * linear.inputs;
    std::int8_t* codes = w.codes.data() + m * linear.rows;
    if (!coded) {
      counts.nonzero += linear.inputs;
      continue;
    }
    if (site.threshold) {
      k.encode(x, site.threshold, linear.inputs, site.encoder, codes);
      w.token_scales[m] = 1.0f;
    } else {
      w.token_scales[m] = k.quantise(x, linear.inputs, codes);
    }
    std::fill(codes + linear.inputs, codes + linear.rows, static_cast<std::int8_t>(0));
    if (site.threshold) counts.spikes += count_spikes(codes, linear.inputs);
    counts.nonzero += count_nonzero(codes, linear.inputs);
    if (site.multiplier) multiply_codes(codes, site.multiplier, linear.inputs);
    const int group = groups == 1 ? linear.inputs : kGroup;
    for (int g = 0; g < groups; ++g)
      w.sums[m * groups + g] = sum_codes(codes + g * group, std::min(group, linear.inputs - g * group));
    if (!linear.integer()) std::copy(codes, codes + linear.inputs, w.values.data() + m * linear.inputs);
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
      for (auto m = tokens.begin; m < tokens.end; ++m)
        k.add(linear.bias + s * kSlice, here * kSlice, out + m * stride + s * kSlice);
    slice += here;
  }
}

void Model::wide_block(const std::vector<State*>& states, const std::int32_t* tokens, int count, bool all,
                       float* logits) {
  const Kernels& k = *kernels_;
  const int parts = pool_->size();
  if (!wide_) {
    auto w = std::make_unique<Wide>();
    const int most = std::max({shape.hidden, shape.inner(), shape.ffn}) + kSlice;
    int widest = 0;
    for (const auto& layer : layers)
      widest = std::max({widest, layer.out_proj.linear.outputs(), layer.down_proj.linear.outputs()});
    w->hidden.resize(static_cast<std::size_t>(kBlock) * shape.hidden);
    w->normed.resize(static_cast<std::size_t>(kBlock) * shape.hidden);
    w->projected.resize(static_cast<std::size_t>(kBlock) * layers[0].in_proj.linear.outputs());
    w->mixed.resize(static_cast<std::size_t>(kBlock) * shape.inner());
    w->gate_up.resize(static_cast<std::size_t>(kBlock) * layers[0].gate_up.linear.outputs());
    w->product.resize(static_cast<std::size_t>(kBlock) * shape.ffn);
    w->out.resize(static_cast<std::size_t>(kBlock) * widest);
    w->decay.resize(static_cast<std::size_t>(kBlock) * shape.heads);
    w->turns.resize(static_cast<std::size_t>(kBlock) * shape.size);
    w->token_scales.resize(kBlock);
    w->values.resize(static_cast<std::size_t>(kBlock) * most);
    w->codes.resize(static_cast<std::size_t>(kBlock) * most);
    w->sums.resize(static_cast<std::size_t>(kBlock) * (most / kGroup + 1));
    w->scratch.resize(parts);
    w->head_scratch.resize(parts);
    for (auto& one : w->scratch) one.resize(block_scratch(most));
    for (auto& one : w->head_scratch) one.resize(head_scratch(shape.width, shape.size, shape.window));
    wide_ = std::move(w);
  }
  Wide& w = *wide_;
  // One sequence of `count` tokens, or `count` sequences of one.
  const int sequences = static_cast<int>(states.size()), length = count / sequences;

  pool_->run([&](int thread) {
    const Range mine = share(count, thread, parts);
    const int begin = static_cast<int>(mine.begin), end = static_cast<int>(mine.end);
    for (int m = begin; m < end; ++m)
      embed(tokens[m], 0, shape.hidden, w.hidden.data() + m * static_cast<std::size_t>(shape.hidden));
    for (int m = begin; shape.window && m < end; ++m)
      turn(states[m / length]->tokens + m % length, w.turns.data() + m * static_cast<std::size_t>(shape.size));
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
        if (layer.in_proj.threshold)
          for (int i = 0; i < shape.hidden; ++i)
            x[i] = w.codes[m * static_cast<std::size_t>(layer.in_proj.linear.rows) + i];
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
        const Head head = head_of(layer, one, conv, ssm);
        const float* gate = projected + shape.channels() + one * shape.width;
        float *mixed = w.mixed.data() + m * shape.inner() + one * shape.width, *scratch = w.head_scratch[thread].data();
        k.head_scan(head, projected, wide, gate, wide, w.decay.data() + m * shape.heads + one, shape.heads, length,
                    mixed, shape.inner(), scratch);
        if (shape.window)
          k.head_window(head, window_of(state, index, one), projected, wide, gate, wide,
                        w.turns.data() + m * shape.size, state.tokens, length, mixed, shape.inner(), scratch);
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
          k.gated(gate, gate + kSlice, std::min(kSlice, shape.ffn - at),
                  w.product.data() + m * static_cast<std::size_t>(shape.ffn) + at);
        }
      wide_site(thread, index, 3, layer.down_proj, w.product.data(), count, w.out.data());
      pool_->barrier();
      for (int m = begin; m < end; ++m)
        k.add(w.out.data() + m * static_cast<std::size_t>(layer.down_proj.linear.outputs()), shape.hidden,
              w.hidden.data() + m * static_cast<std::size_t>(shape.hidden));
    }
    if (logits == nullptr) return;
    pool_->barrier();
    if (!all && words) {
      float* normed = threads_[thread]->normed.data();
      k.rms_norm(w.hidden.data() + (count - 1) * static_cast<std::size_t>(shape.hidden), norm, shape.eps, shape.hidden, normed);
      return two_step_head(thread, logits);
    }
    const int wanted = all ? count : 1, start = count - wanted;
    const Range last = share(wanted, thread, parts);
    for (auto m = last.begin; m < last.end; ++m)
      k.rms_norm(w.hidden.data() + (start + m) * shape.hidden, norm, shape.eps, shape.hidden,
                 w.normed.data() + m * shape.hidden);
    Site dense;
    dense.linear = head;
    wide_site(thread, -1, 0, dense, w.normed.data(), wanted, logits);
  });
  for (State* state : states) state->tokens += length;
  counted_tokens += count;
}

}  // namespace mar
