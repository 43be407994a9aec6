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
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def alternate(peers: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call. Peers take turns, so that a busy machine slows all of them; first an untimed turn each."""
    for call in peers.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(rounds):
        names = list(peers) if turn % 2 == 0 else list(peers)[::-1]
        for name in names:
            started = time.perf_counter()
            peers[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def speedup(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
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


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
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
    """The options as JSON values."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {key: value for key, value in plain.items() if key != "json"}


def finish(figures: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the one JSON object on stdout, if asked for."""
    if options.json:
        json.dump(figures, sys.stdout)
        print()
