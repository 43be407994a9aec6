"""One name per op, each bound to the best backend for this machine and its tensors; `backends()` says which and why.

Does: name the ops and choose. mar's native core takes bf16 and fp32 tensors on a CPU, torch everything else. The
environment variable MAR_KERNELS forces `torch` or `native`. Does not: import anything else of mar.
"""

from __future__ import annotations

import os

from jaxtyping import Float, Int
from torch import Tensor

from mar.kernels import chunked, int8, native
from mar.kernels.chunked import scan_step
from mar.kernels.int8 import Int8Products, note_spikes
from mar.kernels.native import mean_spikes, mixer, staircase
from mar.kernels.pointwise import rms_norm, silu_product

__all__ = [
    "Int8Products",
    "backends",
    "causal_conv",
    "int8_entered",
    "int8_head",
    "int8_runs",
    "mean_spikes",
    "mixer",
    "mixer_takes",
    "note_spikes",
    "rms_norm",
    "scan",
    "scan_step",
    "silu_product",
    "staircase",
    "staircase_takes",
]


def _choose(forced: str | None) -> tuple[bool, str]:
    """Whether to use the core, and why. Raises ValueError if MAR_KERNELS cannot be followed."""
    if forced == "torch":
        return False, "MAR_KERNELS is 'torch'"
    if forced not in (None, "", "native"):
        raise ValueError(f"MAR_KERNELS is {forced!r}; use 'torch' or 'native', or unset it.")
    if forced == "native" and native.core is None:
        raise ValueError(f"MAR_KERNELS is 'native', but {native.REASON}; or unset MAR_KERNELS.")
    return native.core is not None, native.REASON


_NATIVE, _REASON = _choose(os.environ.get("MAR_KERNELS"))


def scan(
    x: Float[Tensor, "b l h p"],
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    state: Float[Tensor, "b h p n"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """As `reference.scan_recurrent`, differentiable in x, log_decay, b, c and state.

    chunk: tokens that torch takes in one matrix product; the native core has a size of its own.
    """
    if _NATIVE and native.takes(x) and b.numel() > 0 and log_decay.device == x.device:
        return native.scan(x, log_decay, b, c, state, document_ids)
    return chunked.scan(x, log_decay, b, c, state, document_ids, chunk)


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"],
    past: Float[Tensor, "b k_1 c"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """As `reference.causal_conv`, differentiable in x, weight, bias and past."""
    fits = _NATIVE and native.takes(x) and weight.shape[1] <= native.core.conv_taps
    return (native if fits else chunked).causal_conv(x, weight, bias, past, document_ids)


def mixer_takes(projected: Tensor, conv_weight: Tensor) -> bool:
    """Whether `mixer` can run: it has no torch version, which is `mar.mixer`'s own code."""
    return _NATIVE and native.takes(projected) and conv_weight.shape[1] <= native.core.conv_taps


def staircase_takes(current: Tensor) -> bool:
    """Whether `staircase` and `mean_spikes` can run: their torch versions are `mar.neurons`' own code."""
    return _NATIVE and native.takes(current)


def int8_head(weight: Tensor, hidden: Tensor) -> int8.Head | None:
    """The head in int8, if `Int8Products` is entered and it can be: `hidden` are all states that it will multiply."""
    return int8.head(weight, hidden)


def int8_entered() -> bool:
    """Whether `Int8Products` is entered."""
    return int8.entered()


def int8_runs() -> bool:
    """Whether `Int8Products` can run: it has no torch version."""
    return _NATIVE


def backends() -> dict[str, str]:
    """Op to 'backend: reason', as `mar info` prints it."""
    torch_only = {"scan_step": "torch: one fused update"}
    if not _NATIVE:
        ops = {
            "scan": "matrix products per chunk, hand-written backward",
            "causal_conv": "one library convolution",
            "mixer": "an op at a time",
            "staircase": "fp32 chunks that fit the cache",
            "mean_spikes": "an op at a time",
            "int8": "linear layers stay as they are",
        }
        return torch_only | {op: f"torch: {how} ({_REASON})" for op, how in ops.items()}
    ops = ("scan", "causal_conv", "mixer", "staircase", "mean_spikes", "int8")
    return torch_only | dict.fromkeys(ops, f"native: {_REASON}; torch for fp64 and for tensors not on a CPU")
