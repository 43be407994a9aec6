"""Tokens per second of whole optimizer steps of each stage, next to the same steps in plain torch, and their memory.

Does: run the product's own training loop on one set of batches, ours and plain (benchmarks/plain.py) in turns; compare
with the arithmetic that a step cannot do without, at the rate of matrix products of the model's own shapes, which take
their turn too (in int8 those of fp32); take the peak memory of distill from a process of its own. Does not: say
anything about quality.

    python benchmarks/throughput.py [--json] [--text FOLDER] [--stages align distill] [--rounds 5]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mar.census import COMPONENTS, census
from mar.config import MarConfig, site_neurons
from mar.conversion import calibrate_mixers, convert_llama
from mar.data import PackedRows, write_documents
from mar.insertion import insert_neurons
from mar.model import MarForCausalLM
from mar.optimizer import TrainConfig
from mar.recipe import SPIKING, StageConfig, read_recipe
from mar.refinement import build_objective
from mar.sources import DataConfig
from mar.teachers import Teacher, load_teacher
from mar.train import _Run
from plain import plain
from timing import alternate, arguments, environment, finish, matmuls, settings, show, speedup

STAGES = ("align", "distill", "spike_align", "spike")
PEERS: dict[str, Callable[[], Any]] = {"ours": nullcontext, "plain": plain}


def text_rows(text: str | None, teacher: Teacher, length: int, folder: Path) -> PackedRows:
    """Packed rows of `text`, or of random token ids, one document a row."""
    vocabulary = teacher.model.config.vocab_size
    if text is None:
        generator = torch.Generator().manual_seed(0)
        # The row's last token is the EOS that packing puts after a document.
        ids = torch.randint(0, vocabulary, (64, length - 1), generator=generator)
        write_documents(folder / "random.parquet", list(ids), {})
        text = str(folder / "random.parquet")
    return PackedRows(DataConfig(source=text, length=length), teacher.tokenizer, vocab_size=vocabulary)


def students(teacher: Teacher, rows: PackedRows, spiking: bool) -> tuple[MarForCausalLM, MarForCausalLM | None]:
    """An untrained dense student and, if wanted, a spiking one with the shipped recipe's neurons."""
    recipe = read_recipe("quickstart")
    batch = next(iter(rows.batches(-(-recipe.mixer.calibration_tokens // rows.length))))
    rows.rewind()
    dense = convert_llama(teacher.model, recipe.mixer.preset, recipe.mixer.init)
    calibrate_mixers(dense, teacher.model, batch)
    neurons = site_neurons(recipe.neurons.default, recipe.neurons.per_site, tuple(recipe.neurons.sites))
    return dense, insert_neurons(dense, neurons, [batch]) if spiking else None


def stage_run(
    stage: str,
    peer: str,
    teacher: Teacher,
    dense: MarForCausalLM,
    spiking: MarForCausalLM | None,
    rows: PackedRows,
    config: TrainConfig,
    alone: bool = False,
) -> _Run:
    """A training run as `mar refine` would set it up, of a copy of the student; to be advanced under PEERS[peer].

    alone: no other run needs the student, so spare the memory of a copy.
    """
    student = spiking if stage in SPIKING else dense
    assert student is not None
    student = student if alone else copy.deepcopy(student)
    if config.precision == "int8" and peer != "ours":  # which plain code has not: what is faster of what it has
        config = replace(config, precision="auto")
    # Told that the run is in fp32, `build_objective` leaves the teacher in fp32, as plain code does.
    precision = config.precision if peer == "ours" else "fp32"
    kind = StageConfig(kind=stage, train=replace(config, precision=precision))  # type: ignore[arg-type]
    objective = build_objective(kind, student.train(), teacher.model, dense)
    with PEERS[peer]():
        return _Run(objective, rows, config, Path("unused"), {})


def measure_stage(
    stage: str,
    teacher: Teacher,
    dense: MarForCausalLM,
    spiking: MarForCausalLM | None,
    rows: PackedRows,
    config: TrainConfig,
    rounds: int,
    peers: list[str],
    alone: bool = False,
) -> dict[str, Any]:
    """Seconds and losses of each step, and what follows from them; every peer sees the same batches."""
    rows.rewind()
    batches = list(islice(rows.batches(config.batch_size), rounds + 1))
    steps: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}

    def advance(peer: str, run: _Run, stream: Any) -> None:
        with PEERS[peer]():
            steps[peer].append(run.advance(stream))

    runs = {peer: stage_run(stage, peer, teacher, dense, spiking, rows, config, alone) for peer in peers}
    calls: dict[str, Callable[[], object]] = {
        peer: partial(advance, peer, run, iter(batches)) for peer, run in runs.items()
    }
    tokens = config.tokens_per_step(rows.length)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    probe, products = model_matmuls(dense.config, tokens, dtype)
    seconds = alternate(calls | {"matmul": probe}, rounds)
    rate = products / statistics.median(seconds.pop("matmul"))
    work = flops_per_token(stage, teacher.model.config, dense.config, rows.length)
    speeds = {peer: tokens / statistics.median(times) for peer, times in seconds.items()}
    return {
        "tokens_per_second": speeds,
        "speedup": speedup(seconds, "ours", "plain") if {"ours", "plain"} <= set(peers) else None,
        "seconds": seconds,
        "loss": {peer: [step["loss"] for step in taken] for peer, taken in steps.items()},
        "gradient_norm": {peer: [step["grad_norm"] for step in taken] for peer, taken in steps.items()},
        "gflop_per_token": work / 1e9,
        "matmul_gflops": rate / 1e9,
        "arithmetic_limit_tokens_per_second": rate / work,
        "share_of_matmul_peak": {peer: speed * work / rate for peer, speed in speeds.items()},
    }


def flops_per_token(stage: str, llama: Any, mar: MarConfig, length: int) -> float:
    """Floating-point operations that one token of a stage needs: products only, nothing computed twice.

    The scan is counted as the recurrence, attention as the causal half. A backward pass through a product takes two
    more like it, or one where either its input or its weight needs no gradient.
    """
    teacher, student = (_macs(config, length) for config in (llama, mar))
    head = teacher.pop("head")
    student.pop("head")
    forward, taught = student.total(), teacher.total()
    if stage == "align":
        ffn = sum(teacher[name] for name in ("gate_proj", "up_proj", "down_proj"))
        mixing = student["out_proj"] + student["conv"] + student["scan"]
        # The teacher's last FFN is not run; nothing lies before in_proj that needs a gradient.
        macs = taught - ffn / mar.num_hidden_layers + 2 * student["in_proj"] + 3 * mixing
    elif stage == "distill":
        macs = taught + head + 3 * forward + 2 * head
    elif stage == "spike_align":
        macs = forward + 3 * forward
    else:
        macs = forward + head + 3 * forward + 2 * head
    return 2 * macs


def _macs(config: Any, length: int) -> Counter[str]:
    """Multiply-accumulates of each linear, attention, convolution and scan per token, averaged over a row."""
    macs: Counter[str] = Counter()
    for row in census(config, length, averaging="prefill").rows:
        if row.op == "mac" and COMPONENTS[row.component][0] != "elementwise":
            macs[row.component] += row.count  # type: ignore[assignment]
    return macs


def model_matmuls(mar: MarConfig, tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """A probe that runs the products of one forward pass, alone, and their floating-point operations."""
    d, wide, layers = mar.hidden_size, mar.intermediate_size, mar.num_hidden_layers
    shapes = Counter({(tokens, d, mar.vocab_size): 1})
    for k, n, times in ((d, mar.in_proj_size, 1), (mar.inner_size, d, 1), (d, wide, 2), (wide, d, 1)):
        shapes[tokens, k, n] += layers * times
    return matmuls(shapes, dtype)


def peak_memory(peer: str, options: argparse.Namespace) -> float:
    """Largest resident memory, in bytes, of a process that loads the teacher and takes two distill steps.

    Call it before this process grows: what a child inherits while it starts counts as its own.
    """
    command = [sys.executable, __file__, "--no-memory", "--stages", "distill", "--peers", peer, "--rounds", "1"]
    for name in ("teacher", "length", "batch", "threads", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.text:
        command += ["--text", options.text]
    print(f"Memory of distill, {peer}: two steps in a process of their own.", file=sys.stderr, flush=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"The process that measures memory ended with code {process.returncode}; see its message above.")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--teacher", default="smollm2-135m", help="as in `mar refine`")
    parser.add_argument("--text", help="text to train on (file or folder); by default random token ids")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--batch", type=int, default=4, help="rows a step")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each peer and stage")
    parser.add_argument("--precision", choices=("bf16", "fp32", "int8"), default="bf16")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    memory = {} if options.no_memory else {peer: peak_memory(peer, options) / 1e9 for peer in options.peers}
    found: dict[str, Any] = {
        "benchmark": "throughput",
        "environment": environment(),
        "settings": settings(options),
        "distill_peak_memory_gb": memory,
        "stages": {},
    }
    teacher = load_teacher(options.teacher)
    config = TrainConfig(
        tokens=(options.rounds + 1) * options.batch * options.length,
        batch_size=options.batch,
        precision=options.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = text_rows(options.text, teacher, options.length, Path(folder))
        dense, spiking = students(teacher, rows, any(stage in SPIKING for stage in options.stages))
        alone = len(options.stages) == len(options.peers) == 1
        for stage in options.stages:
            figures = measure_stage(stage, teacher, dense, spiking, rows, config, options.rounds, options.peers, alone)
            found["stages"][stage] = figures
            _show(stage, figures)
    for peer, size in memory.items():
        print(f"peak memory of distill, {options.batch} x {options.length}, {peer}: {size:.2f} GB", file=sys.stderr)
    finish(found, options)


def _show(stage: str, figures: dict[str, Any]) -> None:
    show(
        stage if figures["speedup"] is None else f"{stage}: ours is faster by {figures['speedup']:.2f}",
        ["", "tok/s", "share of matmul peak", "first loss"],
        [
            [peer, speed, figures["share_of_matmul_peak"][peer], figures["loss"][peer][0]]
            for peer, speed in figures["tokens_per_second"].items()
        ],
    )


if __name__ == "__main__":
    main()
