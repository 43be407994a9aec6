"""Tiny models as the engine's tests need them: ragged sizes, calibrated neurons, and what torch's neurons did."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mar.calibration import calibrate_threshold
from mar.engine import Engine
from mar.model import MarForCausalLM
from mar.neurons import Neuron
from tiny_models import mar_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import engine_fidelity

run_torch = engine_fidelity.run_torch

RAGGED: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 40,
    "intermediate_size": 200,
    "num_heads": 3,
    "head_dim": 8,
    "state_size": 6,
    "mlp_bias": True,
}
"""No size is a multiple of 16, inner and hidden size differ, and a gate and its up half fill more than one slice."""

SPIKING: dict[str, dict[str, Any]] = {
    "in_proj": {"time_steps": 4},
    "out_proj": {"kind": "binary", "time_steps": 3},
    "gate_up": {"time_steps": 16, "precharge": 0.3},
    "down_proj": {"time_steps": 2, "threshold": "scalar", "precharge": 0.5},
}
"""All four sites, no two alike."""


def spiking_model(seed: int = 0, **changes: Any) -> MarForCausalLM:
    """A model of RAGGED sizes whose thresholds are those of least error on random tokens, give or take a little."""
    model = mar_model(seed, **deepcopy({**RAGGED, "neurons": SPIKING, **changes}))

    def calibrate(neuron: Neuron, inputs: tuple[Tensor]) -> None:
        current = inputs[0].detach().flatten(0, -2)
        neuron.a.data = calibrate_threshold(current, neuron.config) + 0.3 * torch.randn_like(neuron.a)

    hooks = [neuron.register_forward_pre_hook(calibrate) for _, _, neuron in model.neuron_sites()]
    with torch.no_grad():
        model(tokens(64, seed, model.config.vocab_size)[None])
    for hook in hooks:
        hook.remove()
    return model


def tokens(count: int, seed: int = 0, vocabulary: int = RAGGED["vocab_size"]) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def saved(model: MarForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def engine(model: MarForCausalLM, folder: Path, precision: str = "fp32", threads: int = 1, **settings: Any) -> Engine:
    """The model on the engine; folder: where to put it, and what is packed."""
    path = saved(model, folder / "model")
    return Engine.from_pretrained(path, precision=precision, threads=threads, cache=folder, **settings)
