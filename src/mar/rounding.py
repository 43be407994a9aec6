"""A weight as small integers and scales: each weight to the nearest, or each input making up for those before it.

Does: codes and scales of one linear. numpy only. Does not: know a model's linears, or store codes (mar.compact).

The second way needs the second moment H of the linear's inputs. With e the errors of an output's weights, that output
is off by e^T H e on average. For H = U U^T with U upper triangular this is a sum over the inputs j, of
U_jj^2 (e_j + sum_{i<j} U_ij / U_jj e_i)^2: so input after input, what is rounded is w_j plus the errors of those before
it, as U shares them out. This is GPTQ (Frantar et al., ICLR 2023, after the optimal brain surgeon of Hassibi and Stork,
1993) without its inverse of H.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

GROUP = 64
"""Inputs that share a scale in int4 (csrc/kernels.hpp)."""

STEPS = 127
"""Sizes that an int4 scale can have beside zero, counted down from the weight's largest, see `size`."""

LEVELS = (-8.4, -8.0, -7.4, -6.8, -6.2, 7.4, 7.0, 6.5, 6.0)
"""Codes that a group's largest weight is tried at. -8 has no counterpart, so it goes there whatever its sign."""

DAMPING = 0.2
"""Added to the moment's diagonal, as a share of its mean: a few thousand tokens do not show all that inputs can do."""

PANEL = 1024
"""Outputs at a time: what is computed on them stays in the cache."""


def quantise_int8(rows: Array, short: bool = False) -> tuple[Array, Array]:
    """Codes in [-127, 127] (inputs, outputs) int8, and the scale of each output, fp32; short: one that is a bf16."""
    scales = np.abs(rows).max(0) / np.float32(127)
    if short:  # rounded up, so that no code is clipped
        scales = from_bf16((scales.view(np.uint32) + 0xFFFF >> 16).astype(np.uint16))
    codes = np.rint(rows / np.where(scales > 0, scales, np.float32(1)))
    return codes.astype(np.int8), scales


def quantise_int4(rows: Array, short: bool = False) -> tuple[Array, Array]:
    """Codes in [-8, 7] (inputs, outputs) int8, and scales (groups, outputs) in bits of bf16.

    Of several scales per group the one of least squared error is taken: the largest weight need not be met exactly.
    short: of those that a compact folder can store in 8 bits; the largest weight of all decides which these are.
    """
    groups = filled(rows, GROUP).reshape(-1, GROUP, rows.shape[1])
    codes, scales = np.empty(groups.shape, np.int8), np.empty((len(groups), rows.shape[1]), np.uint16)
    least = _least_size(rows) if short else None
    for index, group in enumerate(groups):
        for start in range(0, rows.shape[1], PANEL):
            part = slice(start, start + PANEL)
            codes[index, :, part], scales[index, part] = _quantise_group(group[:, part], least)
    return codes.reshape(-1, rows.shape[1])[: len(rows)], scales


def quantise_calibrated(rows: Array, moment: Array, precision: str) -> tuple[Array, Array]:
    """Codes and scales as of `quantise_int8` or `quantise_int4`, both short, fit for inputs with that second moment.

    moment: (inputs, inputs), the mean of x x^T or any multiple of it; it may be singular. Inputs that matter most come
    first, as those after them can still make up for their errors. In int4 that goes group by group: a group's scale is
    chosen when its first input comes up, for the weights as they are wanted by then.
    """
    inputs, outputs = rows.shape
    rows, moment = filled(rows, GROUP), filled(filled(moment.astype(np.float64), GROUP).T, GROUP)
    order = _most_important_first(moment.diagonal(), GROUP if precision == "int4" else len(rows))
    rows, scales, codes = rows[order], quantise_int8(rows, short=True)[1], np.empty(rows.shape, np.int8)
    shares, importance = _shares(moment[np.ix_(order, order)])
    block_scales, least = np.tile(scales, (len(rows) // GROUP, 1)), _least_size(rows)
    for left in range(0, outputs, PANEL):
        panel = slice(left, left + PANEL)
        weights, errors = rows[:, panel], np.zeros_like(rows[:, panel])
        for start in range(0, len(rows), GROUP):
            block, index = slice(start, start + GROUP), start // GROUP
            wanted = weights[block] + shares[:start, block].T @ errors[:start]
            if precision == "int4":
                block_scales[index, panel] = from_bf16(_quantise_group(wanted, least, importance[block])[1])
            codes[block, panel], errors[block] = _round_block(
                weights[block], wanted, shares[block, block], block_scales[index, panel], precision
            )
    back = np.argsort(order)
    if precision == "int4":
        scales = to_bf16(block_scales[back[::GROUP] // GROUP])
    return codes[back][:inputs], scales


def _round_block(weights: Array, wanted: Array, shares: Array, scale: Array, precision: str) -> tuple[Array, Array]:
    """Codes and errors of a block's inputs, one after the other; wanted: their weights, errors before the block in."""
    codes, errors = np.zeros_like(weights), np.zeros_like(weights)
    lowest, highest = (-8, 7) if precision == "int4" else (-127, 127)
    for row in range(len(weights)):
        target = wanted[row] + shares[:row, row] @ errors[:row]
        np.divide(target, scale, out=codes[row], where=scale != 0)
        codes[row] = np.rint(codes[row]).clip(lowest, highest)
        errors[row] = weights[row] - codes[row] * scale
    return codes, errors


def _most_important_first(energy: Array, width: int) -> Array:
    """An order of the inputs that keeps each `width` of them together."""
    groups = energy.reshape(-1, width)
    inside = np.argsort(-groups, axis=1, kind="stable") + width * np.arange(len(groups))[:, None]
    return inside[np.argsort(-groups.mean(1), kind="stable")].reshape(-1)


def _shares(moment: Array) -> tuple[Array, Array]:
    """U_ij / U_jj above the diagonal, (inputs, inputs), and U_jj^2 up to a factor, for the damped moment U U^T."""
    mean = moment.trace() / len(moment)
    moment[np.diag_indices_from(moment)] += DAMPING * mean if mean > 0 else 1.0
    upper = np.linalg.cholesky(moment[::-1, ::-1])[::-1, ::-1]
    importance = np.square(upper.diagonal())
    return (upper / upper.diagonal()).astype(np.float32), (importance / importance.max()).astype(np.float32)


def _quantise_group(group: Array, least: int | None, importance: Array | None = None) -> tuple[Array, Array]:
    """Codes of one group (GROUP, outputs), and each output's scale in bits of bf16, short above `least` if given.

    importance: (GROUP,) weighs the inputs' squared errors.
    """
    largest = group[np.abs(group).argmax(0), np.arange(group.shape[1])]
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_bits, best_codes = np.zeros(largest.shape, np.uint16), np.zeros(group.shape, np.float32)
    for level in LEVELS:
        scale = largest / np.float32(level)
        bits = to_bf16(scale) if least is None else _short_bits(scale, least)
        scale = from_bf16(bits)
        codes = np.rint(group / np.where(scale != 0, scale, np.float32(1))).clip(-8, 7)
        codes[:, scale == 0] = 0
        error = np.square(codes * scale - group)
        error = error.sum(0) if importance is None else importance @ error
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_bits, bits, where=better)
        np.copyto(best_codes, codes, where=better)
    return best_codes.astype(np.int8), best_bits


def _least_size(rows: Array) -> int:
    """What the sizes of a weight's short scales exceed, by STEPS at most."""
    largest = np.abs(rows).max(initial=np.float32(0), keepdims=True) / np.float32(min(map(abs, LEVELS)))
    return max(int(scale_size(_shortened(largest)).max()) - STEPS, 0)


def _short_bits(values: Array, least: int) -> Array:
    """Bits of bf16 with only three bits of mantissa: 0 below the sizes that are stored, the largest of them above."""
    bits = _shortened(values)
    size, most = scale_size(bits), least + STEPS
    bits = np.where(size > most, bits & 0x8000 | most << 4, bits)
    return np.where(size > least, bits, 0).astype(np.uint16)


def _shortened(values: Array) -> Array:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20 << 4).astype(np.uint16)


def scale_size(bits: Array) -> Array:
    """Exponent and three bits of mantissa as one number, eight to an octave."""
    return (bits >> 4 & 0x7FF).astype(np.int32)


def to_bf16(values: Array) -> Array:
    """Bits of bf16, rounded to the nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """Values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def filled(values: Array, multiple: int) -> Array:
    """Zeros added to the first dimension."""
    missing = -len(values) % multiple
    return np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) if missing else values
