"""The one training loop: any objective, any rows, a budget in tokens.

Does: autocast, accumulation, averaging over processes, clipping, the guard against divergence, checkpoints with exact
resume. Does not: know a model, a loss or where text comes from, nor write the student; the caller does that when
training is over. It wraps no module: objectives run single layers, so gradients are averaged here, after accumulation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object, reduce, set_seed
from torch import Tensor, nn

from mar.checkpoint import (
    alone_in,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json_atomically,
)
from mar.objective import Objective, ParameterGroup, Rows
from mar.optimizer import TrainConfig, build_optimizers, lr_at
from mar.precision import forward_precision, resolve_precision
from mar.processes import noted_interrupts, this_process
from mar.trainlog import TrainLog

GRADIENT_BUCKET = 2**24
"""Values (64 MB in fp32) that are averaged over processes in one message."""

NUMBERS_STAY = ("checkpoint_minutes", "keep_checkpoints", "log_every", "tensorboard")
"""Settings that change nothing in the numbers, so a run may go on with others."""

RATES = ("tokens", "lr", "schedule", "warmup_steps", "decay_fraction", "min_lr_ratio")
"""Settings that act through the learning rate alone: others do no harm while they give the rates a run has had."""


class TrainingDiverged(ValueError):
    """A loss, metric or gradient stopped being finite."""


def train(
    objective: Objective,
    rows: Rows,
    config: TrainConfig,
    folder: Path,
    progress: bool = True,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train what `objective` names on `rows` for config.tokens tokens, and return the final metrics.

    Go on from the newest checkpoint in folder/checkpoints, bit for bit, as if there had been no interruption. Write
    folder/log.jsonl (one object a step) and, at the end, folder/done.json with the returned metrics: steps, tokens,
    precision (what `auto` came to), seconds (in steps, not in saving), tokens_per_second, and each metric's mean over
    the last tenth of the steps. A finished run is not repeated: its parameters are restored and its metrics returned.

    recipe: further settings, as JSON values, that a checkpoint must share with this run to be continued by it.

    An unfinished run takes other settings of the learning rate if every step so far has had the rate that they give:
    a `wsd` run gets more tokens, or an earlier decay, for as long as its rate is the constant one.

    Raises TrainingDiverged; ValueError for settings that do not fit each other or the checkpoint, and for a folder in
    which another process trains; DiskFull; and
    KeyboardInterrupt after Ctrl-C, when the step under way is done and a checkpoint is written.
    """
    run = _Run(objective, rows, config, Path(folder), recipe or {})
    with alone_in(run.folder) if run.process.is_main_process else nullcontext():
        return _train(run, config, progress)


def _train(run: _Run, config: TrainConfig, progress: bool) -> dict[str, Any]:
    run.restore()
    if run.step == run.steps:
        return run.finish()
    log = run.open_log(bar=progress)
    with noted_interrupts() as interrupted, log:
        batches = _endless(run.rows, config.batch_size)
        saved = time.monotonic()
        while run.step < run.steps:
            log.write(run.advance(batches))
            stop = run.any_process(interrupted.is_set())
            late = run.any_process(time.monotonic() - saved >= 60 * config.checkpoint_minutes)
            if stop or late or run.step == run.steps:
                run.save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt(f"Stopped after step {run.step} of {run.steps}; run again to go on from there.")
    return run.finish()


class _Run:
    """One training run: what changes from step to step, and how it is saved and restored."""

    def __init__(
        self, objective: Objective, rows: Rows, config: TrainConfig, folder: Path, recipe: dict[str, Any]
    ) -> None:
        self.objective, self.rows, self.config, self.folder = objective, rows, config, folder
        self.checkpoints = folder / "checkpoints"
        self.groups = objective.parameter_groups()
        self.parameters = _named_parameters(self.groups, objective.name)
        self.device = next(iter(self.parameters.values())).device
        self.process = this_process()
        self.precision = resolve_precision(config.precision, self.device)
        wanted: Any = self.process.device
        if self.process.num_processes > 1 and self.device.type != wanted.type:
            raise ValueError(
                f"The student is on {self.device}, but these processes compute on {wanted}; move student and teacher "
                "there first."
            )
        self.clipped: dict[str, list[nn.Parameter]] = {}
        for group in self.groups:
            self.clipped.setdefault(group.clip, []).extend(group.parameters.values())
        self.optimizers = build_optimizers(self.groups, config)
        self.tokens_per_step = config.tokens_per_step(rows.length, self.process.num_processes)
        self.steps = config.steps(rows.length, self.process.num_processes)
        self.step = 0
        self.seconds = 0.0
        # The sum of each metric over the last tenth of the steps.
        self.tail: dict[str, float] = {}
        self.tail_steps = _tail_steps(self.steps)
        self.last_good = "no checkpoint had been written"
        self.identity = self._identity(recipe)
        if self.process.num_processes > 1:
            rows.shard(self.process.process_index, self.process.num_processes)
        set_seed(config.seed + self.process.process_index)

    def advance(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Any]:
        """One optimizer step; returns its line of the log."""
        started = time.perf_counter()
        self.step += 1
        lr = lr_at(self.step - 1, self.steps, self.config)
        metrics = self._accumulate(batches)
        norm_tensors = {tag: _gradient_norm(parameters) for tag, parameters in self.clipped.items()}
        norms = {tag: norm.item() for tag, norm in norm_tensors.items()}
        self._refuse_divergence(metrics, norms)
        if self.config.clip is not None:
            for tag, parameters in self.clipped.items():
                nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm_tensors[tag])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.step > self.steps - self.tail_steps:
            for name, value in metrics.items():
                self.tail[name] = self.tail.get(name, 0.0) + value
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            **metrics,
            "lr": lr,
            "grad_norm": math.hypot(*norms.values()),
            **({"grad_norms": norms} if len(norms) > 1 else {}),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
        }

    def open_log(self, bar: bool) -> TrainLog:
        """The log from the present step on."""
        if self.process.is_main_process:
            (self.folder / "done.json").unlink(missing_ok=True)
        return TrainLog(
            self.folder,
            title=self.objective.name,
            step=self.step,
            steps=self.steps,
            every=self.config.log_every,
            bar=bar,
            tensorboard=self.config.tensorboard,
            active=self.process.is_main_process,
        )

    def finish(self) -> dict[str, Any]:
        """The final metrics, which also go to done.json."""
        tokens = self.steps * self.tokens_per_step
        metrics = {
            "steps": self.steps,
            "tokens": tokens,
            "precision": self.precision,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            **{name: total / self.tail_steps for name, total in self.tail.items()},
        }
        if self.process.is_main_process:
            write_json_atomically(self.folder / "done.json", metrics)
        self.process.wait_for_everyone()
        return metrics

    def save(self) -> None:
        """Write a checkpoint. A finished run keeps its parameters only, and no earlier checkpoint: nothing goes on."""
        final = self.step == self.steps
        mine = {"random": random_state(), "rows": self.rows.state_dict()}
        state = {
            "identity": self.identity,
            "seconds": self.seconds,
            "tail": self.tail,
            "processes": gather_object([mine]),
        }
        optimizer = {} if final else self._optimizer_state()
        tensors = {"parameters": dict(self.parameters), "optimizer": optimizer}
        if self.process.is_main_process:
            keep = 1 if final else self.config.keep_checkpoints
            path = save_checkpoint(self.checkpoints, self.step, tensors, state, keep)
            self.last_good = f"the last good checkpoint is {path}"
        self.process.wait_for_everyone()

    def restore(self) -> None:
        """Go to the newest checkpoint, if there is one. Raises ValueError where it is another run's."""
        if (found := load_checkpoint(self.checkpoints)) is None:
            return
        self._refuse_other_run(found.state["identity"], found.step)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.tensors["parameters"][name])
        owner = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for label, tensor in found.tensors["optimizer"].items():
            name, _, key = label.rpartition(".")
            parameter = self.parameters[name]
            # A copy, because the loaded tensor lies at any offset of its file and some kernels round by alignment.
            owner[parameter].state[parameter][key] = tensor.to(parameter.device, copy=True)
        self.step, self.seconds, self.tail = found.step, found.state["seconds"], found.state["tail"]
        mine = found.state["processes"][self.process.process_index]
        self.rows.load_state_dict(mine["rows"])
        set_random_state(mine["random"])
        self.last_good = f"the last good checkpoint is {found.path}"

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is set on any process, so that all of them leave the loop or save at the same step."""
        if self.process.num_processes == 1:
            return flag
        return bool(_reduced(torch.tensor(float(flag), device=self.device), "sum").item())

    def _accumulate(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Gradients and metrics of one step, averaged over micro steps and processes."""
        totals: dict[str, float] = {}
        loss = 0.0

        def backward(part: Tensor) -> None:
            nonlocal loss
            loss += part.item() / self.config.accumulation
            # Autocast is for the forward pass; here it would narrow what the forward pass kept in fp32 on purpose.
            with torch.autocast(self.device.type, enabled=False):
                (part / self.config.accumulation).backward()

        for _ in range(self.config.accumulation):
            batch = {name: tensor.to(self.device) for name, tensor in next(batches).items()}
            with forward_precision(self.precision, self.device):
                metrics = self.objective.accumulate(batch, backward)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value / self.config.accumulation
        totals.setdefault("loss", loss)
        if self.process.num_processes > 1:
            average_gradients(list(self.parameters.values()))
            means = _reduced(torch.tensor(list(totals.values()), dtype=torch.float64, device=self.device), "mean")
            totals = dict(zip(totals, means.tolist(), strict=True))
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise ValueError(f"Stage {self.objective.name!r} gave no parameter a gradient; its loss trains nothing.")
        return totals

    def _refuse_divergence(self, metrics: dict[str, float], norms: dict[str, float]) -> None:
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if not all(map(math.isfinite, norms.values())):
            for group in self.groups:
                norm = _gradient_norm(group.parameters.values()).item()
                if not math.isfinite(norm):
                    bad.append(f"the gradient norm of parameter group {group.name!r} is {norm}")
        if bad:
            raise TrainingDiverged(
                f"Stage {self.objective.name!r} diverged at step {self.step}: {' and '.join(bad)}; start it again in "
                f"another folder with a lower lr (now {self.config.lr:g}) or with precision 'fp32' ({self.last_good})."
            )

    def _refuse_other_run(self, identity: dict[str, Any], step: int) -> None:
        absent = "absent"
        same_past = self._had_these_rates(identity, step)
        different = [
            f"{name} was {identity.get(name, absent)} and is now {self.identity.get(name, absent)}"
            for name in {**identity, **self.identity}
            if identity.get(name, absent) != self.identity.get(name, absent) and not (same_past and name in RATES)
        ]
        if different:
            more = f", and {len(different) - 6} more" if len(different) > 6 else ""
            raise ValueError(
                f"The checkpoint in {self.checkpoints} is of another run: {', '.join(different[:6])}{more}; "
                "set these back, or train in another folder."
            )

    def _had_these_rates(self, identity: dict[str, Any], step: int) -> bool:
        """Whether the first `step` steps of a run of that identity had the rates that this run gives them."""
        had = replace(self.config, **{name: identity[name] for name in RATES})
        steps = had.steps(self.rows.length, self.process.num_processes)
        # Not in the last tenth of either run, whose metrics are summed up.
        in_time = step <= min(steps - _tail_steps(steps), self.steps - self.tail_steps)
        return in_time and all(lr_at(i, steps, had) == lr_at(i, self.steps, self.config) for i in range(step))

    def _identity(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint must share with this run, as one flat dict of JSON values."""
        identity = {
            "stage": self.objective.name,
            "processes": self.process.num_processes,
            "row length": self.rows.length,
            **{name: value for name, value in asdict(self.config).items() if name not in NUMBERS_STAY},
            **{f"recipe.{name}": value for name, value in recipe.items()},
            **{f"shape of {name}": parameter.shape for name, parameter in self.parameters.items()},
        }
        return json.loads(json.dumps(identity))

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for optimizer in self.optimizers
            if parameter in optimizer.state
            for key, value in optimizer.state[parameter].items()
        }


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all processes, in flat buckets; one that is missing on every process stays missing."""
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    somewhere = _reduced(torch.tensor(has_gradient, device=parameters[0].device), "sum").tolist()
    bucket: list[Tensor] = []
    for parameter, count in zip(parameters, somewhere, strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= GRADIENT_BUCKET:
            _average(bucket)
            bucket = []
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    means = _reduced(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _reduced(tensor: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    result = reduce(tensor, how)
    assert isinstance(result, Tensor)
    return result


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def _tail_steps(steps: int) -> int:
    """How many of the last of `steps` steps the final metrics are the means of."""
    return max(1, steps // 10)


def _named_parameters(groups: list[ParameterGroup], stage: str) -> dict[str, nn.Parameter]:
    """Full name → parameter over all groups. Raises ValueError for what cannot train."""
    named: dict[str, nn.Parameter] = {}
    for group in groups:
        for name, parameter in group.parameters.items():
            full = f"{group.name}/{name}"
            if full in named:
                raise ValueError(f"Stage {stage!r} has two parameters called {full}; give its groups different names.")
            if parameter.dtype != torch.float32 or not parameter.requires_grad:
                raise ValueError(
                    f"Parameter {full} of stage {stage!r} is {parameter.dtype} with requires_grad "
                    f"{parameter.requires_grad}; what trains must be float32 and require a gradient."
                )
            named[full] = parameter
    if not named:
        raise ValueError(f"Stage {stage!r} names no parameter to train; give it at least one parameter set.")
    return named


def _endless(rows: Rows, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Whole batches without end: where the rows end, they begin again."""
    empty = 0
    # Twice, because a run may go on from the very end of the rows.
    while empty < 2:
        empty += 1
        for batch in rows.batches(batch_size):
            if len(batch["input_ids"]) == batch_size:
                empty = 0
                yield batch
    raise ValueError(
        f"The data hold fewer than {batch_size} rows of {rows.length} tokens; add text or shorten the rows."
    )
