"""One event-driven linear over the density of its codes, next to the engine's own dense kernel of the same precision.

Does: time a stack of such linears, too large for the caches, that read only rows of non-zero codes, whatever their
density (a model's change over to the dense kernel is off), against the same
stack reading every row, for which int4 has an order of its own; and a plain read of as many bytes. Does not: encode, or
run a model.
Codes: of codes that are not zero, the sizes 1, 2, 3, 4 have shares 0.62, 0.23, 0.10, 0.05 (about those of a trained
student's sites), signs at random; or `--ternary` for codes of one size.

    python benchmarks/event_linear.py [--json] [--inputs 2048] [--outputs 8192] [--precision int8 int4 bf16] [--ternary]
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mar import _native
from mar.engine.layout import pack_linear
from mar.engine.pages import large_pages, read_into_large_pages
from timing import alternate, arguments, environment, finish, memory_read, settings, show, speedup, turns

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES, SHARES = (1, 2, 3, 4), (0.62, 0.23, 0.10, 0.05)


def codes_of(random: np.random.Generator, inputs: int, density: float, ternary: bool) -> NDArray[np.int8]:
    """Codes (inputs,) of which exactly round(density * inputs) are not zero."""
    count = round(density * inputs)
    codes = np.zeros(inputs, np.int8)
    sizes = np.ones(count) if ternary else random.choice(SIZES, count, p=SHARES)
    codes[random.choice(inputs, count, replace=False)] = sizes * random.choice((-1, 1), count)
    return codes


def stack(precision: str, inputs: int, outputs: int, layers: int, threads: int, seed: int) -> list[Any]:
    """Linears of random weights, in such pages as the engine reads its own into."""
    random = np.random.default_rng(seed)
    places: list[dict[str, slice]] = []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(layers):
            packed = pack_linear(random.standard_normal((outputs, inputs), np.float32), precision, _native.PANEL)
            places.append({})
            for kind, array in packed.items():
                start = file.tell()
                file.write(np.ascontiguousarray(array).tobytes())
                places[-1][f"linear.{kind}"] = slice(start, file.tell())
                file.write(bytes(-file.tell() % 64))
        file.flush()
        place = Path(file.name)
        weights = read_into_large_pages(place) if large_pages() else np.fromfile(place, np.uint8)
    return [
        _native.Linear(
            precision, inputs, outputs, {name: weights[at] for name, at in one.items()}, _native.PANEL, threads
        )
        for one in places
    ]


def run(linears: list[Any], codes: list[NDArray[np.int8]], dense: bool, out: NDArray[np.float32]) -> None:
    """One pass through the stack, each linear with codes of its own."""
    for linear, one in zip(linears, codes, strict=True):
        linear.multiply(one, dense, out)


def main() -> None:
    """Print the curve of each precision."""
    parser = arguments(__doc__)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--precision", nargs="+", default=["int8", "int4", "bf16"])
    parser.add_argument("--megabytes", type=int, default=200, help="of weights in a stack")
    parser.add_argument("--ternary", action="store_true", help="codes of one size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Any] = {"environment": environment(), "settings": settings(options), "precisions": {}}
    per_weight = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
    for precision in options.precision:
        size = options.inputs * options.outputs * per_weight[precision]
        layers = max(2, round(options.megabytes * 1e6 / size))
        linears = stack(precision, options.inputs, options.outputs, layers, options.threads, options.seed)
        out = np.empty((1, linears[0].outputs), np.float32)
        random = np.random.default_rng(options.seed)
        calls: dict[str, Callable[[], None]] = {}
        for density in DENSITIES:
            codes = [codes_of(random, options.inputs, density, options.ternary) for _ in range(layers)]
            calls[str(density)] = partial(run, linears, codes, False, out)
            if density == 1.0:
                calls["dense"] = partial(run, linears, codes, True, out)
        seconds = alternate(calls, options.rounds)
        read = statistics.median(turns({"read": memory_read(options.threads)}, 3)["read"])
        dense = statistics.median(seconds["dense"])
        figures["precisions"][precision] = {
            "layers": layers,
            "milliseconds_per_linear": {
                name: statistics.median(times) / layers * 1e3 for name, times in seconds.items()
            },
            "speedup_over_dense": {str(d): speedup(seconds, str(d), "dense") for d in DENSITIES},
            "dense_gigabytes_per_second": layers * size / dense / 1e9,
            "plain_read_gigabytes_per_second": 1 / read / 1e9,
        }
        one = figures["precisions"][precision]
        show(
            f"{precision}, {options.inputs} -> {options.outputs}, {options.threads} threads; dense reads "
            f"{one['dense_gigabytes_per_second']:.1f} GB/s, a plain read {one['plain_read_gigabytes_per_second']:.1f}",
            ["density", "ms", "times dense"],
            [[d, one["milliseconds_per_linear"][str(d)], one["speedup_over_dense"][str(d)]] for d in DENSITIES],
        )
    finish(figures, options)


if __name__ == "__main__":
    main()
