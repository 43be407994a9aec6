#include "linear.hpp"

#include <algorithm>

namespace mar {

std::size_t Linear::slice_bytes() const {
  switch (precision) {
    case Precision::f32: return kSlice * 4;
    case Precision::bf16: return kSlice * 2;
    case Precision::i8: return kSlice;
    default: return kSlice / 2;
  }
}

std::size_t Linear::scale_bytes() const {
  if (precision == Precision::i8) return sizeof(float) * outputs();
  if (precision == Precision::i4) return sizeof(std::uint16_t) * outputs() * groups();
  return 0;
}

Block Linear::block(int slice, int count) const {
  const int start = slice / panel * panel;
  const std::size_t stride = std::min(panel, slices - start) * slice_bytes();
  return {weights + static_cast<std::size_t>(rows) * start * slice_bytes() + (slice - start) * slice_bytes(), stride,
          count};
}

// Slices of one thread; in int4 they come in twos.
Range share_slices(const Linear& linear, int part, int parts) {
  const int unit = linear.precision == Precision::i4 ? 2 : 1;
  const Range units = share(linear.slices / unit, part, parts);
  return {units.begin * unit, units.end * unit};
}

void Listing::reserve(int inputs, int outputs) {
  // Up to three more for every group that has to be filled up to a quad; and whole groups.
  const int most = inputs + (inputs / kGroup + 2) * kQuad + 2 * kGroup;
  index_.resize(most);
  listed_.resize(most);
  values_.resize(most);
  codes_.resize(inputs);
  sums_.resize(outputs);
}

void Listing::list(const Kernels& k, const Site& site, const float* x, int begin, int end, const std::int8_t* given,
                   std::int8_t* taken) {
  const Linear& linear = site.linear;
  std::int8_t* codes = codes_.data();
  token_scale_ = 1.0f;
  spikes_ = nonzero_ = 0;
  piece_ = {};
  if (!site.threshold && !linear.integer()) {
    for (int i = begin; i < end; ++i) {
      index_[i - begin] = i;
      values_[i - begin] = x[i];
    }
    nonzero_ = end - begin;
    rows_ = {index_.data(), listed_.data(), values_.data(), end - begin};
    return;
  }
  if (site.threshold) {
    k.encode(x + begin, site.threshold + begin, end - begin, site.encoder, codes + begin);
    if (taken) std::copy(codes + begin, codes + end, taken + begin);
    if (given) std::copy(given + begin, given + end, codes + begin);
    spikes_ = count_spikes(codes + begin, end - begin);
    nonzero_ = count_nonzero(codes + begin, end - begin);
    if (site.multiplier) multiply_codes(codes + begin, site.multiplier + begin, end - begin);
  } else {
    token_scale_ = k.quantise(x, linear.inputs, codes);
    nonzero_ = count_nonzero(codes + begin, end - begin);
  }
  list_codes(k, linear, codes, begin, end, nonzero_, false);
}

void Listing::list_codes(const Kernels& k, const Linear& linear, const std::int8_t* codes, int begin, int end,
                         std::int64_t nonzero, bool all) {
  const int group = linear.precision == Precision::i4 ? kGroup : linear.inputs;
  group_ends_.clear();
  group_sums_.clear();
  piece_ = {};
  if (linear.stream.weights && begin < end && (all || static_cast<double>(nonzero) > linear.whole_above * (end - begin))) {
    piece_.group = begin / kGroup;
    piece_.groups = (end + kGroup - 1) / kGroup - piece_.group;
    const int first = piece_.group * kGroup;
    std::fill_n(listed_.data(), piece_.groups * kGroup, static_cast<std::int8_t>(0));
    std::copy(codes + begin, codes + end, listed_.data() + begin - first);
    group_sums_.resize(piece_.groups);
    for (int g = 0; g < piece_.groups; ++g) {
      group_sums_[g] = sum_codes(listed_.data() + g * kGroup, kGroup);
    }
    rows_ = {nullptr, listed_.data(), nullptr, end - begin};
    return;
  }
  int count = 0;
  for (int first = begin; first < end;) {
    const int last = std::min(end, (first / group + 1) * group);
    const int start = count;
    if (all) {
      for (int i = first; i < last; ++i) index_[start + i - first] = i;
      std::copy(codes + first, codes + last, listed_.data() + start);
      count += last - first;
    } else {
      count += k.list_nonzero(codes, first, last, index_.data() + start, listed_.data() + start);
    }
    if (linear.integer()) {
      for (; count % kQuad; ++count) {
        index_[count] = index_[count - 1];  // is read anyway
        listed_[count] = 0;
      }
    } else {
      for (int r = start; r < count; ++r) values_[r] = listed_[r];
    }
    if (count > start) {
      group_ends_.push_back(count);
      group_sums_.push_back(sum_codes(codes + first, last - first));
    }
    first = last;
  }
  rows_ = {index_.data(), listed_.data(), values_.data(), count};
}

void Listing::multiply(const Kernels& k, const Linear& linear, int begin, int end, float* to, bool plain) {
  if (piece_.groups > 0) {
    k.stream_i4(linear.stream, {begin / 2, (end - begin) / 2, piece_.group, piece_.groups}, listed_.data(), group_sums_.data(), to);
    if (token_scale_ != 1.0f)
      for (int j = 0; j < (end - begin) * kSlice; ++j) to[j] *= token_scale_;
    return;
  }
  for (int slice = begin; slice < end;) {
    const int here = std::min(end, (slice / linear.panel + 1) * linear.panel) - slice;
    const Block block = linear.block(slice, here);
    float* out = to + (slice - begin) * kSlice;
    const int n = here * kSlice;
    switch (linear.precision) {
      case Precision::f32: k.rows_f32(block, rows_, out); break;
      case Precision::bf16: k.rows_bf16(block, rows_, out); break;
      case Precision::i8: {
        std::int32_t* sums = sums_.data();
        k.rows_i8(block, rows_, sums);
        const std::int32_t off = 128 * (group_sums_.empty() ? 0 : group_sums_[0]);
        if (plain) {
          auto* raw = reinterpret_cast<std::int32_t*>(out);
          for (int j = 0; j < n; ++j) raw[j] = sums[j] - off;
        } else {
          const float* scales = static_cast<const float*>(linear.scales) + slice * kSlice;
          for (int j = 0; j < n; ++j) out[j] = static_cast<float>(sums[j] - off) * (scales[j] * token_scale_);
        }
        break;
      }
      case Precision::i4: {
        const auto* scales = static_cast<const std::uint16_t*>(linear.scales) + slice * kSlice;
        k.rows_i4(block, rows_,
                  {group_ends_.data(), group_sums_.data(), scales, static_cast<std::size_t>(linear.outputs())}, out);
        if (token_scale_ != 1.0f)
          for (int j = 0; j < n; ++j) out[j] *= token_scale_;
        break;
      }
    }
    slice += here;
  }
}

}  // namespace mar
