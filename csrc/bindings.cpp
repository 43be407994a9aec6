// The Python module mar._native: the engine's model over packed arrays, and the training ops.
// Does: check what Python hands over, release the GIL while it works. Does not: read files or quantise.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

#include "isa.hpp"
#include "model.hpp"
#include "training.hpp"

namespace nb = nanobind;
using namespace nb::literals;

void bind_training(nb::module_& m, const mar::Training* table);

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<std::int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using GivenCodes = nb::ndarray<const std::int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const mar::Variant& variant() {
  static const mar::Variant chosen = [] {
    const char* forced = std::getenv("MAR_ISA");
    return mar::choose_variant(forced ? forced : "", mar::cpu_features());
  }();
  return chosen;
}

mar::Precision precision_of(const std::string& name) {
  static const std::map<std::string, mar::Precision> known = {{"fp32", mar::Precision::f32},
                                                              {"bf16", mar::Precision::bf16},
                                                              {"int8", mar::Precision::i8},
                                                              {"int4", mar::Precision::i4}};
  const auto found = known.find(name);
  if (found == known.end())
    throw std::invalid_argument("precision is '" + name + "'; use one of fp32, bf16, int8, int4.");
  return found->second;
}

// Fields of a model from a dict of integers and a dict of packed arrays, every size checked.
class Reader {
 public:
  Reader(const nb::dict& settings, const nb::dict& arrays, std::vector<Bytes>& kept)
      : settings_(settings), arrays_(arrays), kept_(kept) {}

  template <typename T>
  T setting(const std::string& name) const {
    T value{};
    if (!settings_.contains(name.c_str()) || !nb::try_cast<T>(settings_[name.c_str()], value, false))
      throw std::invalid_argument("The setting '" + name + "' is missing or of another type; pack the model again.");
    return value;
  }
  int integer(const char* name, int least = 1) const { return size(name, setting<std::int64_t>(name), least); }
  // Small enough that no product of three sizes and a few bytes leaves 64 bits.
  static int size(const char* name, std::int64_t value, int least = 1) {
    if (value < least || value > (1 << 24))
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", which makes no model.");
    return static_cast<int>(value);
  }
  bool has(const std::string& name) const { return arrays_.contains(name.c_str()); }

  const std::uint8_t* bytes(const std::string& name, std::size_t size) {
    if (!has(name)) throw std::invalid_argument("The packed model has no '" + name + "'; pack it again.");
    Bytes array;
    if (!nb::try_cast<Bytes>(arrays_[name.c_str()], array, false) ||
        reinterpret_cast<std::uintptr_t>(array.data()) % alignof(float) != 0)
      throw std::invalid_argument("'" + name + "' is no flat array of aligned bytes; pack the model again.");
    if (array.size() != size)
      throw std::invalid_argument("'" + name + "' has " + std::to_string(array.size()) + " bytes instead of " +
                                  std::to_string(size) + "; pack the model again.");
    kept_.push_back(array);
    return array.data();
  }
  const float* floats(const std::string& name, std::size_t count) {
    return reinterpret_cast<const float*>(bytes(name, count * sizeof(float)));
  }

  mar::Linear linear(const std::string& name, const std::string& precision, int inputs, int outputs) {
    mar::Linear linear{};
    size("inputs", inputs);
    size("outputs", outputs);
    linear.precision = precision_of(precision);
    // A sum of so many products of 8 bits fits 32.
    if (linear.integer() && inputs > (1 << 16))
      throw std::invalid_argument(name + " has " + std::to_string(inputs) + " inputs; in " + precision + " the engine takes up to 65536.");
    linear.inputs = inputs;
    linear.rows = linear.integer() ? (inputs + mar::kQuad - 1) / mar::kQuad * mar::kQuad : inputs;
    const int unit = linear.precision == mar::Precision::i4 ? 2 : 1;
    linear.slices = (outputs + unit * mar::kSlice - 1) / (unit * mar::kSlice) * unit;
    const int panels = (linear.slices + integer("panel") - 1) / integer("panel");
    linear.panel = (linear.slices + panels * unit - 1) / (panels * unit) * unit;
    linear.weights = bytes(name + ".weights", linear.weight_bytes());
    if (linear.integer()) linear.scales = bytes(name + ".scales", linear.scale_bytes());
    if (has(name + ".bias")) linear.bias = floats(name + ".bias", linear.outputs());
    if (linear.precision == mar::Precision::i4) linear.stream = stream(name + ".stream", inputs, outputs);
    return linear;
  }

  mar::Stream stream(const std::string& name, int inputs, int outputs) {
    mar::Stream stream{};
    stream.quads = (inputs + mar::kQuad - 1) / mar::kQuad;
    stream.pairs = (outputs + 2 * mar::kSlice - 1) / (2 * mar::kSlice);
    stream.weights = bytes(name + ".weights", stream.weight_bytes());
    stream.scales = reinterpret_cast<const std::uint16_t*>(bytes(name + ".scales", stream.scale_bytes()));
    return stream;
  }

  mar::Site site(const std::string& prefix, const std::string& name, int inputs, int outputs) {
    mar::Site site;
    site.linear = linear(prefix + name, setting<std::string>("precision"), inputs, outputs);
    if (has(prefix + name + ".threshold")) {
      site.threshold = floats(prefix + name + ".threshold", inputs);
      const auto encoder = setting<std::tuple<int, int, double>>(name + ".encoder");
      site.encoder = {std::get<0>(encoder), std::get<1>(encoder), static_cast<float>(std::get<2>(encoder))};
      if (site.encoder.low < -127 || site.encoder.low > 0 || site.encoder.high < 1 || site.encoder.high > 127)
        throw std::invalid_argument("The codes of " + name + " do not fit 8 bits; use time_steps of 1 to 127.");
      if (has(prefix + name + ".multiplier")) {
        site.multiplier = reinterpret_cast<const std::int8_t*>(bytes(prefix + name + ".multiplier", inputs));
        const int most = 127 / std::max(-site.encoder.low, site.encoder.high);
        for (int i = 0; i < inputs; ++i)
          if (site.multiplier[i] < 1 || site.multiplier[i] > most)
            throw std::invalid_argument("A multiplier of " + name + " takes codes beyond 8 bits; pack the model again.");
      }
    }
    return site;
  }

 private:
  const nb::dict& settings_;
  const nb::dict& arrays_;
  std::vector<Bytes>& kept_;
};

struct Engine {
  std::vector<Bytes> kept;  // keeps the arrays alive that the model points into
  mar::Model model;

  Engine(const nb::dict& settings, const nb::dict& arrays, int threads) : model(variant().kernels, threads) {
    Reader read(settings, arrays, kept);
    mar::Shape s{};
    s.vocab = read.integer("vocab_size");
    s.hidden = read.integer("hidden_size");
    s.ffn = read.integer("intermediate_size");
    s.layers = read.integer("num_hidden_layers");
    s.heads = read.integer("num_heads");
    s.width = read.integer("head_dim");
    s.size = read.integer("state_size");
    s.taps = read.integer("conv_kernel");
    if (s.taps > 16) throw std::invalid_argument("conv_kernel is " + std::to_string(s.taps) + "; the engine takes up to 16.");
    s.eps = static_cast<float>(read.setting<double>("rms_norm_eps"));
    if (!(s.eps >= 0 && s.eps < 1)) throw std::invalid_argument("rms_norm_eps is no number from 0 to 1; pack the model again.");
    s.gain = read.integer("gain", 0) != 0;
    s.unit = read.integer("unit", 0) != 0;
    s.window = read.integer("window", 0);
    s.rotary_base = read.setting<double>("rotary_base");
    if (s.window > (1 << 20) || (s.window && s.size % 2) || !(s.rotary_base > 0 && std::isfinite(s.rotary_base)))
      throw std::invalid_argument("window, state_size and rotary_base make no window; pack the model again.");
    Reader::size("num_heads * (2 head_dim + 2 state_size)", 2 * static_cast<std::int64_t>(s.heads) * (s.width + s.size));
    model.shape = s;
    for (int i = 0; i < s.layers; ++i) {
      const std::string at = "layers." + std::to_string(i) + ".";
      mar::Layer layer{};
      layer.in_proj = read.site(at, "in_proj", s.hidden, s.channels() + s.inner());
      layer.out_proj = read.site(at, "out_proj", s.inner(), s.hidden);
      layer.gate_up = read.site(at, "gate_up", s.hidden, 2 * ((s.ffn + mar::kSlice - 1) / mar::kSlice) * mar::kSlice);
      layer.down_proj = read.site(at, "down_proj", s.ffn, s.hidden);
      layer.mixer_norm = read.floats(at + "mixer_norm", s.hidden);
      layer.ffn_norm = read.floats(at + "ffn_norm", s.hidden);
      layer.decay_weight = read.floats(at + "decay_weight", static_cast<std::size_t>(s.heads) * s.hidden);
      layer.decay_bias = read.floats(at + "decay_bias", s.heads);
      layer.conv_weight = read.floats(at + "conv_weight", static_cast<std::size_t>(s.taps) * s.channels());
      layer.conv_bias = read.floats(at + "conv_bias", s.channels());
      layer.gate_bias = read.floats(at + "gate_bias", s.inner());
      layer.skip = read.floats(at + "skip", s.heads);
      model.layers.push_back(layer);
    }
    model.norm = read.floats("norm", s.hidden);
    model.head = read.linear("head", read.setting<std::string>("head_precision"), s.hidden, s.vocab);
    if (read.has("head.words")) {
      if (model.head.precision != mar::Precision::i8)
        throw std::invalid_argument("A head in two steps is in int8 first; pack the model again.");
      model.rough = read.stream("head.rough", s.hidden, s.vocab);
      model.words = reinterpret_cast<const std::int8_t*>(read.bytes("head.words", static_cast<std::size_t>(s.vocab) * s.hidden));
    }
    if (read.has("embedding")) model.embedding = read.bytes("embedding", static_cast<std::size_t>(s.vocab) * s.hidden * 4);
    model.finish();
  }

  void forward(const std::vector<mar::State*>& states, Tokens tokens, bool all, Logits logits) {
    const auto count = static_cast<std::int64_t>(tokens.size());
    if (count < 1) throw std::invalid_argument("There are no tokens; give at least one.");
    for (const mar::State* state : states) check(state);
    if (std::set<mar::State*>(states.begin(), states.end()).size() != states.size())
      throw std::invalid_argument("A state is given more than once; copy it to continue it in several ways.");
    const bool several = states.size() > 1;
    if (states.empty() || (several && static_cast<std::int64_t>(states.size()) != count))
      throw std::invalid_argument(std::to_string(states.size()) + " states do not go with " + std::to_string(count) +
                                  " tokens; give one state, or one token for each.");
    const std::size_t rows = several ? states.size() : all ? tokens.size() : 1;
    if (logits.shape(0) != rows || static_cast<int>(logits.shape(1)) != model.head.outputs())
      throw std::invalid_argument("logits must have " + std::to_string(rows) + " rows of " +
                                  std::to_string(model.head.outputs()) + ".");
    const std::int32_t* from = tokens.data();
    float* to = logits.data();
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(turn);
    model.forward(states, from, count, all, to);
  }

  void step_codes(mar::State& state, std::int32_t token, const std::optional<GivenCodes>& given, Codes taken, Logits logits) {
    check(&state);
    for (const std::size_t count : {taken.size(), given ? given->size() : taken.size()})
      if (count != model.code_count())
        throw std::invalid_argument("There are " + std::to_string(count) + " codes instead of " +
                                    std::to_string(model.code_count()) + ".");
    if (logits.shape(0) != 1 || static_cast<int>(logits.shape(1)) != model.head.outputs())
      throw std::invalid_argument("logits must have 1 row of " + std::to_string(model.head.outputs()) + ".");
    if (given) check_codes(given->data());
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(turn);
    model.step(state, token, logits.data(), given ? given->data() : nullptr, taken.data());
  }

  std::vector<std::vector<std::int64_t>> counts() {
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(turn);
    std::vector<std::vector<std::int64_t>> rows;
    for (const auto& one : model.counts()) rows.push_back({one.spikes, one.nonzero, one.rows, one.bytes});
    return rows;
  }

  void reset_counts() {
    nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(turn);
    model.reset_counts();
  }

 private:
  std::mutex turn;  // calls from several Python threads come one after the other

  void check(const mar::State* state) const {
    if (!state) throw std::invalid_argument("None is no state; make one with new_state().");
    if (state->conv.size() != model.conv_floats() || state->ssm.size() != model.ssm_floats() ||
        state->window.size() != model.window_floats())
      throw std::invalid_argument("The state belongs to a model of another shape; make it with this engine's new_state().");
  }

  // Codes beyond the neuron's own range would not fit 8 bits once they are multiplied.
  void check_codes(const std::int8_t* codes) const {
    for (const auto& layer : model.layers)
      for (const mar::Site* site : {&layer.in_proj, &layer.out_proj, &layer.gate_up, &layer.down_proj}) {
        for (int i = 0; site->threshold && i < site->linear.inputs; ++i)
          if (codes[i] < site->encoder.low || codes[i] > site->encoder.high)
            throw std::invalid_argument("The code " + std::to_string(codes[i]) + " is beyond its neuron's " +
                                        std::to_string(site->encoder.low) + " to " + std::to_string(site->encoder.high) + ".");
        codes += site->linear.inputs;
      }
  }
};

// One linear alone, for tests and benchmarks.
struct LinearAlone {
  std::vector<Bytes> kept;
  mar::Linear linear;
  std::shared_ptr<mar::Pool> pool;
  std::vector<mar::Listing> listings;

  LinearAlone(const LinearAlone&) = delete;
  LinearAlone(const std::string& precision, int inputs, int outputs, const nb::dict& arrays, int panel, int threads)
      : pool(mar::Pool::shared(threads)), listings(threads) {
    nb::dict settings;
    settings["panel"] = panel;
    linear = Reader(settings, arrays, kept).linear("linear", precision, inputs, outputs);
    for (auto& listing : listings) listing.reserve(linear.inputs, linear.outputs());
  }

  void multiply(Codes codes, bool all, Logits out) {
    if (static_cast<int>(codes.size()) != linear.inputs || static_cast<int>(out.size()) != linear.outputs())
      throw std::invalid_argument("codes must have " + std::to_string(linear.inputs) + " and out " +
                                  std::to_string(linear.outputs()) + " elements.");
    pool->run([&](int thread) {
      auto& listing = listings[thread];
      // As if few were asked for: rows unless all are wanted, whatever the density.
      listing.list_codes(*variant().kernels, linear, codes.data(), 0, linear.inputs, 0, all);
      const auto slices = mar::share_slices(linear, thread, pool->size());
      listing.multiply(*variant().kernels, linear, static_cast<int>(slices.begin), static_cast<int>(slices.end),
                       out.data() + slices.begin * mar::kSlice, false);
    });
  }
};

constexpr std::int64_t kMostTokens = std::int64_t{1} << 53;

template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> view(std::vector<T>& values, nb::handle owner) {
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(values.data(), {values.size()}, owner);
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("__doc__") = "mar's native core: the engine's model and the training ops. Use mar.engine and mar.kernels.";
  m.attr("SLICE") = mar::kSlice;
  m.attr("QUAD") = mar::kQuad;
  m.attr("GROUP") = mar::kGroup;
  m.attr("PANEL") = variant().kernels->panel;

  m.def("variant", [] {
    const auto& chosen = variant();
    nb::dict found;
    found["name"] = chosen.name;
    found["reason"] = chosen.reason;
    found["features"] = chosen.features;
    return found;
  });

  nb::class_<mar::State>(m, "State")
      .def_ro("tokens", &mar::State::tokens)
      .def("copy", [](const mar::State& state) { return mar::State(state); })
      .def("conv", [](nb::handle_t<mar::State> self) { return view(nb::cast<mar::State&>(self).conv, self); })
      .def("ssm", [](nb::handle_t<mar::State> self) { return view(nb::cast<mar::State&>(self).ssm, self); })
      .def("window", [](nb::handle_t<mar::State> self) { return view(nb::cast<mar::State&>(self).window, self); })
      .def("set_tokens", [](mar::State& state, std::int64_t tokens) {
        // A window's places come from it: what is negative, or runs over, would lie outside.
        if (tokens < 0 || tokens > kMostTokens) throw std::invalid_argument("tokens must be from 0 to 2^53.");
        state.tokens = tokens;
      });

  nb::class_<LinearAlone>(m, "Linear")
      .def(nb::init<const std::string&, int, int, const nb::dict&, int, int>(), "precision"_a, "inputs"_a, "outputs"_a,
           "arrays"_a, "panel"_a, "threads"_a)
      .def("multiply", &LinearAlone::multiply, "codes"_a.noconvert(), "all"_a, "out"_a.noconvert())
      .def_prop_ro("outputs", [](const LinearAlone& one) { return one.linear.outputs(); });

  nb::class_<Engine>(m, "Model")
      .def(nb::init<const nb::dict&, const nb::dict&, int>(), "settings"_a, "arrays"_a, "threads"_a)
      .def("new_state", [](const Engine& e) { return e.model.new_state(); })
      .def("forward", &Engine::forward, "states"_a, "tokens"_a.noconvert(), "all"_a, "logits"_a.noconvert())
      .def("step_codes", &Engine::step_codes, "state"_a, "token"_a, "given"_a.noconvert().none(), "taken"_a.noconvert(),
           "logits"_a.noconvert())
      .def_prop_ro("code_count", [](const Engine& e) { return e.model.code_count(); })
      .def_prop_ro("outputs", [](const Engine& e) { return e.model.head.outputs(); })
      .def_prop_ro("threads", [](const Engine& e) { return e.model.threads(); })
      .def_prop_ro("crossovers", [](const Engine& e) {
        const auto shares = e.model.crossovers();
        return std::vector<double>(shares.begin(), shares.end());
      })
      .def("reset_counts", &Engine::reset_counts)
      .def("counted_tokens", [](const Engine& e) { return e.model.counted_tokens; })
      .def("counts", &Engine::counts);

  bind_training(m, variant().training);
}
