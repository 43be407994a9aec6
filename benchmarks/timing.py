"""What every benchmark shares: peers timed in turns, a probe of the machine, what it ran on, how it prints.

Does not: know what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

Name = TypeVar("Name", bound=Hashable)


def alternate(peers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by `turns`."""

    def timed(call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return turns({name: partial(timed, call) for name, call in peers.items()}, rounds)


def turns(peers: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """What each call returns, such as seconds by a clock of its own.

    Peers take turns, so that a busy machine slows all of them; first comes a turn each that does not count.
    """
    for call in peers.values():
        call()
    found: dict[Name, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name in list(peers) if turn % 2 == 0 else list(peers)[::-1]:
            found[name].append(peers[name]())
    return found


def speedup(seconds: Mapping[Name, list[float]], ours: Name, peer: Name) -> float:
    """How many times faster ours is: the median over the rounds, each of which timed both close together."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[peer], strict=True))


def matmuls(shapes: Mapping[tuple[int, int, int], int], dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A probe of the machine, to take its turn among the peers, and the floating-point operations of one call.

    It multiplies x (m, k) with the transpose of w (n, k). shapes: (m, k, n) to how many times.
    """
    pairs = [(torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), times) for (m, k, n), times in shapes.items()]

    def probe() -> None:
        for x, w, times in pairs:
            for _ in range(times):
                torch.mm(x, w.t())

    return probe, float(sum(2 * m * k * n * times for (m, k, n), times in shapes.items()))


def memory_read(threads: int, megabytes: int = 256) -> Callable[[], float]:
    """A probe of memory: seconds per byte of a plain read of one buffer, four times, by as many threads."""
    parts = np.array_split(np.ones(megabytes * 2**17, np.int64), threads)
    pool = ThreadPoolExecutor(threads)

    def probe() -> float:
        started = time.perf_counter()
        for _ in range(4):
            list(pool.map(np.bitwise_or.reduce, parts))
        return (time.perf_counter() - started) / (4 * megabytes * 2**20)

    return probe


def arguments(description: str | None, several_threads: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; several_threads: --threads takes a list."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    if several_threads:
        parser.add_argument("--threads", type=int, nargs="+", default=[cores()], help="by default one a core")
    else:
        parser.add_argument("--threads", type=int, default=cores(), help="torch threads; by default one a core")
    return parser


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx", "amx", "fma", "asimd", "bf16", "sve")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "cpu_features": sorted({flag for flag in flags if flag.startswith(wanted)}),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("mar", "torch", "transformers")},
    }


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table on stderr; numbers to three digits, None as a dash."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            *(f"{cell:.3g}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row)
        )
    Console(stderr=True).print(table)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options, but for the form of the output."""
    return {key: value for key, value in vars(options).items() if key != "json"}


def finish(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the one JSON object on stdout, if asked for; paths as text."""
    if options.json:
        json.dump(figures, sys.stdout, default=str)
        print()
