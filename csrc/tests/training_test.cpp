// Each training kernel of a variant against a plain loop in double precision, at sizes that fill no vector, segment or
// chunk. Gradients are held to their definition: what the loss changes by when an input moves a little. int8 products
// are held to the last bit.
#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "../training.hpp"
#include "check.hpp"

using namespace tests;

namespace {

using Doubles = std::vector<double>;
using Sizes = std::vector<std::int64_t>;

// Values as a kernel reads and writes them, in memory that ends where they end.
struct Tensor {
  bool bf16 = false;
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;

  Tensor(std::size_t count, bool bf16) : bf16(bf16), wide(bf16 ? 0 : count, NAN), narrow(bf16 ? count : 0, 0x7fc0) {}
  Tensor(const std::vector<float>& values, bool bf16) : Tensor(values.size(), bf16) {
    if (bf16)
      std::transform(values.begin(), values.end(), narrow.begin(), to_bf16);
    else
      wide = values;
  }
  mar::Address address() const {
    return bf16 ? reinterpret_cast<mar::Address>(narrow.data()) : reinterpret_cast<mar::Address>(wide.data());
  }
  double operator[](std::size_t i) const { return bf16 ? from_bf16(narrow[i]) : wide[i]; }
  std::size_t size() const { return bf16 ? narrow.size() : wide.size(); }
  Doubles doubles() const {
    Doubles all;
    for (std::size_t i = 0; i < size(); ++i) all.push_back((*this)[i]);
    return all;
  }
  // (batch, token, head) of a dense tensor.
  mar::View view(std::int64_t length, std::int64_t heads, std::int64_t width) const {
    return {address(), length * heads * width, heads * width, width};
  }
};

Tensor random(std::size_t count, bool bf16 = false, float scale = 1.0f) { return Tensor(normals(count, scale), bf16); }

std::vector<std::int64_t> documents(std::int64_t batch, std::int64_t length) {
  std::vector<std::int64_t> ids;
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t t = 0, id = 0; t < length; ++t) ids.push_back(id += integer(0, 6) == 0);
  return ids;
}

template <class Found>
void check_close(const Found& found, const Doubles& wanted, double relative) {
  double largest = 1;  // sums that cancel are as wrong as their terms, which are of this size at least
  for (double one : wanted) largest = std::max(largest, std::fabs(one));
  for (std::size_t i = 0; i < wanted.size(); ++i)
    CHECK(std::fabs(found[i] - wanted[i]) <= relative * (largest + std::fabs(wanted[i])) + 1e-30);
}

double weighed(const Doubles& values, const Doubles& weights) {
  double total = 0;
  for (std::size_t i = 0; i < values.size(); ++i) total += values[i] * weights[i];
  return total;
}

// The gradient by `input` of a smooth loss, by differences in double precision.
Doubles slopes(Doubles& input, const std::function<double()>& loss) {
  Doubles gradient;
  for (double& value : input) {
    const double at = value, step = 1e-5;  // far less than 0.003, where short vectors of unit length curve
    value = at + step;
    const double above = loss();
    value = at - step;
    gradient.push_back((above - loss()) / (2 * step));
    value = at;
  }
  return gradient;
}

void convolution(const mar::Training& table, std::int64_t length, std::int64_t channels, std::int64_t taps, bool bf16) {
  const std::int64_t batch = 2;
  const bool packed = integer(0, 1), continues = integer(0, 1);
  const auto ids = documents(batch, length);
  const Tensor x = random(batch * length * channels, bf16), past = random(batch * (taps - 1) * channels, bf16);
  const Tensor weight = random(taps * channels), bias = random(channels), dy = random(x.size(), bf16);
  Tensor y(x.size(), bf16), dx(x.size(), bf16), dpast(past.size(), false);
  Tensor dweight(batch * weight.size(), false), dbias(batch * channels, false);
  mar::ConvCall call;
  call.batch = batch, call.length = length, call.channels = channels, call.taps = taps, call.bf16 = bf16;
  call.x = x.view(length, 1, channels), call.y = y.view(length, 1, channels);
  call.dy = dy.view(length, 1, channels), call.dx = dx.view(length, 1, channels);
  call.weight = weight.address(), call.bias = bias.address();
  call.dweight_parts = dweight.address(), call.dbias_parts = dbias.address();
  if (continues) call.past = past.address(), call.dpast = dpast.address();
  if (packed) call.document_ids = reinterpret_cast<mar::Address>(ids.data());
  for (std::int64_t item = 0; item < table.conv_items(call); ++item) {
    table.conv_forward(call, item);
    table.conv_backward(call, item);
  }
  Doubles wanted(x.size()), wanted_dx(x.size()), wanted_dpast(past.size());
  Doubles wanted_dweight(dweight.size()), wanted_dbias(dbias.size());
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t t = 0; t < length; ++t)
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::size_t at = (b * length + t) * channels + c;
        wanted[at] += bias[c];
        wanted_dbias[b * channels + c] += dy[at];
        for (std::int64_t back = 0; back < taps; ++back) {
          const std::int64_t from = t - back;
          if (packed && ids[b * length + std::max<std::int64_t>(from, 0)] != ids[b * length + t]) break;
          if (from < 0 && !continues) break;
          const std::size_t tap = (taps - 1 - back) * channels + c;
          const std::size_t before = (b * (taps - 1) + taps - 1 + from) * channels + c;
          const std::size_t source = (b * length + from) * channels + c;
          const double value = from < 0 ? past[before] : x[source];
          wanted[at] += weight[tap] * value;
          wanted_dweight[b * taps * channels + tap] += dy[at] * value;
          (from < 0 ? wanted_dpast[before] : wanted_dx[source]) += dy[at] * weight[tap];
        }
      }
  const double rounding = bf16 ? 0x1p-8 : 1e-6;
  check_close(y, wanted, rounding);
  check_close(dx, wanted_dx, rounding);
  check_close(dweight, wanted_dweight, 1e-5);
  check_close(dbias, wanted_dbias, 1e-5);
  if (continues) check_close(dpast, wanted_dpast, 1e-6);
}

void staircase(const mar::Training& table, std::int64_t rows, std::int64_t channels, bool bf16, float precharge) {
  const float steps = 4, pass = steps + 0.5f;
  std::vector<float> levels;
  for (float& one : levels = normals(channels, 0.3f)) one = std::exp(one);
  std::vector<float> currents(rows * channels);
  for (std::size_t i = 0; i < currents.size(); ++i) {
    // Multiples of V and halves between them exactly, what is far out, and anything.
    const float v = levels[i % channels];
    const float places[] = {integer(-6, 6) * v, (integer(-6, 6) - precharge) * v, normal(1e30f), normal(4.0f), 0.0f, -0.0f};
    currents[i] = places[integer(0, 5)];
  }
  const Tensor current(currents, bf16), threshold(levels, false);
  const Tensor gradient = random(current.size(), bf16);
  Tensor out(current.size(), bf16), dcurrent(current.size(), bf16);
  mar::StaircaseCall call;
  call.rows = rows, call.channels = channels, call.bf16 = bf16, call.precharge = precharge;
  call.low = -steps, call.high = steps, call.pass_low = -pass, call.pass_high = pass;
  call.current = current.address(), call.output = out.address();
  call.threshold = threshold.address();
  call.doutput = gradient.address(), call.dcurrent = dcurrent.address();
  Tensor parts(table.staircase_items(call) * channels, false);
  call.dthreshold_parts = parts.address();
  for (std::int64_t item = 0; item < table.staircase_items(call); ++item) {
    table.staircase_forward(call, item);
    table.staircase_backward(call, item);
  }
  Doubles wanted(channels), found(channels);
  for (std::size_t i = 0; i < current.size(); ++i) {
    const std::size_t c = i % channels;
    const float drive = static_cast<float>(current[i]), v = drive / levels[c], charge = precharge * levels[c];
    const float code = std::trunc(std::clamp((drive + std::copysign(charge, drive)) / levels[c], -steps, steps));
    const float emitted = code * levels[c];
    CHECK(bf16 ? std::fabs(out[i] - emitted) <= 0x1p-8 * std::fabs(emitted) : out[i] == emitted);
    CHECK(std::signbit(out[i]) == std::signbit(current[i]));
    const bool passes = v > -pass && v < pass;
    CHECK(dcurrent[i] == (passes ? gradient[i] : 0.0));
    wanted[c] += gradient[i] * (static_cast<double>(code) - (passes ? v : 0.0));
  }
  for (std::size_t i = 0; i < parts.size(); ++i) found[i % channels] += parts[i];
  check_close(found, wanted, 1e-5);

  std::vector<double> spent(table.staircase_items(call));
  call.spikes_parts = reinterpret_cast<mar::Address>(spent.data()), call.share = 0.125f;
  for (std::int64_t item = 0; item < table.staircase_items(call); ++item) {
    table.spikes_forward(call, item);
    table.spikes_backward(call, item);
  }
  double wanted_spikes = 0, spikes = 0;
  std::fill(wanted.begin(), wanted.end(), 0.0);
  std::fill(found.begin(), found.end(), 0.0);
  for (std::size_t i = 0; i < current.size(); ++i) {
    const std::size_t c = i % channels;
    const float drive = static_cast<float>(current[i]), v = drive / levels[c], charge = precharge * levels[c];
    wanted_spikes += std::fabs(std::trunc(std::clamp((drive + std::copysign(charge, drive)) / levels[c], -steps, steps)));
    const float slope = v == 0 || std::fabs(v) > steps ? 0.0f : std::copysign(0.125f / levels[c], v);
    CHECK(std::fabs(dcurrent[i] - slope) <= (bf16 ? 0x1p-8 : 0x1p-23) * std::fabs(slope));
    wanted[c] -= static_cast<double>(slope) * v;
  }
  for (const double part : spent) spikes += part;
  CHECK(spikes == wanted_spikes);
  for (std::size_t i = 0; i < parts.size(); ++i) found[i % channels] += parts[i];
  check_close(found, wanted, 1e-5);
}

// A scan's inputs in double precision, and the recurrence that it stands for.
struct Recurrence {
  std::int64_t batch = 0, length = 0, heads = 0, width = 0, size = 0;
  bool gain = false, unit = false, gated = false, skips = false;
  const std::int64_t* ids = nullptr;
  Doubles x, b, c, log_decay, first, z, z_bias, skip;

  Doubles vector(const Doubles& all, std::size_t token, double square) const {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(token * size);
    Doubles one(begin, begin + static_cast<std::ptrdiff_t>(size));
    double squares = 1e-5;
    for (double value : one) squares += value * value;
    if (unit)
      for (double& value : one) value *= std::sqrt(square / squares);
    return one;
  }

  // Outputs, then the last states.
  std::pair<Doubles, Doubles> run() const {
    Doubles out(x.size()), last;
    for (std::int64_t row = 0; row < batch * heads; ++row) {
      const std::int64_t n = row / heads, h = row % heads;
      const auto begin = first.begin() + static_cast<std::ptrdiff_t>(row * width * size);
      Doubles state(begin, begin + static_cast<std::ptrdiff_t>(width * size));
      for (std::int64_t t = 0; t < length; ++t) {
        const std::size_t token = (n * length + t) * heads + h;
        const bool cut = ids && t > 0 && ids[n * length + t] != ids[n * length + t - 1];
        const double decay = cut ? 0 : std::exp(log_decay[token]), scale = gain ? -std::expm1(log_decay[token]) : 1;
        const auto one = vector(b, token, 1), other = vector(c, token, static_cast<double>(size));
        for (std::int64_t p = 0; p < width; ++p) {
          const std::size_t at = token * width + p;
          double y = skips ? skip[h] * x[at] : 0;
          for (std::int64_t i = 0; i < size; ++i) {
            double& s = state[p * size + i];
            s = s * decay + scale * x[at] * one[i];
            y += s * other[i];
          }
          const double open = gated ? z[at] + z_bias[h * width + p] : 0;
          out[at] = gated ? y * open / (1 + std::exp(-open)) : y;
        }
      }
      last.insert(last.end(), state.begin(), state.end());
    }
    return {out, last};
  }
};

// parts: (batch, count) to count.
Doubles added_up(const Tensor& parts, std::size_t count) {
  Doubles sums(count);
  for (std::size_t i = 0; i < parts.size(); ++i) sums[i % count] += parts[i];
  return sums;
}

// whole: the gated op of a mixer; else the scan alone. Slopes take two runs of the recurrence a number, so shapes are
// small unless only the outputs are held.
void scan(const mar::Training& table, const Sizes& shape, bool whole, bool bf16, bool differentiate) {
  Recurrence truth;
  truth.batch = 2, truth.length = shape[0], truth.heads = shape[1], truth.width = shape[2], truth.size = shape[3];
  truth.gain = truth.gated = truth.skips = whole;
  truth.unit = whole && !bf16;
  const auto ids = documents(truth.batch, truth.length);
  if (whole) truth.ids = ids.data();
  const std::int64_t tokens = truth.batch * truth.length * truth.heads, rows = truth.batch * truth.heads;
  const std::int64_t inner = truth.heads * truth.width, chunks = (truth.length + table.chunk - 1) / table.chunk;
  std::vector<float> decays(tokens);
  for (float& one : decays) one = integer(0, 9) == 0 ? -60.0f : -0.2f * std::fabs(normal()) - 0.01f;
  const Tensor x = random(tokens * truth.width, bf16), b = random(tokens * truth.size, bf16);
  const Tensor c = random(tokens * truth.size, bf16), log_decay(decays, false), z = random(x.size(), bf16);
  const Tensor first = random(rows * truth.width * truth.size), z_bias = random(inner), skip = random(truth.heads);
  const Tensor dout = random(x.size(), bf16), dlast = random(first.size());
  Tensor out(x.size(), bf16), kept(x.size(), bf16), states(first.size() * chunks, false), last(first.size(), false);
  Tensor dx(x.size(), bf16), db(b.size(), bf16), dc(c.size(), bf16), dz(z.size(), bf16), dlog_decay(tokens, false);
  Tensor dfirst(first.size(), false), dskip(rows, false), dz_bias(truth.batch * inner, false);
  mar::ScanCall call;
  call.batch = truth.batch, call.length = truth.length, call.heads = truth.heads;
  call.width = truth.width, call.size = truth.size, call.bf16 = bf16, call.gain = truth.gain, call.unit = truth.unit;
  const auto wide = [&](const Tensor& of) { return of.view(truth.length, truth.heads, truth.width); };
  const auto long_ = [&](const Tensor& of) { return of.view(truth.length, truth.heads, truth.size); };
  call.x = wide(x), call.b = long_(b), call.c = long_(c), call.out = wide(out);
  call.dout = wide(dout), call.dx = wide(dx), call.db = long_(db), call.dc = long_(dc);
  call.log_decay = log_decay.address(), call.first = first.address(), call.states = states.address();
  call.last = last.address(), call.dlast = dlast.address(), call.dlog_decay = dlog_decay.address();
  call.dfirst = dfirst.address();
  if (whole) {
    call.document_ids = reinterpret_cast<mar::Address>(ids.data());
    call.skip = skip.address(), call.z = wide(z), call.z_bias = z_bias.address(), call.kept = kept.address();
    call.dz = wide(dz), call.dskip_parts = dskip.address(), call.dz_bias_parts = dz_bias.address();
  }
  // The kernels' memory starts at a cache line, and ends with the last float that they ask for.
  const auto floats = static_cast<std::size_t>(table.scan_scratch(call));
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  const std::unique_ptr<float, Free> scratch(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
  for (std::int64_t item = 0; item < rows; ++item) table.scan_forward(call, item, scratch.get());
  for (std::int64_t item = 0; item < rows; ++item) table.scan_backward(call, item, scratch.get());

  truth.x = x.doubles(), truth.b = b.doubles(), truth.c = c.doubles(), truth.log_decay = log_decay.doubles();
  truth.first = first.doubles(), truth.z = z.doubles(), truth.z_bias = z_bias.doubles(), truth.skip = skip.doubles();
  const auto [wanted, wanted_last] = truth.run();
  const double rounding = bf16 ? 0.03 : 1e-5;
  check_close(out, wanted, rounding);
  check_close(last, wanted_last, rounding);
  if (!differentiate) return;
  const Doubles dout_weights = dout.doubles(), dlast_weights = dlast.doubles();
  const auto loss = [&] {
    const auto [y, state] = truth.run();
    return weighed(y, dout_weights) + weighed(state, dlast_weights);
  };
  const double limit = bf16 ? 0.05 : 2e-5;
  check_close(dx, slopes(truth.x, loss), limit);
  check_close(db, slopes(truth.b, loss), limit);
  check_close(dc, slopes(truth.c, loss), limit);
  check_close(dlog_decay, slopes(truth.log_decay, loss), limit);
  check_close(dfirst, slopes(truth.first, loss), limit);
  if (!whole) return;
  check_close(dz, slopes(truth.z, loss), limit);
  check_close(added_up(dz_bias, inner), slopes(truth.z_bias, loss), limit);
  check_close(added_up(dskip, truth.heads), slopes(truth.skip, loss), limit);
}

template <class T>
mar::Address at(const std::vector<T>& values) {
  return values.empty() ? 0 : reinterpret_cast<mar::Address>(values.data());
}

// (rows, columns) with rows `stride` apart, in memory that ends with the last number; every size of float is among them.
std::vector<float> strided(std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  auto values = normals((rows - 1) * stride + columns);
  for (float& one : values) one *= std::exp2(static_cast<float>(integer(-3, 3)));
  return values;
}

// As kernels round: by the scale's reciprocal, halves to even.
int code(float value, float scale) {
  return scale > 0 ? static_cast<int>(std::nearbyint(std::clamp(value * (1.0f / scale), -127.0f, 127.0f))) : 0;
}

// Where byte (k, n) of a panelled matrix of `inner` rows lies: 32 columns a panel, four rows side by side.
std::size_t place(std::int64_t k, std::int64_t n, std::int64_t inner) {
  return n / 32 * 32 * inner + k / 4 * 128 + n % 32 * 4 + k % 4;
}

std::uint8_t lifted(int code) { return static_cast<std::uint8_t>(code + 128); }

void int8_rows(const mar::Training& table, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  auto x = strided(rows, columns, stride);
  const bool zeros = integer(0, 1);
  if (zeros) std::fill_n(x.begin() + static_cast<std::ptrdiff_t>((rows - 1) * stride), columns, 0.0f);
  std::vector<float> by;
  for (std::int64_t j = 0; j < columns; ++j) by.push_back(std::exp2(static_cast<float>(integer(-3, 3))) * 1.1f);
  std::vector<std::int8_t> codes(rows * columns);
  std::vector<float> scales(rows, NAN), maxima(columns, NAN);
  std::vector<std::int32_t> sums(rows);
  mar::Int8Rows call;
  call.rows = rows, call.columns = columns, call.stride = stride;
  call.input = at(x), call.scales = at(maxima);
  for (std::int64_t item = 0; item < columns / 32; ++item) table.int8_maxima(call, item);
  for (std::int64_t j = 0; j < columns; ++j) {
    float most = 0;
    for (std::int64_t i = 0; i < rows; ++i) most = std::max(most, std::fabs(x[i * stride + j]));
    CHECK(maxima[j] == most);
  }
  call.by = at(by), call.codes = at(codes), call.scales = at(scales), call.sums = at(sums);
  for (std::int64_t item = 0; item < table.int8_row_items(call); ++item) table.int8_rows(call, item);
  for (std::int64_t i = 0; i < rows; ++i) {
    float most = 0;
    std::int32_t sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) most = std::max(most, std::fabs(x[i * stride + j] * by[j]));
    CHECK(scales[i] == most / 127.0f);
    for (std::int64_t j = 0; j < columns; ++j) {
      CHECK(codes[i * columns + j] == code(x[i * stride + j] * by[j], scales[i]));
      sum += codes[i * columns + j];
    }
    CHECK(sums[i] == sum);
  }
  // Whole numbers keep their value, whatever the largest of a row is.
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(integer(-100, 100));
  std::fill(by.begin(), by.end(), 1.0f);
  call.whole = true;
  for (std::int64_t item = 0; item < table.int8_row_items(call); ++item) table.int8_rows(call, item);
  for (std::int64_t i = 0; i < rows; ++i) {
    CHECK(scales[i] == 1.0f);
    for (std::int64_t j = 0; j < columns; ++j) CHECK(codes[i * columns + j] == x[i * stride + j]);
  }
  // What is not finite shows in the scales of its row and nowhere else.
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const std::int64_t row = integer(0, static_cast<int>(rows) - 1);
    const std::int64_t column = integer(0, static_cast<int>(columns) - 1);
    const float was = std::exchange(x[row * stride + column], bad);
    for (const bool whole : {false, true}) {
      call.whole = whole, call.scales = at(scales);
      for (std::int64_t item = 0; item < table.int8_row_items(call); ++item) table.int8_rows(call, item);
      for (std::int64_t i = 0; i < rows; ++i) CHECK(std::isnan(scales[i]) == (i == row));
    }
    call.scales = at(maxima);
    for (std::int64_t item = 0; item < columns / 32; ++item) table.int8_maxima(call, item);
    for (std::int64_t j = 0; j < columns; ++j) CHECK(std::isfinite(maxima[j]) == (j != column));
    x[row * stride + column] = was;
  }
}

void int8_weights(const mar::Training& table, const Sizes& shape, std::int64_t stride) {
  const std::int64_t outputs = shape[0], inputs = shape[1];
  auto weight = strided(outputs, inputs, stride);
  std::fill_n(weight.begin() + static_cast<std::ptrdiff_t>(stride), inputs, 0.0f);
  std::vector<float> by;
  for (std::int64_t j = 0; j < inputs; ++j) by.push_back(std::exp(normal()));
  std::vector<float> scales(outputs, NAN);
  std::vector<std::uint8_t> panels(outputs * inputs);
  std::vector<std::int8_t> scratch(outputs / 32 * inputs);
  mar::Int8Weights call;
  call.outputs = outputs, call.inputs = inputs, call.stride = stride, call.weight = at(weight), call.by = at(by);
  call.scales = at(scales), call.panels = at(panels), call.scratch = at(scratch);
  for (std::int64_t item = 0; item < outputs / 32; ++item) table.int8_weights(call, item);
  for (std::int64_t o = 0; o < outputs; ++o) {
    float most = 0;
    for (std::int64_t i = 0; i < inputs; ++i) most = std::max(most, std::fabs(weight[o * stride + i] * by[i]));
    CHECK(scales[o] == most / 127.0f);
    for (std::int64_t i = 0; i < inputs; ++i)
      CHECK(panels[place(i, o, inputs)] == lifted(code(weight[o * stride + i] * by[i], scales[o])));
  }
}

void int8_turned(const mar::Training& table, const Sizes& shape, std::int64_t stride, bool weights) {
  const std::int64_t rows = shape[0], columns = shape[1];
  std::vector<std::uint8_t> panels(rows * columns);
  mar::Int8Turned call;
  call.rows = rows, call.columns = columns, call.stride = stride, call.weights = weights, call.panels = at(panels);
  const auto given = codes(static_cast<int>((rows - 1) * stride + columns), -127, 127, 0.8);
  call.codes = at(given);
  for (std::int64_t item = 0; item < columns / 32; ++item) table.int8_turned(call, item);
  for (std::int64_t t = 0; t < rows; ++t)
    for (std::int64_t j = 0; j < columns; ++j) CHECK(panels[place(t, j, rows)] == lifted(given[t * stride + j]));

  auto x = strided(rows, columns, stride);
  for (std::int64_t t = 0; t < rows; ++t) x[t * stride + columns / 2] = 0;
  std::vector<float> by;
  for (std::int64_t t = 0; t < rows; ++t) by.push_back(t % 7 == 3 ? 0.0f : std::exp(normal()));
  std::vector<float> scales(columns, NAN);
  std::vector<std::int32_t> sums(columns);
  call.codes = 0, call.input = at(x), call.by = at(by), call.scales = at(scales), call.sums = at(sums);
  for (std::int64_t item = 0; item < columns / 32; ++item) table.int8_turned(call, item);
  for (std::int64_t j = 0; j < columns; ++j) {
    float most = 0;
    std::int32_t sum = 0;
    for (std::int64_t t = 0; t < rows; ++t) most = std::max(most, std::fabs(x[t * stride + j] * by[t]));
    CHECK(scales[j] == most / 127.0f);
    for (std::int64_t t = 0; t < rows; ++t) {
      const int wanted = code(x[t * stride + j] * by[t], scales[j]);
      const std::uint8_t found = panels[place(t, j, rows)];
      CHECK(weights ? found == lifted(wanted) : static_cast<std::int8_t>(found) == wanted);
      sum += wanted;
    }
    CHECK(sums[j] == sum);
  }
  // What is not finite shows in its column, and in what that one is multiplied with.
  std::vector<std::uint8_t> others(32 * rows, lifted(1));
  const std::vector<float> ones(32, 1.0f);
  std::vector<float> out(columns * 32, NAN);
  mar::Int8Product product;
  product.rows = columns, product.columns = product.stride = 32, product.inner = rows, product.turned = true;
  product.codes = at(panels), product.scales = at(scales), product.sums = at(sums), product.panels = at(others);
  product.column_scales = at(ones), product.out = at(out);
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const std::int64_t row = integer(0, static_cast<int>(rows) - 1);
    const std::int64_t column = integer(0, static_cast<int>(columns) - 1);
    const float was = std::exchange(x[row * stride + column], bad);
    for (std::int64_t item = 0; item < columns / 32; ++item) table.int8_turned(call, item);
    for (std::int64_t item = 0; item < table.int8_product_items(product); ++item) table.int8_product(product, item);
    for (std::int64_t j = 0; j < columns; ++j) {
      CHECK(std::isfinite(scales[j]) == (j != column));
      for (std::int64_t n = 0; n < 32; ++n) CHECK(std::isfinite(out[j * 32 + n]) == (j != column));
    }
    x[row * stride + column] = was;
  }
}

void int8_product(const mar::Training& table, const Sizes& shape, bool turned) {
  const std::int64_t rows = shape[0], columns = shape[1], inner = shape[2];
  // Codes at both ends of what there is are among them, so that all sums are as large as they get.
  auto left = codes(static_cast<int>(rows * inner), -127, 127, 0.9);
  auto right = codes(static_cast<int>(inner * columns), -127, 127, 0.9);
  std::fill_n(left.begin(), inner, 127);
  for (std::int64_t k = 0; k < inner; ++k) right[k * columns] = 127, right[k * columns + 1] = -127;
  const auto scales = normals(rows), column_scales = normals(columns);
  std::vector<std::int32_t> sums(rows);
  std::vector<std::int8_t> laid(left.size());
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t k = 0; k < inner; ++k) {
      sums[m] += left[m * inner + k];
      laid[turned ? place(k, m, inner) : m * inner + k] = left[m * inner + k];
    }
  std::vector<std::uint8_t> panels(right.size());
  for (std::int64_t k = 0; k < inner; ++k)
    for (std::int64_t n = 0; n < columns; ++n) panels[place(k, n, inner)] = lifted(right[k * columns + n]);
  const std::int64_t stride = columns + 3;
  std::vector<float> out((rows - 1) * stride + columns, -1.5f);
  mar::Int8Product call;
  call.rows = rows, call.columns = columns, call.inner = inner, call.stride = stride, call.turned = turned;
  call.codes = at(laid), call.scales = at(scales), call.sums = at(sums), call.panels = at(panels);
  call.column_scales = at(column_scales), call.out = at(out);
  for (std::int64_t item = 0; item < table.int8_product_items(call); ++item) table.int8_product(call, item);
  for (std::int64_t m = 0; m < rows; ++m)
    for (std::int64_t n = 0; n < stride && m * stride + n < static_cast<std::int64_t>(out.size()); ++n) {
      if (n >= columns) {
        CHECK(out[m * stride + n] == -1.5f);  // between rows nothing is written
        continue;
      }
      std::int32_t sum = 0;
      for (std::int64_t k = 0; k < inner; ++k) sum += left[m * inner + k] * right[k * columns + n];
      CHECK(out[m * stride + n] == static_cast<float>(sum) * (column_scales[n] * scales[m]));
    }
}

void int8(const mar::Training& table) {
  for (std::int64_t columns : {32, 64, 96})
    for (std::int64_t stride : {columns, columns + 5}) {
      for (std::int64_t rows : {1, 2, 15, 16, 17, 33}) int8_rows(table, rows, columns, stride);
      for (std::int64_t rows : {4, 36, 96})
        for (bool weights : {false, true}) int8_turned(table, {rows, columns}, stride, weights);
      for (std::int64_t outputs : {32, 64, 96}) int8_weights(table, {outputs, columns}, stride);
    }
  for (std::int64_t inner : {4, 36, 96}) {
    for (std::int64_t rows = 1; rows <= 40; ++rows) int8_product(table, {rows, 32, inner}, false);
    for (std::int64_t columns : {64, 96}) {
      int8_product(table, {13, columns, inner}, false);
      int8_product(table, {300, columns, inner}, false);
    }
    for (std::int64_t rows : {32, 64, 96, 288})
      for (std::int64_t columns : {32, 96}) int8_product(table, {rows, columns, inner}, true);
  }
}

}  // namespace

void test_training(const mar::Variant& variant) {
  const mar::Training& table = *variant.training;
  int8(table);
  for (bool bf16 : {false, true}) {
    for (std::int64_t taps : {1, 2, 3, 4})
      for (std::int64_t length : {1, 2, 7, 8, 9, 33})
        for (std::int64_t channels : {1, 15, 16, 17, 70, 300}) convolution(table, length, channels, taps, bf16);
    convolution(table, 130, 300, 4, bf16);  // several segments and panels
    for (float precharge : {0.0f, 0.3f, 0.5f})
      for (std::int64_t rows : {1, 63, 64, 65})
        for (std::int64_t channels : {1, 15, 16, 17, 70}) staircase(table, rows, channels, bf16, precharge);
    for (bool whole : {false, true}) {
      scan(table, {1, 1, 1, 1}, whole, bf16, true);
      scan(table, {3, 2, 5, 3}, whole, bf16, true);
      scan(table, {table.chunk + 1, 1, 3, 2}, whole, bf16, true);
      scan(table, {table.chunk, 2, 17, 16}, whole, bf16, false);
      scan(table, {2 * table.chunk + 3, 2, 33, 64}, whole, bf16, false);
    }
  }
}
