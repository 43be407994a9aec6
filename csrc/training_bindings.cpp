// Python's side of the training kernels: descriptions of calls, and threads to run them on.
// Does: share items among the threads of the OpenMP runtime that torch has already loaded, so that two pools never fight
// for the cores. Does not: check pointers, shapes or types (mar.kernels.native does).
#include <nanobind/nanobind.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "training.hpp"

namespace nb = nanobind;

namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

// Memory of one thread, kept from call to call.
float* scratch(std::int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local std::int64_t size = 0;
  if (size < floats) {
    const std::size_t bytes = (static_cast<std::size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    size = memory ? floats : 0;
  }
  return memory.get();
}

struct Shared {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  std::int64_t items;
  void (*item)(const void* call, std::int64_t item, float* scratch, void* kernel);
  const void* call;
  void* kernel;
  std::int64_t floats;

  void work() {
    float* memory = floats ? scratch(floats) : nullptr;
    if (floats && !memory) {
      out_of_memory = true;
      return;
    }
    for (std::int64_t i = next++; i < items; i = next++) item(call, i, memory, kernel);
  }
};

void run(Shared& shared, int threads) {
  const nb::gil_scoped_release released;
  const auto work = [](void* data) { static_cast<Shared*>(data)->work(); };
  if (threads > shared.items) threads = static_cast<int>(shared.items);
  if (gomp_parallel && threads > 1)
    gomp_parallel(work, &shared, static_cast<unsigned>(threads), 0);
  else
    shared.work();
  if (shared.out_of_memory) throw std::bad_alloc();
}

template <class Call>
void run(void (*kernel)(const Call&, std::int64_t, float*), const Call& call, std::int64_t items, std::int64_t floats,
         int threads) {
  Shared shared;
  shared.items = items;
  shared.item = [](const void* of, std::int64_t i, float* memory, void* with) {
    reinterpret_cast<void (*)(const Call&, std::int64_t, float*)>(with)(*static_cast<const Call*>(of), i, memory);
  };
  shared.call = &call;
  shared.kernel = reinterpret_cast<void*>(kernel);
  shared.floats = floats;
  run(shared, threads);
}

template <class Call>
void run(void (*kernel)(const Call&, std::int64_t), const Call& call, std::int64_t items, int threads) {
  Shared shared;
  shared.items = items;
  shared.item = [](const void* of, std::int64_t i, float*, void* with) {
    reinterpret_cast<void (*)(const Call&, std::int64_t)>(with)(*static_cast<const Call*>(of), i);
  };
  shared.call = &call;
  shared.kernel = reinterpret_cast<void*>(kernel);
  shared.floats = 0;
  run(shared, threads);
}

}  // namespace

void bind_training(nb::module_& m, const mar::Training* table) {
  using mar::ConvCall;
  using mar::ScanCall;
  using mar::StaircaseCall;
  using mar::View;

  nb::class_<View>(m, "View")
      .def("__init__", [](View* view, mar::Address data, std::int64_t batch, std::int64_t token, std::int64_t head) {
        new (view) View{data, batch, token, head};
      });

#define MAR_FIELD(name) def_rw(#name, &Call::name)
  {
    using Call = ScanCall;
    nb::class_<Call>(m, "ScanCall").def(nb::init<>())
        .MAR_FIELD(batch).MAR_FIELD(length).MAR_FIELD(heads).MAR_FIELD(width).MAR_FIELD(size).MAR_FIELD(bf16)
        .MAR_FIELD(gain).MAR_FIELD(unit).MAR_FIELD(x).MAR_FIELD(b).MAR_FIELD(c).MAR_FIELD(log_decay)
        .MAR_FIELD(document_ids).MAR_FIELD(first).MAR_FIELD(skip).MAR_FIELD(z).MAR_FIELD(z_bias).MAR_FIELD(out)
        .MAR_FIELD(kept).MAR_FIELD(states).MAR_FIELD(last).MAR_FIELD(dout).MAR_FIELD(dlast).MAR_FIELD(dx)
        .MAR_FIELD(db).MAR_FIELD(dc).MAR_FIELD(dz).MAR_FIELD(dlog_decay).MAR_FIELD(dfirst).MAR_FIELD(dskip_parts)
        .MAR_FIELD(dz_bias_parts);
  }
  {
    using Call = ConvCall;
    nb::class_<Call>(m, "ConvCall").def(nb::init<>())
        .MAR_FIELD(batch).MAR_FIELD(length).MAR_FIELD(channels).MAR_FIELD(taps).MAR_FIELD(bf16).MAR_FIELD(x)
        .MAR_FIELD(y).MAR_FIELD(past).MAR_FIELD(weight).MAR_FIELD(bias).MAR_FIELD(document_ids).MAR_FIELD(dy)
        .MAR_FIELD(dx).MAR_FIELD(dpast).MAR_FIELD(dweight_parts).MAR_FIELD(dbias_parts);
  }
  {
    using Call = StaircaseCall;
    nb::class_<Call>(m, "StaircaseCall").def(nb::init<>())
        .MAR_FIELD(rows).MAR_FIELD(channels).MAR_FIELD(bf16).MAR_FIELD(precharge).MAR_FIELD(low).MAR_FIELD(high)
        .MAR_FIELD(pass_low).MAR_FIELD(pass_high).MAR_FIELD(current).MAR_FIELD(output).MAR_FIELD(threshold)
        .MAR_FIELD(doutput).MAR_FIELD(dcurrent).MAR_FIELD(dthreshold_parts).MAR_FIELD(spikes_parts).MAR_FIELD(share);
  }
  {
    using Call = mar::Int8Rows;
    nb::class_<Call>(m, "Int8Rows").def(nb::init<>())
        .MAR_FIELD(rows).MAR_FIELD(columns).MAR_FIELD(stride).MAR_FIELD(whole).MAR_FIELD(input).MAR_FIELD(by)
        .MAR_FIELD(codes).MAR_FIELD(scales).MAR_FIELD(sums);
  }
  {
    using Call = mar::Int8Weights;
    nb::class_<Call>(m, "Int8Weights").def(nb::init<>())
        .MAR_FIELD(outputs).MAR_FIELD(inputs).MAR_FIELD(stride).MAR_FIELD(weight).MAR_FIELD(by).MAR_FIELD(scales)
        .MAR_FIELD(panels).MAR_FIELD(scratch);
  }
  {
    using Call = mar::Int8Turned;
    nb::class_<Call>(m, "Int8Turned").def(nb::init<>())
        .MAR_FIELD(rows).MAR_FIELD(columns).MAR_FIELD(stride).MAR_FIELD(weights).MAR_FIELD(codes).MAR_FIELD(input)
        .MAR_FIELD(by).MAR_FIELD(scales).MAR_FIELD(sums).MAR_FIELD(panels);
  }
  {
    using Call = mar::Int8Product;
    nb::class_<Call>(m, "Int8Product").def(nb::init<>())
        .MAR_FIELD(rows).MAR_FIELD(columns).MAR_FIELD(inner).MAR_FIELD(stride).MAR_FIELD(turned).MAR_FIELD(codes)
        .MAR_FIELD(scales).MAR_FIELD(sums).MAR_FIELD(panels).MAR_FIELD(column_scales).MAR_FIELD(out);
  }
#undef MAR_FIELD

  m.def("set_gomp", [](mar::Address address) { gomp_parallel = reinterpret_cast<GompParallel>(address); });
  m.attr("scan_chunk") = table->chunk;
  m.attr("conv_taps") = 4;  // most taps that the convolution is compiled for

  m.def("scan_forward", [table](const ScanCall& call, int threads) {
    run(table->scan_forward, call, call.batch * call.heads, table->scan_scratch(call), threads);
  });
  m.def("scan_backward", [table](const ScanCall& call, int threads) {
    run(table->scan_backward, call, call.batch * call.heads, table->scan_scratch(call), threads);
  });
  m.def("conv_forward", [table](const ConvCall& call, int threads) {
    run(table->conv_forward, call, table->conv_items(call), threads);
  });
  m.def("conv_backward", [table](const ConvCall& call, int threads) {
    run(table->conv_backward, call, table->conv_items(call), threads);
  });
  m.def("staircase_items", [table](const StaircaseCall& call) { return table->staircase_items(call); });
  m.def("staircase_forward", [table](const StaircaseCall& call, int threads) {
    run(table->staircase_forward, call, table->staircase_items(call), threads);
  });
  m.def("staircase_backward", [table](const StaircaseCall& call, int threads) {
    run(table->staircase_backward, call, table->staircase_items(call), threads);
  });
  m.def("spikes_forward", [table](const StaircaseCall& call, int threads) {
    run(table->spikes_forward, call, table->staircase_items(call), threads);
  });
  m.def("spikes_backward", [table](const StaircaseCall& call, int threads) {
    run(table->spikes_backward, call, table->staircase_items(call), threads);
  });
  m.def("int8_rows", [table](const mar::Int8Rows& call, int threads) {
    run(table->int8_rows, call, table->int8_row_items(call), threads);
  });
  m.def("int8_maxima", [table](const mar::Int8Rows& call, int threads) {
    run(table->int8_maxima, call, call.columns / 32, threads);
  });
  m.def("int8_weights", [table](const mar::Int8Weights& call, int threads) {
    run(table->int8_weights, call, call.outputs / 32, threads);
  });
  m.def("int8_turned", [table](const mar::Int8Turned& call, int threads) {
    run(table->int8_turned, call, call.columns / 32, threads);
  });
  m.def("int8_product", [table](const mar::Int8Product& call, int threads) {
    run(table->int8_product, call, table->int8_product_items(call), threads);
  });
}
