"""Which precision training is faster in here, and what a forward pass in each runs under.

Does: time matrix products once a process. Does not: overrule settings that name one, or choose int8 by itself.
Some CPUs have bf16 only in name: one without AMX runs it at half the rate of fp32, and at a fifth if kept from its BF16
instructions (docs/lab-log.md).
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list

from mar import kernels
from mar.processes import this_process

TOKENS, WIDTH = 256, 768
"""Of a product like those of a small model's layers: 0.3 GFLOP."""

ROUNDS = 5
MARGIN = 1.25
"""How much faster fp32 must be before it is taken: it needs more memory, and timings waver."""


@cache
def matmul_rates(device: str) -> dict[str, float]:
    """GFLOP/s of linear layers in `bf16` and `fp32`, and in `int8` where it runs, rounding included: the best of a few
    turns of each, on torch's present threads."""
    seconds: dict[str, float] = {}
    weight = torch.ones(WIDTH, WIDTH, device=device)
    weights = {"bf16": weight.bfloat16(), "fp32": weight}
    if device == "cpu" and kernels.int8_runs():
        weights["int8"] = weight
    for turn in range(1 + ROUNDS):  # the first one warms up
        for name, right in weights.items():
            started = time.perf_counter()
            with torch.no_grad(), kernels.Int8Products() if name == "int8" else nullcontext():
                F.linear(right[:TOKENS], right).sum().item()  # the item waits for a GPU
            if turn:
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - started)
    return {name: 2 * TOKENS * WIDTH**2 / best / 1e9 for name, best in seconds.items()}


@cache
def faster_precision(device: str) -> str:
    """What `precision: auto` means on this device: `bf16`, or `fp32` where that is clearly faster; what the main
    process of a launch found, for all of them."""
    this_process()  # accelerate broadcasts among the processes that it was told of
    rates = matmul_rates(device)
    found = ["fp32" if rates["fp32"] > MARGIN * rates["bf16"] else "bf16"]
    return str(broadcast_object_list(found)[0])


def resolve_precision(precision: str, device: torch.device) -> str:
    """`bf16`, `fp32` or `int8`: `precision` itself, or what `auto` means on `device`.

    Raises ValueError for int8 where nothing can run it.
    """
    if precision == "int8" and (device.type != "cpu" or not kernels.int8_runs()):
        raise ValueError(
            f"precision is 'int8', which mar's native core runs on a CPU, but the student is on {device} and int8 is "
            f"{kernels.backends()['int8']!r}; use bf16, fp32 or auto."
        )
    return faster_precision(device.type) if precision == "auto" else precision


def forward_precision(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What the forward pass of this (resolved) precision runs under."""
    if precision == "int8":
        return kernels.Int8Products()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
