"""Which precision training is faster in here.

Does: time matrix products in bf16 and fp32 once a process. Does not: autocast, or overrule settings that name one.
Some CPUs have bf16 only in name: one without AMX runs it at half the rate of fp32, and at a fifth if kept from its BF16
instructions (docs/lab-log.md).
"""

from __future__ import annotations

import time
from functools import cache

import torch
from accelerate.utils import broadcast_object_list

from mar.processes import this_process

TOKENS, WIDTH = 256, 768
"""Of a product like those of a small model's layers: 0.3 GFLOP."""

ROUNDS = 5
MARGIN = 1.25
"""How much faster fp32 must be before it is taken: it needs more memory, and timings waver."""


@cache
def matmul_rates(device: str) -> dict[str, float]:
    """GFLOP/s of matrix products in `bf16` and `fp32`: the best of a few turns of each, on torch's present threads."""
    seconds: dict[str, float] = {}
    weight = torch.ones(WIDTH, WIDTH, device=device)
    weights = {"bf16": weight.bfloat16(), "fp32": weight}
    for turn in range(1 + ROUNDS):  # the first one warms up
        for name, right in weights.items():
            started = time.perf_counter()
            (right[:TOKENS] @ right).sum().item()  # the item waits for a GPU
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
    """`bf16` or `fp32`: `precision` itself, or what `auto` means on `device`."""
    return faster_precision(device.type) if precision == "auto" else precision
