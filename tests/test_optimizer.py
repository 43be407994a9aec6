import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mar.objective import ParameterGroup
from mar.optimizer import TrainConfig, build_optimizers, lr_at


def test_cosine_by_hand() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [lr_at(step, 12, config) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # Eight steps of half a cosine from 1 to 0.2: the middle is the mean, a quarter in is 0.6 + 0.4 * cos(45°).
    assert rates[8] == pytest.approx(0.6)
    assert rates[6] == pytest.approx(0.6 + 0.4 * math.sqrt(0.5))
    assert rates[12] == pytest.approx(0.2)


def test_wsd_by_hand() -> None:
    config = TrainConfig(lr=2.0, warmup_steps=2, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.5)
    rates = [lr_at(step, 10, config) for step in range(11)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0])


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 300),
    schedule=st.sampled_from(["cosine", "wsd"]),
    decay=st.floats(0, 1),
    least=st.floats(0, 1),
)
def test_rates_stay_in_bounds_and_fall_after_warm_up(
    steps: int, warmup: int, schedule: Any, decay: float, least: float
) -> None:
    config = TrainConfig(lr=3.0, warmup_steps=warmup, schedule=schedule, decay_fraction=decay, min_lr_ratio=least)
    rates = [lr_at(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 3.0 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_steps_are_the_budget_rounded_up() -> None:
    config = TrainConfig(tokens=1001, batch_size=2, accumulation=5)
    assert config.steps(length=10) == 11
    assert config.steps(length=10, processes=2) == 6
    assert config.tokens_per_step(length=10, processes=2) == 200


def groups() -> list[ParameterGroup]:
    linear, norm, table = nn.Linear(4, 6), nn.LayerNorm(6), nn.Embedding(5, 4)
    return [
        ParameterGroup("linear", dict(linear.named_parameters()), muon=True),
        ParameterGroup("norm", dict(norm.named_parameters()), lr_scale=5.0, weight_decay=0.3),
        ParameterGroup("table", dict(table.named_parameters())),
    ]


def shapes(optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], list[tuple[int, ...]]]:
    return {
        (group["lr_scale"], group["weight_decay"]): [tuple(parameter.shape) for parameter in group["params"]]
        for group in optimizer.param_groups
    }


def test_adamw_takes_all_and_vectors_do_not_decay() -> None:
    (adamw,) = build_optimizers(groups(), TrainConfig(weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert shapes(adamw) == {(1.0, 0.1): [(6, 4), (5, 4)], (1.0, 0.0): [(6,)], (5.0, 0.3): [(6,), (6,)]}


def test_muon_takes_the_matrices_of_groups_that_ask() -> None:
    adamw, muon = build_optimizers(groups(), TrainConfig(optimizer="muon", weight_decay=0.1))
    assert isinstance(muon, torch.optim.Muon)
    assert shapes(muon) == {(1.0, 0.1): [(6, 4)]}
    assert shapes(adamw) == {(1.0, 0.0): [(6,)], (5.0, 0.3): [(6,), (6,)], (1.0, 0.1): [(5, 4)]}


def test_muon_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter group of this stage asks for it"):
        build_optimizers(groups()[1:], TrainConfig(optimizer="muon"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("batch_size", -1),
        ("lr", -0.1),
        ("lr", math.nan),
        ("min_lr_ratio", 1.5),
        ("clip", 0.0),
        ("optimizer", "sgd"),
        ("schedule", "linear"),
        ("precision", "fp16"),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value!r};"):
        TrainConfig(**{field: value})
