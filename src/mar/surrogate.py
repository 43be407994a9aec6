"""Backward shapes of a neuron's firing, looked up by name.

A neuron turns v = I / V into a staircase that rises by one at each of its thresholds, so its derivative is zero almost
everywhere. In the backward pass a smooth S(v) stands in for the staircase. The thresholds lie at k - shift for
k = 1..steps, and at their mirror images when the neuron is signed; shift is the pre-charge.

Does: give each shape as its derivative S' (`SURROGATES`, what training uses) and as S itself (`PRIMITIVES`, which lets
gradients be checked by finite differences). Does not: know about neurons, their units, or autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Shape = Callable[..., Tensor]
"""function(v, steps, shift=0.0, signed=True), elementwise, same shape and dtype as v."""

SLOPE = 4.0
"""Steepness of the logistic, chosen so that its derivative is 1 at a threshold, as that of the other windows."""


def ste_range(steps: int, signed: bool) -> tuple[float, float]:
    """Where the straight-through estimator lets gradients pass: half a level beyond the outermost codes."""
    return (-(steps + 0.5) if signed else -0.5), steps + 0.5


def _ste(v: Float[Tensor, "*n"], steps: int, shift: float = 0.0, signed: bool = True) -> Float[Tensor, "*n"]:
    low, high = ste_range(steps, signed)
    return ((v >= low) & (v <= high)).to(v.dtype)


def _ste_primitive(v: Float[Tensor, "*n"], steps: int, shift: float = 0.0, signed: bool = True) -> Float[Tensor, "*n"]:
    return v.clamp(*ste_range(steps, signed))


def _rectangle(v: Float[Tensor, "*n"], steps: int, shift: float = 0.0, signed: bool = True) -> Float[Tensor, "*n"]:
    # Windows of width 1 at distance 1 tile one interval; |v| keeps v = 0 from counting twice where two of them touch.
    w = v.abs() if signed else v
    return ((w >= 0.5 - shift) & (w <= steps + 0.5 - shift)).to(v.dtype)


def _rectangle_rise(v: Tensor, steps: int, shift: float) -> Tensor:
    return (v - (0.5 - shift)).clamp(0, steps)


def _triangle_window(v: Tensor, steps: int, shift: float) -> Tensor:
    # Triangles of half-width 1 at distance 1 add up to a trapezoid.
    return torch.minimum(v + shift, steps + 1 - shift - v).clamp(0, 1)


def _triangle_rise(v: Tensor, steps: int, shift: float) -> Tensor:
    def ramp(x: Tensor) -> Tensor:
        """Twice integrated step: x^2 / 2 on [0, 1], then x - 1/2."""
        return 0.5 * x.clamp(0, 1).square() + (x - 1).clamp(min=0)

    return ramp(v + shift) - ramp(v + shift - steps)


def _sum_windows(window: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int, float], Tensor]:
    def summed(v: Tensor, steps: int, shift: float) -> Tensor:
        total = window(v - (1 - shift))
        for k in range(2, steps + 1):
            total += window(v - (k - shift))
        return total

    return summed


def _logistic_window(x: Tensor) -> Tensor:
    p = torch.sigmoid(SLOPE * x)
    return SLOPE * p * (1 - p)


def _mirrored(one_sided: Callable[[Tensor, int, float], Tensor], parity: int) -> Shape:
    """The shape over all thresholds from the one over the positive ones; S' is even (parity 1), S is odd (-1)."""

    def shape(v: Float[Tensor, "*n"], steps: int, shift: float = 0.0, signed: bool = True) -> Float[Tensor, "*n"]:
        positive = one_sided(v, steps, shift)
        return positive + parity * one_sided(-v, steps, shift) if signed else positive

    return shape


SURROGATES: dict[str, Shape] = {
    "ste": _ste,
    "rectangle": _rectangle,
    "triangle": _mirrored(_triangle_window, 1),
    "arctan": _mirrored(_sum_windows(lambda x: (math.pi * x).square_().add_(1).reciprocal_()), 1),
    "sigmoid": _mirrored(_sum_windows(_logistic_window), 1),
}
"""S'(v). `ste` is 1 from half a level below the lowest code to half a level above the highest; every other shape is a
sum of windows of unit area and height 1, one at each threshold."""

PRIMITIVES: dict[str, Shape] = {
    "ste": _ste_primitive,
    "rectangle": _mirrored(_rectangle_rise, -1),
    "triangle": _mirrored(_triangle_rise, -1),
    "arctan": _mirrored(_sum_windows(lambda x: torch.atan(math.pi * x) / math.pi + 0.5), -1),
    "sigmoid": _mirrored(_sum_windows(lambda x: torch.sigmoid(SLOPE * x)), -1),
}
"""S(v), the function whose derivative is `SURROGATES`' entry of the same name."""
