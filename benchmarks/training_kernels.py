"""The native training kernels next to torch's and the reference scan, forward and backward, and to memory bandwidth.

Does: time scan, convolution and staircase (ATMN) in turns with their torch versions, ATMN with the compiled closed form
too. Puts bytes that must move over time beside two triads of the same run: one on arrays far beyond the caches, which
is what memory gives, and one on tensors of the op's own size, which small sizes find in the caches. Freed memory is
kept, as asking the system for it anew takes longer than the ops. Does not: time projections.

    python benchmarks/training_kernels.py [--json] [--lengths 512 2048] [--heads 9 32] [--dtypes fp32 bf16]
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mar import kernels
from mar.config import NeuronConfig
from mar.kernels import chunked, native, reference
from mar.neurons import _ClosedForm, closed_form
from scan import DTYPES, SIZE, gradients, make_inputs
from timing import alternate, arguments, environment, finish, settings, show, speedup

TAPS = 4
MEMORY_MB = 256
"""Each array of the triad that measures memory."""

Peers = dict[str, Callable[[], object]]


def scan_peers(length: int, heads: int, dtype: torch.dtype) -> Peers:
    """The scan alone; the recurrence is what the others are compared with."""
    inputs, dy = make_inputs(1, length, heads, dtype)
    functions: dict[str, Callable[..., Any]] = {
        "native": native.scan,
        "torch": chunked.scan,
        "reference": reference.scan_recurrent,
    }
    return {
        name: lambda function=function: gradients(lambda *i: function(*i)[0], inputs, dy)
        for name, function in functions.items()
    }


def conv_peers(length: int, heads: int, dtype: torch.dtype) -> tuple[Peers, int]:
    """The convolution over x, B and C of all heads, and bytes moved: x and y; then x, dy and dx."""
    channels = 3 * heads * SIZE
    x = torch.randn(1, length, channels).to(dtype).requires_grad_()
    weight, bias = torch.randn(channels, TAPS).requires_grad_(), torch.randn(channels).requires_grad_()
    dy = torch.randn(1, length, channels).to(dtype)
    peers: Peers = {
        name: lambda module=module: gradients(module.causal_conv, (x, weight, bias), dy)  # type: ignore[arg-type]
        for name, module in (("native", native), ("torch", chunked))
    }
    return peers, 5 * x.numel() * x.element_size()


def atmn_peers(length: int, heads: int, dtype: torch.dtype) -> tuple[Peers, int]:
    """ATMN on a hidden state of heads * SIZE channels, and bytes moved: I and output; then I and both gradients."""
    config = NeuronConfig(precharge=0.5)
    current = torch.randn(length, heads * SIZE).to(dtype).requires_grad_()
    threshold = torch.rand(heads * SIZE).add(0.3).requires_grad_()
    dy = torch.randn(current.shape).to(dtype)

    def ours(current: Tensor, threshold: Tensor) -> Tensor:
        codes = (-float(config.time_steps), float(config.time_steps))
        return native.staircase(current, threshold, codes, (codes[0] - 0.5, codes[1] + 0.5), True)

    def torchs(current: Tensor, threshold: Tensor) -> Tensor:
        return _ClosedForm.apply(current, threshold, config)

    @torch.compile
    def compiled(current: Tensor, threshold: Tensor) -> Tensor:
        wide, edge = current.float(), config.time_steps + 0.5
        soft = (wide / threshold).clamp(-edge, edge)
        code = closed_form(wide.detach(), threshold.detach(), config)
        return (threshold * (soft + (code - soft).detach())).to(current.dtype)

    functions: dict[str, Callable[..., Tensor]] = {"native": ours, "torch": torchs, "compiled": compiled}
    peers: Peers = {
        name: lambda function=function: gradients(function, (current, threshold), dy)  # type: ignore[arg-type]
        for name, function in functions.items()
    }
    return peers, 5 * current.numel() * current.element_size()


def triad(count: int, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """a = b + 2 c over `count` elements, into a new tensor as the kernels' outputs are; and bytes moved."""
    b, c = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    return lambda: torch.add(b, c, alpha=2), 3 * count * b.element_size()


def memory() -> tuple[Callable[[], object], int]:
    """The same into an old tensor, all arrays too large for any cache: what memory gives; and bytes moved."""
    a, b, c = (torch.ones(MEMORY_MB * 2**18) for _ in range(3))
    return lambda: torch.add(b, c, alpha=2, out=a), 3 * a.numel() * a.element_size()


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, so that new tensors lie in pages that the process already has."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        allocator.mallopt(trim_threshold, 2**31 - 1)
        allocator.mallopt(mmap_max, 0)


def measure(length: int, heads: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Milliseconds and speed-ups of every op, and shares of the bandwidths of the triads that took their turns."""
    found: dict[str, Any] = {}
    large, large_bytes = memory()
    for op in ("scan", "causal_conv", "atmn"):
        moved = 0
        if op == "scan":
            peers = scan_peers(length, heads, dtype)
        else:
            peers, moved = (conv_peers if op == "causal_conv" else atmn_peers)(length, heads, dtype)
        probe, probed = triad(length * heads * SIZE * (3 if op == "causal_conv" else 1), dtype)
        # The recurrence takes seconds: its turns are few.
        slow = {"reference": peers.pop("reference")} if "reference" in peers else {}
        seconds = alternate(peers | {"triad": probe, "memory": large}, rounds)
        slow_seconds = alternate(slow, 1)
        medians = {name: statistics.median(times) for name, times in (seconds | slow_seconds).items()}
        bandwidth = {"memory": large_bytes / medians.pop("memory"), "triad": probed / medians.pop("triad")}
        found[op] = {
            "milliseconds": {name: 1000 * median for name, median in medians.items()},
            "speedup": {name: speedup(seconds, "native", name) for name in peers if name != "native"}
            | {name: medians[name] / medians["native"] for name in slow},
        }
        if moved:
            found[op]["megabytes_moved"] = moved / 1e6
            found[op]["gb_per_s"] = {name: rate / 1e9 for name, rate in bandwidth.items()}
            found[op]["share"] = {
                probe: {name: moved / median / rate for name, median in medians.items()}
                for probe, rate in bandwidth.items()
            }
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens, one row")
    parser.add_argument("--heads", type=int, nargs="+", default=[9, 32])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15, help="timed turns of each peer")
    options = parser.parse_args(argv)
    if native.core is None:
        raise SystemExit(f"There is nothing to measure: {native.REASON}.")
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    found: dict[str, Any] = {
        "benchmark": "kernels",
        "environment": environment() | {"backends": kernels.backends()},
        "settings": settings(options) | {"head_size": SIZE, "state_size": SIZE, "taps": TAPS},
        "cases": {},
    }
    for name in options.dtypes:
        for heads in options.heads:
            for length in options.lengths:
                case = f"{name}, {heads} heads, {length} tokens"
                figures = measure(length, heads, DTYPES[name], options.rounds)
                found["cases"][case] = figures
                show(
                    f"forward and backward, {case}",
                    ["", "ms", "than torch", "than compiled", "than reference", "MB moved", "of memory", "of triad"],
                    [
                        [
                            op,
                            row["milliseconds"]["native"],
                            row["speedup"]["torch"],
                            row["speedup"].get("compiled"),
                            row["speedup"].get("reference"),
                            row.get("megabytes_moved"),
                            *(
                                row["share"][probe]["native"] if "share" in row else None
                                for probe in ("memory", "triad")
                            ),
                        ]
                        for op, row in figures.items()
                    ],
                )
    finish(found, options)


if __name__ == "__main__":
    main()
