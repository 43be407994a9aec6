"""What a training run shows and writes as it goes: the bar or plain lines on stderr, log.jsonl, tensorboard.

Does: keep the log in step with the checkpoint a run goes on from. Does not: decide anything about the run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Self

import rich.progress
from rich.console import Console

from mar.checkpoint import explain_disk_full, replace_atomically

LINE_SECONDS = 30.0
"""Between two lines of progress where there is no bar."""


class TrainLog:
    """Writes the records of a run whose first record will be that of step `step` + 1; a context manager.

    Lines of log.jsonl from after `step` are dropped first: the run repeats those steps, and none may be there twice.
    On a process other than the main one (`active` False) nothing is shown or written.
    """

    def __init__(
        self, folder: Path, title: str, step: int, steps: int, every: int, bar: bool, tensorboard: bool, active: bool
    ) -> None:
        self.path = folder / "log.jsonl"
        self.title, self.steps, self.every, self.active = title, steps, every, active
        self.file: Any = None
        self.bar: rich.progress.Progress | None = None
        self.writer: Any = None
        self.spoke = time.monotonic()
        if not active:
            return
        replace_atomically(self.path, _lines_up_to(self.path, step))
        if tensorboard:
            self.writer = _summary_writer(folder / "tensorboard", step)
        console = Console(stderr=True)
        if bar and console.is_terminal:
            self.bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[measure]} · {task.fields[speed]} tok/s ·"),
                rich.progress.TimeRemainingColumn(),
                console=console,
                redirect_stdout=False,
            )
            self.task = self.bar.add_task(title, total=steps, completed=step, measure="–", speed="–")

    def __enter__(self) -> Self:
        if self.active:
            # Unbuffered: what was written survives a kill, and a full disk is noticed at once.
            self.file = self.path.open("ab", buffering=0)
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Show the record of one step and, at every `every`-th and at the last step, write it. Raises DiskFull."""
        if not self.active:
            return
        step, speed = record["step"], f"{record['tokens_per_second']:,.0f}"
        # The objective's first metric is named after what it measures and against whom; a loss may be a sum of several.
        name = next(key for key in record if key not in ("step", "tokens"))
        measure = f"{name} {record[name]:.4g}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, measure=measure, speed=speed)
        elif step == self.steps or time.monotonic() - self.spoke >= LINE_SECONDS:
            self.spoke = time.monotonic()
            print(f"{self.title}: step {step} of {self.steps}, {measure}, {speed} tok/s", file=sys.stderr, flush=True)
        if step % self.every and step != self.steps:
            return
        with explain_disk_full(self.path.parent):
            self.file.write((json.dumps(record, allow_nan=False) + "\n").encode())
        if self.writer is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, step)


def _lines_up_to(path: Path, step: int) -> bytes:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:
            # Torn by a kill or a full disk.
            break
        kept.append(line.rstrip(b"\n") + b"\n")
    return b"".join(kept)


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard is true, but the package is not installed; install mar[tensorboard], or set it to false."
        ) from error
    return SummaryWriter(folder, purge_step=step + 1)
