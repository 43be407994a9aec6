"""How far the engine is from torch on a spiking student: codes that flip, and the divergence of what is predicted.

Does: let torch and the engine read the same text from the same start, window by window, at every precision. Does not:
time anything, or judge the student.

    python benchmarks/engine_fidelity.py STUDENT --text FILE [--tokens 2048] [--window 512] [--json]

free: the engine on its own. A code that rounding flips changes the inputs of all that follow, and the state keeps it,
so two runs that are equally right part for good at the first flip. That sets the bound: torch against itself, where it
reads the same window token by token, as the engine does, and sums round otherwise. Engine and torch in fp32 may differ
no more than that, but for the luck of where the first flip falls (SLACK).
replayed: every neuron's code is compared given the inputs that torch's codes lead to, which are then put in its place.
In fp32 what differs then must lie within NEAR of a threshold; the other precisions show what their weights cost.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from mar.config import SITES, MarConfig
from mar.data import PackedRows
from mar.engine import Engine
from mar.engine.pack import HEADS, PRECISIONS
from mar.folder import load_student
from mar.model import MarForCausalLM
from mar.sources import DataConfig
from timing import arguments, environment, finish, settings, show

NEAR = 1e-5
"""Share of a threshold within which fp32 rounding may decide whether it is reached."""

SLACK = 1.25
AGAIN = "torch_in_pieces"
BLOCK = 32
"""Tokens whose distributions are compared at a time, in fp64."""


class Run(NamedTuple):
    """logits (tokens, vocabulary); codes (tokens, all sites of all layers) and where a current is near a threshold."""

    logits: np.ndarray
    codes: np.ndarray
    near: np.ndarray


def site_widths(config: MarConfig) -> dict[str, int]:
    """Codes of a token at each site of a layer, in the engine's order."""
    return dict(
        zip(SITES, (config.hidden_size, config.inner_size, config.hidden_size, config.intermediate_size), strict=True)
    )


@contextmanager
def recorded(model: MarForCausalLM) -> Iterator[dict[tuple[int, str], list[Tensor]]]:
    """Codes and nearness (2, tokens, channels) of each neuron, one for each time that it is called."""
    found: dict[tuple[int, str], list[Tensor]] = {}

    def record(key: tuple[int, str], neuron: Any, inputs: tuple[Tensor]) -> None:
        config, (current,) = neuron.config, inputs
        ratio = current.double() / neuron.threshold.double()
        ratio = ratio if config.kind == "binary" else ratio.abs()
        nearest = (ratio + config.precharge).round().clamp(1, config.time_steps) - config.precharge
        near = (ratio / nearest - 1).abs() <= NEAR
        found.setdefault(key, []).append(torch.stack([neuron.encode(current), near.to(torch.int8)])[:, 0])

    hooks = [
        neuron.register_forward_pre_hook(partial(record, (layer, site))) for layer, site, neuron in model.neuron_sites()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def run_torch(model: MarForCausalLM, ids: Tensor, piece: int | None = None) -> Run:
    """The model on one sequence (tokens,), read at once or in pieces."""
    logits, cache = [], None
    with recorded(model) as found:
        for part in ids.split(piece or len(ids)):
            output = model(part[None], past_key_values=cache, use_cache=True)
            logits.append(output.logits[0])
            cache = output.past_key_values
    sites = [
        torch.cat(found[layer, site], 1)
        if (layer, site) in found
        else torch.zeros(2, len(ids), width, dtype=torch.int8)
        for layer in range(model.config.num_hidden_layers)
        for site, width in site_widths(model.config).items()
    ]
    both = torch.cat(sites, 2).numpy()
    return Run(torch.cat(logits).numpy(), both[0], both[1].astype(bool))


def run_engine(engine: Engine, ids: Tensor, codes: np.ndarray | None = None) -> Run:
    """The same on the engine, token by token; with `codes` in place of its own after they were taken."""
    state = engine.new_state()
    pairs = [
        engine.step_codes(state, token, None if codes is None else codes[t]) for t, token in enumerate(ids.tolist())
    ]
    taken = np.stack([one for _, one in pairs])
    return Run(np.stack([logits for logits, _ in pairs]), taken, np.zeros_like(taken, bool))


def divergence(found: Run, truth: Run, ids: Tensor) -> dict[str, float]:
    """Sums over the tokens: both KLs in nats, tokens of the same best word, nll of the next token under both."""
    sums: defaultdict[str, float] = defaultdict(float)
    for start in range(0, len(ids), BLOCK):
        block = slice(start, start + BLOCK)
        log_q, log_p = (torch.from_numpy(run.logits[block]).double().log_softmax(-1) for run in (found, truth))
        ratio = log_p - log_q
        following = ids[start + 1 : start + 1 + BLOCK, None]
        sums["kl"] += float((log_p.exp() * ratio).sum())
        sums["reverse_kl"] += float(-(log_q.exp() * ratio).sum())
        sums["agreement"] += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        sums["nll"] -= float(log_q[: len(following)].gather(1, following).sum())
        sums["torch_nll"] -= float(log_p[: len(following)].gather(1, following).sum())
    return sums


class Comparison:
    """Sums over windows of how one way to run differs from torch."""

    def __init__(self, config: MarConfig):
        self.config = config
        self.tokens = self.predicted = self.flipped = self.near = self.away = 0
        self.first_flips: list[int | None] = []
        self.largest = 0.0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.by_site: Counter[str] = Counter()

    def add(self, found: Run, truth: Run, ids: Tensor) -> None:
        """Another window."""
        differ = found.codes != truth.codes
        self.tokens += len(ids)
        self.predicted += len(ids) - 1
        self.flipped += int(differ.sum())
        self.away += int((differ & ~truth.near).sum())
        self.first_flips.append(int(differ.any(1).argmax()) if differ.any() else None)
        self.near += int(truth.near.sum())
        self.largest = max(self.largest, float(np.abs(found.logits - truth.logits).max()))
        for name, value in divergence(found, truth, ids).items():
            self.sums[name] += value
        widths = list(site_widths(self.config).items()) * self.config.num_hidden_layers
        per_channel = differ.sum(0)
        for (site, width), start in zip(widths, np.cumsum([0, *(width for _, width in widths)]), strict=False):
            self.by_site[site] += int(per_channel[start : start + width].sum())

    def figures(self) -> dict[str, Any]:
        """Shares and means a token; of each window, the first token that has a flipped code."""
        places = {
            site: width * self.config.num_hidden_layers * self.tokens
            for site, width in site_widths(self.config).items()
        }
        spiking = {site: count for site, count in places.items() if self.config.neuron(site)}  # type: ignore[arg-type]
        return {
            "flipped_share": self.flipped / max(1, sum(spiking.values())),
            "flipped_share_by_site": {site: self.by_site[site] / count for site, count in spiking.items()},
            "flipped": self.flipped,
            "first_flips": self.first_flips,
            "near_thresholds": self.near,
            "away_from_thresholds": self.away,
            "largest_logit_difference": self.largest,
            **{name: self.sums[name] / self.tokens for name in ("kl", "reverse_kl", "agreement")},
            "ppl_ratio": float(np.exp((self.sums["nll"] - self.sums["torch_nll"]) / max(1, self.predicted))),
        }


def text_windows(source: Path, student: Path, vocabulary: int, window: int, tokens: int) -> list[Tensor]:
    """Windows of packed text; documents follow each other in them, and the state is carried on, in torch and engine."""
    data = DataConfig(source=str(source), length=window, shuffle=False)
    rows = PackedRows(data, AutoTokenizer.from_pretrained(student), epochs=1, vocab_size=vocabulary)
    found = [row["input_ids"] for row, _ in zip(rows, range(-(-tokens // window)), strict=False)]
    if not found:
        raise ValueError(f"{source} gives no window of {window} tokens; shorten --window.")
    return found


def measure(
    student: Path, windows: list[Tensor], precisions: list[str], head: str | None, threads: int, piece: int = 1
) -> dict[str, Any]:
    """Figures of torch in pieces, and of the engine at each precision, free and replayed."""
    model = load_student(student)
    comparisons: dict[tuple[str, str], Comparison] = {}
    engines = {
        precision: Engine.from_pretrained(student, precision=precision, head=head, threads=threads)
        for precision in precisions
    }
    for number, ids in enumerate(windows, 1):
        print(f"window {number} of {len(windows)}", file=sys.stderr, flush=True)  # one takes minutes
        truth = run_torch(model, ids)

        def compare(name: str, way: str, run: Run, truth: Run = truth, ids: Tensor = ids) -> None:
            comparisons.setdefault((name, way), Comparison(model.config)).add(run, truth, ids)

        compare(AGAIN, "free", run_torch(model, ids, piece))
        for precision, engine in engines.items():
            compare(precision, "free", run_engine(engine, ids))
            compare(precision, "replayed", run_engine(engine, ids, truth.codes))
    found: dict[str, Any] = {}
    for (name, way), comparison in comparisons.items():
        found.setdefault(name, {})[way] = comparison.figures()
    return found


def bound(runs: dict[str, Any]) -> dict[str, Any]:
    """What the engine in fp32, free, may differ by, and whether it does."""
    limits = {name: SLACK * runs[AGAIN]["free"][name] for name in ("flipped_share", "kl")}
    free = runs.get("fp32", {}).get("free")
    return limits | {"held": free and all(free[name] <= limit for name, limit in limits.items())}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("student", type=Path, help="a spiking student's folder")
    parser.add_argument(
        "--text", type=Path, required=True, help="file or folder of text that the student was not trained on"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="to read, in whole windows")
    parser.add_argument("--window", type=int, default=512, help="tokens from one fresh start to the next")
    parser.add_argument("--piece", type=int, default=1, help="tokens that torch reads at a time against itself")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--head", choices=HEADS, help="of embedding and head; by default as the engine has it")
    options: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    config = MarConfig.from_pretrained(options.student)
    windows = text_windows(options.text, options.student, config.vocab_size, options.window, options.tokens)
    found = measure(options.student, windows, options.precisions, options.head, options.threads, options.piece)
    figures = ("flipped_share", "away_from_thresholds", "kl", "agreement", "ppl_ratio", "largest_logit_difference")
    rows = [[f"{name}, {way}", *map(run.get, figures)] for name, ways in found.items() for way, run in ways.items()]
    show(f"the engine beside torch, {len(windows)} windows of {options.window} tokens", ["", *figures], rows)
    tokens = sum(map(len, windows))
    finish(
        {
            "benchmark": "engine_fidelity",
            "environment": environment(),
            "settings": settings(options),
            "tokens": tokens,
            "codes": tokens * config.num_hidden_layers * sum(site_widths(config).values()),
            "runs": found,
            "bound": bound(found),
        },
        options,
    )


if __name__ == "__main__":
    main()
