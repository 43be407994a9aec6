"""Which precision `auto` means: the rates are measured for real once, the choice is tested on given ones."""

import math

import pytest
import torch

from mar import precision
from mar.precision import faster_precision, matmul_rates, resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bf16", "fp32", "found"), [(400, 200, "bf16"), (83, 150, "fp32"), (150, 160, "bf16")])
def test_auto_is_bf16_unless_fp32_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: float, fp32: float, found: str
):
    monkeypatch.setattr(precision, "matmul_rates", lambda _: {"bf16": bf16, "fp32": fp32})
    faster_precision.cache_clear()
    assert resolve_precision("auto", CPU) == found
    faster_precision.cache_clear()


def test_a_named_precision_is_kept_without_measuring(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "faster_precision", lambda _: pytest.fail("was asked"))
    assert [resolve_precision(name, CPU) for name in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_rates_are_of_both_precisions():
    rates = matmul_rates("cpu")
    assert set(rates) == {"bf16", "fp32"}
    assert all(rate > 0 and math.isfinite(rate) for rate in rates.values())
