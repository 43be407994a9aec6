// What the training kernels share: tensors by address, and what the table (training.cpp) takes from other files.
// Included inside each variant only. Nothing of the standard library's templates is used in these kernels: the linker
// would merge their code across instruction sets.
#pragma once

#include "training.hpp"
#include "training_vectors.hpp"

namespace mar::MAR_VARIANT {

using Count = std::int64_t;

constexpr Count kChunk = 64;  // tokens between two kept states of the scan

Count scan_scratch(const ScanCall& call);
void scan_forward(const ScanCall& call, Count item, float* memory);
void scan_backward(const ScanCall& call, Count item, float* memory);
Count conv_items(const ConvCall& call);
void conv_forward(const ConvCall& call, Count item);
void conv_backward(const ConvCall& call, Count item);
Count staircase_items(const StaircaseCall& call);
void staircase_forward(const StaircaseCall& call, Count item);
void staircase_backward(const StaircaseCall& call, Count item);
void spikes_forward(const StaircaseCall& call, Count item);
void spikes_backward(const StaircaseCall& call, Count item);
Count int8_row_items(const Int8Rows& call);
void int8_rows(const Int8Rows& call, Count item);
void int8_maxima(const Int8Rows& call, Count item);
void int8_weights(const Int8Weights& call, Count item);
void int8_turned(const Int8Turned& call, Count item);
Count int8_product_items(const Int8Product& call);
void int8_product(const Int8Product& call, Count item);

namespace {

template <class T>
inline const T* input(Address address, Count offset = 0) {
  return reinterpret_cast<const T*>(address) + offset;
}
template <class T>
inline T* output(Address address, Count offset = 0) {
  return reinterpret_cast<T*>(address) + offset;
}
template <class T>
inline T* row(const View& view, Count batch, Count token, Count head = 0) {
  return reinterpret_cast<T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}
inline bool starts_document(Address ids, Count batch, Count length, Count token) {
  if (!ids || token == 0) return false;
  const std::int64_t* id = input<std::int64_t>(ids, batch * length + token);
  return id[0] != id[-1];
}

}  // namespace
}  // namespace mar::MAR_VARIANT
