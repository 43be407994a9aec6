"""A real but tiny stage for the tests of the training loop, and processes to run it in."""

import io
import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mar.cli import main
from mar.objective import ParameterGroup
from mar.train import TrainConfig, train

FORKS = multiprocessing.get_context("forkserver")
# Imported once, these serve every fork; the optimizers import torch._dynamo at first use.
FORKS.set_forkserver_preload(["mar.quickstart", "torch._dynamo"])

LENGTH = 8
WORDS = 16
CONFIG: dict[str, Any] = {
    "tokens": 12 * 4 * LENGTH,
    "batch_size": 2,
    "accumulation": 2,
    "lr": 1e-2,
    "warmup_steps": 2,
    "precision": "fp32",
    "checkpoint_minutes": 0,
}
"""12 steps of two micro batches of 2 rows, with a checkpoint after each step."""


class CountingRows:
    """Row i counts up from i in strides of 1 + i mod 3; `total` rows, then from the start again."""

    def __init__(self, total: int = 21) -> None:
        self.total, self.length = total, LENGTH
        self.position, self.rank, self.world = 0, 0, 1

    def shard(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        total = self.total - self.total % self.world
        while self.position < total:
            end = min(self.position + batch_size * self.world, total)
            rows = range(self.position + self.rank, end, self.world)
            self.position = end
            yield {"input_ids": torch.stack([(i + (1 + i % 3) * torch.arange(LENGTH)) % WORDS for i in rows])}
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class NextWord:
    """Predicts the next word by two linear layers, each in a group of its own; dropout and noise use every generator.

    `before(calls)` runs at each call of `accumulate`, which `calls` counts: tests stop, kill or poison the run there.
    """

    name = "next-word"

    def __init__(self, noise: bool = True, before: Callable[[int], object] = lambda calls: None) -> None:
        torch.manual_seed(1)
        self.model = nn.ModuleDict(
            {"embed": nn.Embedding(WORDS, 16), "hidden": nn.Linear(16, 32), "out": nn.Linear(32, WORDS)}
        )
        self.noise, self.before, self.calls = noise, before, 0

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup("body", {**self.named("embed"), **self.named("hidden")}, clip="body"),
            ParameterGroup("head", self.named("out"), lr_scale=0.5, clip="head", muon=True),
        ]

    def named(self, part: str) -> dict[str, nn.Parameter]:
        return {f"{part}.{name}": parameter for name, parameter in self.model[part].named_parameters()}

    def accumulate(self, batch: dict[str, Tensor], backward: Callable[[Tensor], None]) -> dict[str, float]:
        self.calls += 1
        self.before(self.calls)
        hidden = self.model["hidden"](self.model["embed"](batch["input_ids"][:, :-1])).relu()
        if self.noise:
            hidden = nn.functional.dropout(hidden, 0.1) * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))
        logits = self.model["out"](hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        backward(loss)
        right = logits.argmax(-1) == batch["input_ids"][:, 1:]
        return {"right": right.float().mean().item()}


class Stopped(Exception):
    """Raised by a test in place of a crash."""


def stop_at(call: int) -> Callable[[int], None]:
    def before(calls: int) -> None:
        if calls == call:
            raise Stopped

    return before


def signal_at(call: int, number: int, times: int = 1) -> Callable[[int], None]:
    def before(calls: int) -> None:
        if calls == call:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return before


def run_until_killed(folder: Path, call: int) -> None:
    run(folder, NextWord(before=signal_at(call, signal.SIGKILL)))


def run(folder: Path, objective: NextWord | None = None, **changes: Any) -> dict[str, Any]:
    """Train a (fresh) student in `folder`."""
    return train(objective or NextWord(), CountingRows(), TrainConfig(**{**CONFIG, **changes}), folder, progress=False)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def run_as_one_of_several(folder: Path) -> None:
    """Stopped on every process in step 6, so that what follows also shows the resume of a run of several processes."""
    try:
        run(folder, NextWord(noise=False, before=stop_at(6)), accumulation=1)
    except Stopped:
        run(folder, NextWord(noise=False), accumulation=1)
    torch.distributed.destroy_process_group()


def in_two_processes(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns in each: `torchrun --standalone --nproc-per-node 2`, but forked after the imports."""
    launch = LaunchConfig(
        1, 1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver"
    )
    done = elastic_launch(launch, function)(*arguments)
    return [done[rank] for rank in sorted(done)]


def command_as_one_of_several(*arguments: str) -> tuple[Any, str, bool]:
    """Exit code and stdout of a command line, and whether it left the process group standing."""
    # One thread, as the tests have: sums over several round otherwise, and then the teacher writes another text.
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate chooses
    torch.set_num_threads(1)
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            main(list(arguments))
    except SystemExit as end:
        return end.code, out.getvalue(), torch.distributed.is_initialized()
    return None, out.getvalue(), torch.distributed.is_initialized()
