"""Energy per token: a census of operations priced by a table, where two curves cross, and the CPU's own counter.

Does: price a census with published 45 nm figures, compute only or with memory traffic; compare models side by side;
read the energy counter where the machine has one. Does not: count operations (mar.census), measure spike rates
(mar.spikes) or draw plots (mar.report).

Whatever comes from a census is modelled, and its label says so and where its spike rates come from.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mar.census import COMPONENTS, Census, Number, Op, Rates, census, parameters
from mar.config import SITES, MarConfig, NeuronConfig, site_neurons
from mar.spikes import SiteRate

__all__ = [
    "MEMORIES",
    "TABLES",
    "Arithmetic",
    "Census",
    "CostTable",
    "EnergyReport",
    "MeasuredEnergy",
    "break_even",
    "census",
    "compare",
    "cost",
    "crossing",
    "curve",
    "energy",
    "measured_energy",
    "parameters",
]


@dataclass(frozen=True)
class Arithmetic:
    """Picojoules of one multiply and one addition; `accumulate` is the addition into a running sum."""

    multiply: float
    accumulate: float

    def price(self, op: Op) -> float:
        """An operation without a published price is free."""
        both = {"mac": self.multiply + self.accumulate, "multiply": self.multiply}
        return {**both, "ac": self.accumulate, "add": self.accumulate}.get(op, 0.0)


@dataclass(frozen=True)
class CostTable:
    """Prices per class of arithmetic in COMPONENTS (pJ per operation) and the bytes of one stored value."""

    linear: Arithmetic
    attention: Arithmetic
    element: Arithmetic
    state: Arithmetic
    weight_bytes: int
    cache_bytes: int
    state_bytes: int = 4
    source: str = "M. Horowitz, Computing's energy problem, ISSCC 2014, 45 nm"


FP32 = Arithmetic(multiply=3.7, accumulate=0.9)
FP16 = Arithmetic(multiply=1.1, accumulate=0.4)
INT8 = Arithmetic(multiply=0.2, accumulate=0.1)
"""Products of 8-bit integers are summed in 32 bits (0.1 pJ), so Horowitz's 8-bit addition (0.03 pJ) is never used."""

TABLES: dict[str, CostTable] = {
    "45nm-fp32": CostTable(FP32, FP32, FP32, FP32, weight_bytes=4, cache_bytes=4),
    "45nm-fp16": CostTable(FP16, FP16, FP16, FP32, weight_bytes=2, cache_bytes=2),
    "45nm-int8": CostTable(INT8, INT8, FP16, FP32, weight_bytes=1, cache_bytes=1),
}
"""`45nm-fp32` is the paper's. The KV cache has the linears' width, which favours the quantised LLaMA."""

MEMORIES: dict[str, float] = {
    "dram-low": 1300 / 8,
    "dram-high": 2600 / 8,
    "sram-1MB": 100 / 8,
    "sram-32KB": 20 / 8,
    "sram-8KB": 10 / 8,
}
"""Picojoules per byte moved, from the same source (given there per 64-bit access)."""


@dataclass(frozen=True)
class EnergyReport:
    """Modelled microjoules per token. memory: the priced memory, or None for compute only.

    decoder: the paper's total, which leaves out the LM head and the neurons' own work. head: the LM head, which never
    sees spikes. neuron: our own line, comparing and resetting at each of T steps. special: operations without a price.
    """

    decoder: float
    head: float
    neuron: float
    special: Number
    by_component: dict[str, float]
    by_group: dict[str, float]
    table: str
    memory: str | None
    context: Number
    averaging: str
    label: str

    @property
    def with_head(self) -> float:
        return self.decoder + self.head

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; energies in µJ per token."""
        energies = {f"{name}_uj": getattr(self, name) for name in ("decoder", "with_head", "head", "neuron")}
        parts = {"by_component_uj": self.by_component, "by_group_uj": self.by_group}
        names = ("special", "table", "memory", "context", "averaging", "label")
        return {**energies, **parts, **{name: getattr(self, name) for name in names}}


def cost(counted: Census, table: str = "45nm-fp32", traffic: bool = False, memory: str = "dram-low") -> EnergyReport:
    """Price a census. traffic: also charge each moved byte at the price of `memory`, one of MEMORIES."""
    prices, per_byte = _table(table), MEMORIES.get(memory)
    if per_byte is None:
        raise ValueError(f"memory is {memory!r}; use one of {', '.join(MEMORIES)}.")
    parts, groups = defaultdict(float), defaultdict(float)
    for row in counted.rows:
        group, kind = COMPONENTS[row.component]
        energy = row.count * getattr(prices, kind).price(row.op)
        if traffic:
            energy += row.words * getattr(prices, f"{row.memory}_bytes") * per_byte
        parts[row.component] += energy * 1e-6
        groups[group] += energy * 1e-6
    head, neuron = groups.get("head", 0.0), groups.get("neuron", 0.0)
    return EnergyReport(
        decoder=sum(energy for group, energy in groups.items() if group not in ("head", "neuron")),
        head=head,
        neuron=neuron,
        special=counted.count("special"),
        by_component=dict(parts),
        by_group=dict(groups),
        table=table,
        memory=memory if traffic else None,
        context=counted.context,
        averaging=counted.averaging,
        label=f"{counted.label}, {f'compute and {memory} traffic' if traffic else 'compute only'}",
    )


def energy(
    config: PreTrainedConfig,
    context: Number = 512,
    rates: Rates | None = None,
    averaging: str = "decode",
    table: str = "45nm-fp32",
    traffic: bool = False,
    memory: str = "dram-low",
) -> EnergyReport:
    """Modelled energy of one token: `census` counts, `cost` prices; see there for the arguments and errors."""
    return cost(census(config, context, rates, averaging), table, traffic, memory)


def curve(
    config: PreTrainedConfig, contexts: Iterable[Number], rates: Rates | None = None, **options: Any
) -> list[EnergyReport]:
    """One report per context; `options` are the others of `energy`."""
    return [energy(config, context, rates, **options) for context in contexts]


def crossing(
    f: Callable[[float], Number], g: Callable[[float], Number], low: Number = 1, high: Number = 2**24
) -> float | None:
    """Where f - g changes sign between low and high, None if it does not; by the Illinois rule, exact for lines."""
    below, above = f(low) - g(low), f(high) - g(high)
    if below * above > 0 or below == above:
        return None
    last = 0
    while high - low > 1e-12 * high:
        middle = (low * above - high * below) / (above - below)
        gap = f(middle) - g(middle)
        if gap == 0 or not low < middle < high:
            return float(middle)
        # An end that stays put twice has its gap halved, or it would stay for ever where the curves bend.
        if gap * above > 0:
            high, above, below, last = middle, gap, below / 2 if last == 1 else below, 1
        else:
            low, below, above, last = middle, gap, above / 2 if last == -1 else above, -1
    return float(high)


def break_even(config: MarConfig, table: str = "45nm-fp32") -> float:
    """The r·T at which the spiking linears of this shape cost as much as dense ones, compute only."""
    dense, spiking = copy(config), copy(config)
    dense.neurons = None
    spiking.neurons = site_neurons(NeuronConfig(time_steps=127))

    def linears(model: MarConfig, rate: Number | None = None) -> float:
        rates = None if rate is None else dict.fromkeys(SITES, SiteRate(rate, min(rate, 1.0)))
        groups = cost(census(model, 1, rates), table).by_group
        return groups["projections"] + groups["ffn"]

    target = linears(dense)
    found = crossing(lambda rate: linears(spiking, rate), lambda _: target, 0.0, 127.0)
    assert found is not None, "a MAC costs less than 127 accumulates in every table"
    return found


def compare(
    models: Mapping[str, tuple[PreTrainedConfig, Rates | None]],
    context: Number,
    tables: Iterable[str] = ("45nm-fp32", "45nm-int8"),
    averaging: str = "decode",
    memory: str = "dram-low",
    measured: Mapping[tuple[str, str], float] | None = None,
) -> list[dict[str, Any]]:
    """Models side by side under each table: compute only, compute and memory, and measured where given.

    measured: µJ per token by (model, table), None in the result where there is none. A fair table has the original
    LLaMA in it, and shows it in int8 too.
    """
    return [
        {
            "model": name,
            "table": table,
            "compute": cost(counted, table).to_dict(),
            "compute_and_memory": cost(counted, table, True, memory).to_dict(),
            "measured_uj": (measured or {}).get((name, table)),
        }
        for name, (config, rates) in models.items()
        for counted in [census(config, context, rates, averaging)]
        for table in tables
    ]


def _table(name: str) -> CostTable:
    if name not in TABLES:
        raise ValueError(f"table is {name!r}; use one of {', '.join(TABLES)}.")
    return TABLES[name]


class MeasuredEnergy:
    """What `measured_energy` found: joules of all CPU packages and seconds, or None and the reason."""

    def __init__(self) -> None:
        self.joules: float | None = None
        self.seconds: float | None = None
        self.reason = "the measured block has not ended"

    def per_token(self, tokens: int) -> float | None:
        """Microjoules per token, of the whole machine and not of the model alone."""
        return None if self.joules is None else self.joules * 1e6 / tokens


@contextmanager
def measured_energy(powercap: Path = Path("/sys/class/powercap")) -> Iterator[MeasuredEnergy]:
    """Read the CPU packages' energy counters (RAPL, through Linux powercap) before and after the block.

    It is the energy of whole packages, other processes included. A counter may wrap once; blocks of more than some
    minutes under full load can wrap it twice, which cannot be seen. Never raises for a missing counter: `joules` is
    then None and `reason` says why.
    """
    result = MeasuredEnergy()
    try:
        before, reason = _read_packages(powercap), ""
    except (OSError, ValueError) as error:
        before, reason = {}, f"the energy counter cannot be read ({error})"
    start = time.perf_counter()
    yield result
    seconds = time.perf_counter() - start
    if not before:
        result.reason = reason or "no energy counter on this machine"
        return
    try:
        after = _read_packages(powercap)
        used = [(after[name][0] - value) % (span + 1) for name, (value, span) in before.items()]
    except (OSError, ValueError, KeyError) as error:
        result.reason = f"the energy counter disappeared while measuring ({error})"
        return
    result.joules, result.seconds, result.reason = sum(used) * 1e-6, seconds, "measured: RAPL, all CPU packages"


def _read_packages(powercap: Path) -> dict[str, tuple[int, int]]:
    """Package domain -> (energy, its range), both in µJ. Subdomains are parts of a package, so they are left out."""
    packages = {}
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if (name := folder / "name").is_file() and name.read_text().startswith("package"):
            span = int((folder / "max_energy_range_uj").read_text())
            packages[folder.name] = int((folder / "energy_uj").read_text()), span
    return packages
