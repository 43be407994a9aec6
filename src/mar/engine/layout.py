"""Weights in the order in which the engine's kernels read them (csrc/kernels.hpp); numpy only.

Does: lay out one linear's values or codes. Does not: quantise by data (mar.rounding), name or write what makes a model
(mar.engine.pack).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mar.compact import Quantised, filled, quantise, to_bf16

SLICE, QUAD = 64, 4
"""Outputs of a cache line in int8; rows multiplied at once (csrc/kernels.hpp)."""

PANEL = 18
"""Slices of one panel at most: long enough for a row's piece to be worth a jump, short enough to stay in the cache. The
kernels of a CPU may like others (`mar._native.PANEL`)."""

Array = NDArray[Any]


def alternate(gate: Array, up: Array) -> Array:
    """Rows (outputs) of gate and up in turn, a slice of each, so that one thread has both halves of a product."""
    halves = [filled(half, SLICE).reshape(-1, SLICE, *half.shape[1:]) for half in (gate, up)]
    return np.stack(halves, axis=1).reshape(-1, *gate.shape[1:])


def pack_linear(weight: Array, precision: str, panel: int = PANEL) -> dict[str, Array]:
    """What the engine reads of a weight (outputs, inputs): its "weights" as panels of input-major rows.

    fp32, bf16: the values. int8, int4: see `pack_codes`.
    """
    if precision not in ("fp32", "bf16"):
        return pack_codes(quantise(weight, precision), panel=panel)
    rows = np.ascontiguousarray(filled(weight, SLICE).T)  # inputs, outputs
    return {"weights": _panels(to_bf16(rows) if precision == "bf16" else rows, panel)}


def pack_codes(*parts: Quantised, panel: int = PANEL) -> dict[str, Array]:
    """A quantised weight, or gate and up in turn, as panels of input-major rows, its "scales", in int4 its "stream".

    int8: q + 128, one fp32 scale an output. int4: q + 8, an even slice in low and the odd one after it in high nibbles,
    one bf16 scale per GROUP inputs and output, shape (groups, outputs), of two slices as `scale_place` in
    csrc/kernels.hpp has it; and the same once more as `pack_stream` has it.
    """
    codes, scales = parts[0].codes, parts[0].scales
    if len(parts) == 2:
        codes, scales = alternate(codes, parts[1].codes), alternate(scales, parts[1].scales)
    if parts[0].precision == "int8":
        rows = filled(filled(codes, SLICE).T, QUAD) + np.int16(128)
        return {"weights": _panels(rows.astype(np.uint8), panel), "scales": filled(scales, SLICE)[:, 0]}
    rows = (filled(filled(codes, 2 * SLICE).T, QUAD) + 8).astype(np.uint8)
    halves = rows.reshape(len(rows), -1, 2, SLICE)
    stored = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(rows), -1)
    # Of (half, a, b, c) in 2 x 4 x 4 x 4 outputs b comes first and half last.
    in_place = filled(scales, 2 * SLICE).T.reshape(scales.shape[1], -1, 2, 4, 4, 4).transpose(0, 1, 4, 3, 5, 2)
    found = {"weights": _panels(stored, panel // 2), "scales": in_place.reshape(scales.shape[1], -1)}
    return found | {f"stream.{name}": array for name, array in pack_stream(codes, scales).items()}


def pack_stream(codes: Array, scales: Array) -> dict[str, Array]:
    """Codes (outputs, inputs) and scales (outputs, groups) in int4 as csrc/kernels.hpp's Stream orders them."""
    rows = (filled(filled(codes, 2 * SLICE).T, QUAD) + 8).astype(np.uint8)
    parts = rows.reshape(-1, QUAD, rows.shape[1] // (2 * SLICE), 2, 2, SLICE // 2)
    low, high = parts.transpose(3, 2, 4, 0, 5, 1)  # of: pair, half, quad, output, input
    by_pair = filled(scales, 2 * SLICE).reshape(-1, 2 * SLICE, scales.shape[1])
    return {"weights": low | (high << 4), "scales": by_pair.transpose(0, 2, 1)}


def _panels(stored: Array, most: int) -> Array:
    """Rows in panels of at most so many times SLICE columns, their widths as equal as can be, one after the other."""
    lines = stored.shape[1] // SLICE
    width = -(-lines // -(-lines // most)) * SLICE
    panels = [stored[:, start : start + width].reshape(-1) for start in range(0, stored.shape[1], width)]
    return np.concatenate(panels)
