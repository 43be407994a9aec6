// Each kernel of a variant against its definition in double precision, at sizes that fill no vector.
#include <algorithm>

#include "check.hpp"

using namespace tests;
using mar::Precision;

namespace {

std::int64_t nonzero(const std::vector<std::int8_t>& codes, int begin, int end) {
  return end - begin - std::count(codes.begin() + begin, codes.begin() + end, 0);
}

const Precision kPrecisions[] = {Precision::f32, Precision::bf16, Precision::i8, Precision::i4};

void elementwise(const mar::Kernels& k) {
  for (int n : {1, 3, 15, 16, 17, 40, 200}) {
    const auto x = normals(n), weight = normals(n);
    double squares = 0, product = 0, sizes = 0;
    for (int i = 0; i < n; ++i) {
      squares += static_cast<double>(x[i]) * x[i];
      product += static_cast<double>(x[i]) * weight[i];
      sizes += std::fabs(static_cast<double>(x[i]) * weight[i]);
    }
    CHECK(near(k.dot(x.data(), weight.data(), n), product, sizes));
    std::vector<float> y(n);
    k.rms_norm(x.data(), weight.data(), 1e-5f, n, y.data());
    for (int i = 0; i < n; ++i) CHECK(near(y[i], x[i] / std::sqrt(squares / n + 1e-5) * weight[i], 0));
    auto sum = x;
    k.add(weight.data(), n, sum.data());
    for (int i = 0; i < n; ++i) CHECK(sum[i] == x[i] + weight[i]);
    const auto gate = normals(n, 20.0f);
    k.gated(gate.data(), x.data(), n, y.data());
    for (int i = 0; i < n; ++i) CHECK(near(y[i], gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * x[i], 1e-6));
  }
}

void encoders(const mar::Kernels& k) {
  for (int n : {1, 15, 16, 33}) {
    for (int steps : {1, 4, 16, 127})
      for (float precharge : {0.0f, 0.3f, 0.5f})
        for (int low : {0, -steps}) {
          std::vector<float> x(n), threshold(n);
          for (int i = 0; i < n; ++i) {
            threshold[i] = std::exp(normal());
            // Multiples and halves exactly, far beyond the last threshold, and anything.
            const float places[] = {integer(-steps, steps) * threshold[i], (integer(-steps, steps) - precharge) * threshold[i],
                                    normal(1e30f), normal(2.0f * steps), 0.0f, -0.0f};
            x[i] = places[integer(0, 5)];
          }
          std::vector<std::int8_t> found(n);
          k.encode(x.data(), threshold.data(), n, {low, steps, precharge}, found.data());
          for (int i = 0; i < n; ++i) {
            const float charge = precharge * threshold[i];
            const float whole = std::trunc((x[i] + std::copysign(charge, x[i])) / threshold[i]);
            CHECK(found[i] == std::clamp(whole, static_cast<float>(low), static_cast<float>(steps)));
          }
        }
    // What is no number gives some code in range.
    const std::vector<float> odd(n, std::nanf("")), ones(n, 1.0f), zeros(n, 0.0f);
    std::vector<std::int8_t> found(n);
    for (const auto* x : {&odd, &ones, &zeros})
      for (const auto* threshold : {&odd, &zeros}) {
        k.encode(x->data(), threshold->data(), n, {-4, 4, 0.5f}, found.data());
        for (int code : found) CHECK(code >= -4 && code <= 4);
      }
  }
}

void quantisers(const mar::Kernels& k) {
  for (int n : {1, 15, 16, 17, 72})
    for (float size : {1.0f, 1e-20f, 1e30f}) {
      const auto x = normals(n, size);
      std::vector<std::int8_t> found(n);
      const float scale = k.quantise(x.data(), n, found.data());
      float peak = 0;
      for (float value : x) peak = std::max(peak, std::fabs(value));
      CHECK(scale == peak / 127.0f);
      int most = 0;
      for (int i = 0; i < n; ++i) {
        CHECK(std::fabs(found[i] * static_cast<double>(scale) - x[i]) <= 0.5001 * scale);
        most = std::max(most, std::abs(found[i]));
      }
      CHECK(most == 127);
    }
  for (float tiny : {0.0f, 1e-45f, 1e-39f}) {  // a scale that cannot be inverted
    const std::vector<float> x(33, tiny);
    std::vector<std::int8_t> found(33, 1);
    const float scale = k.quantise(x.data(), 33, found.data());
    for (int code : found) CHECK(std::fabs(code * scale - tiny) <= 1e-38f);
  }
}

// Of any piece of an array, the places and codes that are not zero, with room for what may be written beyond them.
void lists(const mar::Kernels& k) {
  for (int n : {1, 7, 8, 9, 64, 100})
    for (double share : {0.0, 0.3, 1.0}) {
      const auto all = codes(n, -127, 127, share);
      for (int first : {0, 1, n / 2}) {
        std::vector<std::int32_t> index(n - std::min(first, n) + 7);
        std::vector<std::int8_t> listed(index.size());
        const int count = k.list_nonzero(all.data(), first, n, index.data(), listed.data());
        int wanted = 0;
        for (int i = first; i < n; ++i) {
          if (all[i] == 0) continue;
          CHECK(wanted < count && index[wanted] == i && listed[wanted] == all[i]);
          ++wanted;
        }
        CHECK(count == wanted);
      }
    }
}

// Codes and weights as large as they can be, in every mixture of signs of four rows: sums in too few bits would show.
void extremes(const mar::Kernels& k) {
  const int inputs = 3 * mar::kGroup + 4;
  for (Precision precision : {Precision::i8, Precision::i4})
    for (int weight : {0, 255})
      for (int pattern = 0; pattern < 18; ++pattern) {
        Weights weights(precision, inputs, 3 * mar::kSlice);
        std::fill(weights.bytes.begin(), weights.bytes.end(), static_cast<std::uint8_t>(weight));
        if (precision == Precision::i4) weights.add_stream();
        std::vector<std::int8_t> one(inputs);
        for (int i = 0; i < inputs; ++i) {
          const int size = pattern < 16 ? 127 : 64 + i % 2;  // at 64 and 65 two just pass what two products may be
          one[i] = static_cast<std::int8_t>(pattern >> i % 4 & 1 ? -size : size);
          if (pattern == 17 && i % 3 == 0) one[i] = 0;
        }
        for (bool all : {false, true}) {
          mar::Listing listing;
          listing.reserve(inputs, weights.linear.outputs());
          std::vector<float> out(weights.linear.outputs());
          listing.list_codes(k, weights.linear, one.data(), 0, inputs, nonzero(one, 0, inputs), all);
          listing.multiply(k, weights.linear, 0, weights.linear.slices, out.data(), false);
          for (int j = 0; j < 3 * mar::kSlice; ++j) {
            double wanted = 0;
            for (int i = 0; i < inputs; ++i) wanted += one[i] * weights.at(i, j);
            CHECK(near(out[j], wanted, 127 * std::fabs(weights.at(0, j))));
          }
        }
      }
}

// Rows that codes ask for, in shares of slices, and many tokens at once: all against the weights' own meaning.
void linears(const mar::Kernels& k) {
  for (Precision precision : kPrecisions)
    for (auto [inputs, outputs] : {std::pair{1, 1}, {5, 70}, {40, 300}, {63, 64}, {72, 450}, {128, 129}, {130, 129}}) {
      const Weights weights(precision, inputs, outputs);
      const mar::Linear& linear = weights.linear;
      const int wide = linear.outputs(), tokens = inputs % mar::kGroup ? 9 : 37;  // AMX takes 32 with whole groups
      std::vector<std::int8_t> many;
      std::vector<std::int32_t> sums;
      std::vector<float> values;
      std::vector<double> wanted, sizes;
      const auto token_scales = normals(tokens);
      std::vector<float> singles;
      for (int m = 0; m < tokens; ++m) {
        const auto one = codes(inputs, -127, 127, std::min(1.0, m / 8.0));
        many.insert(many.end(), one.begin(), one.end());
        many.resize(static_cast<std::size_t>(m + 1) * linear.rows, 0);
        values.insert(values.end(), one.begin(), one.end());
        for (int first = 0; first < inputs; first += precision == Precision::i4 ? mar::kGroup : inputs) {
          int sum = 0;
          for (int i = first; i < (precision == Precision::i4 ? std::min(inputs, first + mar::kGroup) : inputs); ++i) sum += one[i];
          sums.push_back(sum);
        }
        for (int j = 0; j < wide; ++j) {
          double sum = 0, size = 0;
          for (int i = 0; i < inputs; ++i) {
            sum += one[i] * weights.at(i, j);
            size += std::fabs(one[i] * weights.at(i, j));
          }
          wanted.push_back(sum);
          sizes.push_back(size);
        }
        mar::Listing listing;
        listing.reserve(inputs, wide);
        mar::Linear rows_only = linear, either = linear;
        rows_only.stream = {};
        either.whole_above = 0.4;
        for (const mar::Linear* how : {&rows_only, &either})
          for (bool all : {false, true})
            for (int parts : {1, 3}) {
              std::vector<float> out(wide);
              listing.list_codes(k, *how, one.data(), 0, inputs, nonzero(one, 0, inputs), all);
              for (int part = 0; part < parts; ++part) {
                const auto range = mar::share_slices(linear, part, parts);
                listing.multiply(k, *how, static_cast<int>(range.begin), static_cast<int>(range.end),
                                 out.data() + range.begin * mar::kSlice, false);
              }
              for (int j = 0; j < wide; ++j) CHECK(near(out[j], wanted[m * wide + j], sizes[m * wide + j]));
              if (how == &rows_only && !all && parts == 1) singles.insert(singles.end(), out.begin(), out.end());
              // However they are read: the choice is by time, and may not show.
              for (int j = 0; linear.integer() && j < wide; ++j) CHECK(out[j] == singles[static_cast<std::size_t>(m) * wide + j]);
            }
        // In two shares of the inputs, as threads take them where they add up.
        const int cut = inputs / 3;
        std::vector<float> first(wide), second(wide);
        for (auto [begin, end, to] : {std::tuple{0, cut, &first}, {cut, inputs, &second}}) {
          listing.list_codes(k, linear, one.data(), begin, end, nonzero(one, begin, end), true);
          listing.multiply(k, linear, 0, linear.slices, to->data(), false);
        }
        for (int j = 0; j < wide; ++j) CHECK(near(first[j] + second[j], wanted[m * wide + j], sizes[m * wide + j]));
      }
      // Block kernels read whole panels: one panel of all slices.
      std::vector<float> out(static_cast<std::size_t>(tokens) * wide);
      std::vector<std::uint8_t> scratch(mar::block_scratch(linear.rows));
      for (bool scaled : {false, true}) {
        if (scaled && !linear.integer()) continue;
        const float* scales = scaled ? token_scales.data() : nullptr;
        for (int slice = 0; slice < linear.slices; slice += linear.panel) {
          const mar::Block block = linear.block(slice, std::min(linear.panel, linear.slices - slice));
          float* to = out.data() + slice * mar::kSlice;
          const auto* i8 = static_cast<const float*>(linear.scales) + (linear.scales ? slice * mar::kSlice : 0);
          const auto* i4 = static_cast<const std::uint16_t*>(linear.scales) + (linear.scales ? slice * mar::kSlice : 0);
          switch (precision) {
            case Precision::f32: k.block_f32(block, inputs, values.data(), tokens, to, wide, scratch.data()); break;
            case Precision::bf16: k.block_bf16(block, inputs, values.data(), tokens, to, wide, scratch.data()); break;
            case Precision::i8:
              k.block_i8(block, linear.rows, i8, many.data(), sums.data(), scales, tokens, to, wide, scratch.data());
              break;
            default:
              k.block_i4(block, linear.rows, i4, wide, many.data(), sums.data(), scales, tokens, to, wide, scratch.data());
          }
        }
        for (int m = 0; m < tokens; ++m)
          for (int j = 0; j < wide; ++j) {
            const std::size_t at = static_cast<std::size_t>(m) * wide + j;
            const double factor = scaled ? token_scales[m] : 1.0;
            CHECK(near(out[at], wanted[at] * factor, sizes[at] * std::fabs(factor)));
            if (precision == Precision::i8 && !scaled) CHECK(out[at] == singles[at]);
          }
      }
    }
}

// Sums as large as they get: every weight and every code at an end of its range. Narrow sums would overflow.
void block_extremes(const mar::Kernels& k) {
  const int tokens = 13;
  for (Precision precision : {Precision::i8, Precision::i4})
    for (int inputs : {4, 12, 32, 36, 64, 68, 96, 128, 1536})
      for (int byte : {0, 255})
        for (int code : {-127, 127}) {
          Weights weights(precision, inputs, 2 * mar::kSlice);
          std::fill(weights.bytes.begin(), weights.bytes.end(), static_cast<std::uint8_t>(byte));
          const mar::Linear& linear = weights.linear;
          const int wide = linear.outputs(), group = precision == Precision::i4 ? mar::kGroup : inputs;
          const std::vector<std::int8_t> many(static_cast<std::size_t>(tokens) * inputs, static_cast<std::int8_t>(code));
          std::vector<std::int32_t> sums;
          for (int m = 0; m < tokens; ++m)
            for (int first = 0; first < inputs; first += group) sums.push_back(code * std::min(group, inputs - first));
          std::vector<float> out(static_cast<std::size_t>(tokens) * wide);
          std::vector<std::uint8_t> scratch(mar::block_scratch(inputs));
          const mar::Block block = linear.block(0, linear.slices);
          if (precision == Precision::i8)
            k.block_i8(block, inputs, static_cast<const float*>(linear.scales), many.data(), sums.data(), nullptr, tokens,
                       out.data(), wide, scratch.data());
          else
            k.block_i4(block, inputs, static_cast<const std::uint16_t*>(linear.scales), wide, many.data(), sums.data(),
                       nullptr, tokens, out.data(), wide, scratch.data());
          for (int j = 0; j < wide; ++j) {
            double wanted = 0, size = 0;
            for (int i = 0; i < inputs; ++i) {
              wanted += code * weights.at(i, j);
              size += std::fabs(code * weights.at(i, j));
            }
            for (int m = 0; m < tokens; ++m) CHECK(near(out[static_cast<std::size_t>(m) * wide + j], wanted, size));
          }
        }
}

// One listing goes from linear to linear: what it kept of one that was read whole is of no meaning to the next.
void listings(const mar::Kernels& k) {
  const int inputs = 130, outputs = 70;
  const Weights whole(Precision::i4, inputs, outputs), dense(Precision::f32, inputs, outputs);
  mar::Listing listing;
  listing.reserve(inputs, 2 * mar::kSlice);
  std::vector<float> out(2 * mar::kSlice);
  listing.list_codes(k, whole.linear, codes(inputs, -4, 4, 1).data(), 0, inputs, inputs, true);
  listing.multiply(k, whole.linear, 0, whole.linear.slices, out.data(), false);
  mar::Site site;
  site.linear = dense.linear;
  const auto x = normals(inputs);
  listing.list(k, site, x.data(), 0, inputs, nullptr, nullptr);
  listing.multiply(k, dense.linear, 0, dense.linear.slices, out.data(), false);
  for (int j = 0; j < outputs; ++j) {
    double wanted = 0, size = 0;
    for (int i = 0; i < inputs; ++i) {
      wanted += x[i] * dense.at(i, j);
      size += std::fabs(x[i] * dense.at(i, j));
    }
    CHECK(near(out[j], wanted, size));
  }
}

// A head in double precision, a token at a time, as mar.mixer states it.
struct Recurrence {
  mar::Head head;
  std::vector<std::vector<float>> seen;  // inputs of the convolution
  std::vector<double> state;

  std::vector<double> part(int first, int count) const {
    std::vector<double> y(count);
    for (int i = 0; i < count; ++i) {
      y[i] = head.conv_bias[first + i];
      for (int k = 0; k < head.taps; ++k)
        y[i] += static_cast<double>(head.conv_weight[k * head.channels + first + i]) * seen[seen.size() - head.taps + k][first + i];
    }
    return y;
  }

  std::vector<double> step(const float* gate, double log_decay) {
    auto x = part(head.x, head.width), b = part(head.b, head.size), c = part(head.c, head.size);
    if (head.unit)
      for (auto [v, length] : {std::pair{&b, 1.0}, {&c, std::sqrt(static_cast<double>(head.size))}}) {
        double squares = 1e-5;
        for (double one : *v) squares += one * one;
        for (double& one : *v) one *= length / std::sqrt(squares);
      }
    std::vector<double> y(head.width);
    for (int p = 0; p < head.width; ++p) {
      for (int n = 0; n < head.size; ++n) {
        double& s = state[n * head.width + p];
        s = s * std::exp(log_decay) + x[p] * b[n] * (head.gain ? -std::expm1(log_decay) : 1.0);
        y[p] += s * c[n];
      }
      const double open = static_cast<double>(gate[p]) + head.gate_bias[p];
      y[p] = (y[p] + head.skip * x[p]) * open / (1 + std::exp(-open));
    }
    return y;
  }
};

void heads(const mar::Kernels& k, int width, int size, int taps, bool gain, bool unit) {
  const int channels = width + 2 * size + 3, tokens = 150;  // more than two chunks; three channels are of no head
  const auto weight = normals(static_cast<std::size_t>(taps) * channels, 0.6f), bias = normals(channels, 0.3f);
  const auto gate_bias = normals(width), xbc = normals(static_cast<std::size_t>(tokens) * channels);
  const auto gates = normals(static_cast<std::size_t>(tokens) * width);
  std::vector<float> decays(tokens);
  for (auto& decay : decays) decay = integer(0, 9) == 0 ? -60.0f : -0.1f * std::fabs(normal());
  mar::Head head{};
  head.width = width, head.size = size, head.taps = taps, head.channels = channels;
  head.x = 1, head.b = 2 + width, head.c = 3 + width + size;
  head.gain = gain, head.unit = unit, head.skip = 0.7f;
  head.conv_weight = weight.data(), head.conv_bias = bias.data(), head.gate_bias = gate_bias.data();
  Recurrence truth{head, std::vector<std::vector<float>>(taps - 1, std::vector<float>(channels, 0.0f)),
                   std::vector<double>(static_cast<std::size_t>(size) * width)};
  std::vector<double> wanted;
  double largest = 0;
  for (int t = 0; t < tokens; ++t) {
    truth.seen.emplace_back(xbc.begin() + static_cast<std::ptrdiff_t>(t) * channels, xbc.begin() + static_cast<std::ptrdiff_t>(t + 1) * channels);
    const auto y = truth.step(gates.data() + t * width, decays[t]);
    wanted.insert(wanted.end(), y.begin(), y.end());
    for (double one : y) largest = std::max(largest, std::fabs(one));
  }
  for (const auto& lengths : {std::vector<int>{150}, {1, 1, 1, 147}, {64, 64, 22}, {2, 3, 70, 75}}) {
    std::vector<float> conv(static_cast<std::size_t>(taps - 1) * channels), state(static_cast<std::size_t>(size) * width);
    std::vector<float> scratch(mar::head_scratch(width, size, 0)), y(static_cast<std::size_t>(tokens) * width);
    head.conv_state = conv.data(), head.state = state.data();
    int at = 0;
    for (int length : lengths) {
      k.head_scan(head, xbc.data() + static_cast<std::size_t>(at) * channels, channels, gates.data() + static_cast<std::size_t>(at) * width, width,
                  decays.data() + at, 1, length, y.data() + static_cast<std::size_t>(at) * width, width, scratch.data());
      at += length;
    }
    for (std::size_t i = 0; i < y.size(); ++i) CHECK(near(y[i], wanted[i], largest, 4e-6));
    for (std::size_t i = 0; i < state.size(); ++i) CHECK(near(state[i], truth.state[i], largest, 4e-6));
    // The head's own channels of the last inputs; others are left alone.
    for (int tap = 0; tap < taps - 1; ++tap)
      for (int channel = 0; channel < channels; ++channel) {
        const bool own = (channel >= head.x && channel < head.x + width) || (channel >= head.b && channel < head.b + size) ||
                         (channel >= head.c && channel < head.c + size);
        CHECK(conv[tap * channels + channel] == (own ? truth.seen[tokens + tap][channel] : 0.0f));
      }
  }
}

}  // namespace

void test_kernels(const mar::Variant& variant) {
  const mar::Kernels& k = *variant.kernels;
  elementwise(k);
  encoders(k);
  quantisers(k);
  lists(k);
  extremes(k);
  linears(k);
  block_extremes(k);
  listings(k);
  heads(k, 8, 6, 4, true, true);
  heads(k, 64, 64, 4, true, true);
  heads(k, 16, 16, 1, false, true);
  heads(k, 1, 1, 16, true, false);
  heads(k, 80, 20, 2, true, true);
  heads(k, 24, 70, 16, false, false);
}
