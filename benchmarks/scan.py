"""The state-space scan, forward and backward, next to its reference, a plain chunked form, and transformers' Mamba-2.

Does: give all of them the same map (so that outputs and gradients can be compared), time them in turns, and put the
chunked form's arithmetic over the machine's matrix-product rate. Does not: time projections, convolution or gate.

    python benchmarks/scan.py [--json] [--length 2048] [--heads 9 32] [--dtypes fp32 bf16]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import plain
from mar import kernels
from mar.kernels import reference
from timing import alternate, arguments, environment, finish, matmuls, settings, show, speedup

Inputs = tuple[Float[Tensor, "b l h p"], Float[Tensor, "b l h"], Float[Tensor, "b l h n"], Float[Tensor, "b l h n"]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = 64
"""Width of a head and of its state."""

PROBE = (1024, 1024, 1024)
"""The matrix product whose rate stands for the machine's peak."""


def transformers_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """transformers' torch path for CPUs, at its own chunk size. It multiplies x by dt, which is undone here."""
    dt = -log_decay
    return mamba2_chunk_scan(x / dt[..., None], dt, log_decay.new_full((x.shape[2],), -1.0), b, c, chunk).to(x.dtype)


def implementations(chunk: int) -> dict[str, Callable[..., Tensor]]:
    """Name to a function of (x, log_decay, b, c) that gives y."""
    theirs = Mamba2Config().chunk_size
    return {
        "ours": lambda *inputs: kernels.scan(*inputs, chunk=chunk)[0],
        "reference": lambda *inputs: reference.scan_recurrent(*inputs)[0],
        "plain": lambda *inputs: plain.scan(*inputs, chunk=chunk)[0],
        "transformers": lambda *inputs: transformers_scan(*inputs, chunk=theirs),
    }


def make_inputs(batch: int, length: int, heads: int, dtype: torch.dtype, size: int = SIZE) -> tuple[Inputs, Tensor]:
    """x, log decay (rates from 0.003 to 1 a token, fp32), B, C, and a gradient for y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, heads, *shape, generator=generator).to(dtype)

    rates = torch.logspace(-2.5, 0, heads) * torch.empty(batch, length, heads).uniform_(0.5, 2, generator=generator)
    inputs = (normal(size), -rates, normal(size) / size**0.5, normal(size))
    return tuple(tensor.requires_grad_() for tensor in inputs), normal(size)  # type: ignore[return-value]


def gradients(function: Callable[..., Tensor], inputs: Inputs, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of all inputs."""
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def flops(batch: int, length: int, heads: int, chunk: int, size: int = SIZE) -> float:
    """Of the chunked form's matrix products, forward and backward, recomputation not counted.

    Per token and head: scores and their use (chunk * 2 size), state update and read (2 size^2), and twice that back.
    """
    return 2 * 3 * batch * length * heads * (2 * chunk * size + 2 * size * size)


def measure(batch: int, length: int, heads: int, dtype: torch.dtype, chunk: int, rounds: int) -> dict[str, Any]:
    """Medians, speed-ups over each peer, share of a large matrix product's rate, and how far results are apart."""
    inputs, dy = make_inputs(batch, length, heads, dtype)
    found = {name: gradients(function, inputs, dy) for name, function in implementations(chunk).items()}
    differences = {
        name: max(_rms_ratio(*pair) for pair in zip(tensors, found["reference"], strict=True))
        for name, tensors in found.items()
    }
    del found
    calls: dict[str, Callable[[], object]] = {
        name: lambda function=function: gradients(function, inputs, dy)
        for name, function in implementations(chunk).items()
    }
    probe, products = matmuls({PROBE: 1}, dtype)
    seconds = alternate(calls | {"matmul": probe}, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peak = products / medians.pop("matmul")
    work = flops(batch, length, heads, chunk)
    return {
        "milliseconds": {name: 1000 * median for name, median in medians.items()},
        "speedup": {name: speedup(seconds, "ours", name) for name in medians if name != "ours"},
        "matmul_peak_gflops": peak / 1e9,
        "share_of_matmul_peak": {name: work / median / peak for name, median in medians.items()},
        "difference_from_reference": differences,
    }


def _rms_ratio(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return (difference / expected.float().square().mean().sqrt()).item()


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, nargs="+", default=[9, 32])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--chunk", type=int, default=64, help="tokens a chunk, ours and plain")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each peer")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {
        "benchmark": "scan",
        "environment": environment(),
        "settings": settings(options)
        | {"head_size": SIZE, "state_size": SIZE, "transformers_chunk": Mamba2Config().chunk_size},
        "cases": {},
    }
    for name in options.dtypes:
        for heads in options.heads:
            figures = measure(options.batch, options.length, heads, DTYPES[name], options.chunk, options.rounds)
            found["cases"][f"{name}, {heads} heads"] = figures
            show(
                f"scan forward and backward, {name}, {options.length} tokens, {heads} heads",
                ["", "ms", "ours is faster by", "share of matmul peak", "RMS from reference"],
                [
                    [
                        peer,
                        milliseconds,
                        figures["speedup"].get(peer),
                        figures["share_of_matmul_peak"][peer],
                        figures["difference_from_reference"][peer],
                    ]
                    for peer, milliseconds in figures["milliseconds"].items()
                ],
            )
    finish(found, options)


if __name__ == "__main__":
    main()
