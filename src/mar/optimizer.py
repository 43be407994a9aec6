"""How a run optimizes: its settings, its learning rate at every step, its optimizers.

Does: hold every setting of the loop, and refuse values that make no run. Does not: loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mar.objective import ParameterGroup


@dataclass(frozen=True)
class TrainConfig:
    """How a stage trains.

    tokens: the budget; rounded up to whole steps. batch_size: rows per process and micro step.
    accumulation: micro steps per step. lr, betas, weight_decay: of AdamW; a parameter group scales or replaces them.
    optimizer: `adamw`, or `muon` for the 2-D weights of the groups that ask for it (momentum 0.95, updates scaled to
        AdamW's size, so the same lr serves both) and AdamW for the rest.
    warmup_steps: of linear warm-up.
    schedule: `cosine` falls to min_lr_ratio * lr over the remaining steps; `wsd` (warm-up, stable, decay) keeps lr, and
        falls linearly to the same value over the last decay_fraction of all steps.
    clip: largest gradient norm, or None. precision: `bf16` autocast (parameters stay in fp32), `fp32`, `int8` (matrix
        products only, on CPUs; see mar.kernels.int8), or `auto`: bf16 unless fp32 is faster (see mar.precision).
    checkpoint_minutes, keep_checkpoints, log_every (steps), tensorboard: what is written; no number depends on them.
    """

    tokens: int = 1_000_000
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup_steps: int = 20
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.0
    clip: float | None = 1.0
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto"
    seed: int = 0
    checkpoint_minutes: float = 5.0
    keep_checkpoints: int = 2
    log_every: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "wsd")),
            ("precision", ("auto", "bf16", "fp32", "int8")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, allowed))}.")
        for name in ("tokens", "batch_size", "accumulation", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("lr", "weight_decay", "warmup_steps", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number from 0 up.")
        for name in ("decay_fraction", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; use a norm above 0, or null for no clipping.")

    def tokens_per_step(self, length: int, processes: int = 1) -> int:
        """Tokens that one optimizer step sees, over all processes, in rows of `length` tokens."""
        return self.batch_size * length * self.accumulation * processes

    def steps(self, length: int, processes: int = 1) -> int:
        """Optimizer steps that the budget buys, the last one whole."""
        return math.ceil(self.tokens / self.tokens_per_step(length, processes))


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (counted from 0) of `steps`, before any group's factor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        fallen = 0.5 * (1 - math.cos(math.pi * progress))
    else:
        decay_steps = round(config.decay_fraction * steps)
        fallen = max(0.0, (step - (steps - decay_steps)) / max(1, decay_steps))
    return config.lr * (1 - (1 - config.min_lr_ratio) * fallen)


def build_optimizers(groups: list[ParameterGroup], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run; their groups carry `lr_scale`. Raises ValueError where Muon has nothing to train."""
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for group in groups:
        for parameter in group.parameters.values():
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            settings = {
                "params": [parameter],
                "lr_scale": group.lr_scale,
                "weight_decay": decay if group.weight_decay is None else group.weight_decay,
            }
            by_muon = config.optimizer == "muon" and group.muon and parameter.ndim == 2
            (muon if by_muon else adamw).append(settings)
    if config.optimizer == "muon" and not muon:
        raise ValueError("optimizer is 'muon', but no parameter group of this stage asks for it; use 'adamw'.")
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(_merged(adamw), lr=config.lr, betas=config.betas, fused=True))
    if muon:
        optimizers.append(torch.optim.Muon(_merged(muon), lr=config.lr, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _merged(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join parameters of equal settings, so that one fused call serves them all."""
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for one in settings:
        key = (one["lr_scale"], one["weight_decay"])
        if key in merged:
            merged[key]["params"] += one["params"]
        else:
            merged[key] = one
    return list(merged.values())
