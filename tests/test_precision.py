"""Which precision `auto` means: the rates are measured for real once, the choice is tested on given ones."""

import math

import pytest
import torch

from mar import kernels, precision
from mar.precision import faster_precision, forward_precision, matmul_rates, resolve_precision

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
    monkeypatch.setattr(kernels, "_NATIVE", True)
    assert [resolve_precision(name, CPU) for name in ("bf16", "fp32", "int8")] == ["bf16", "fp32", "int8"]


def test_auto_is_never_int8(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "matmul_rates", lambda _: {"bf16": 80, "fp32": 150, "int8": 900})
    faster_precision.cache_clear()
    assert resolve_precision("auto", CPU) == "fp32"
    faster_precision.cache_clear()


def test_int8_is_refused_where_nothing_runs_it(monkeypatch: pytest.MonkeyPatch):
    remedy = "use bf16, fp32 or auto"
    with pytest.raises(ValueError, match=f"precision is 'int8'.* on meta .*{remedy}"):
        resolve_precision("int8", torch.device("meta"))
    monkeypatch.setattr(kernels, "_NATIVE", False)
    with pytest.raises(ValueError, match=f"precision is 'int8'.* on cpu .*torch: .*{remedy}"):
        resolve_precision("int8", CPU)


def test_forward_runs_in_the_precision():
    linear, x = torch.nn.Linear(32, 32), torch.randn(4, 32)
    wide = linear(x)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("int8", torch.float32)):
        with forward_precision(name, CPU):
            found = linear(x)
        assert found.dtype == dtype
        assert torch.equal(found, wide) == (name == "fp32")
        assert torch.nn.functional.cosine_similarity(found.float(), wide).min() > 0.999


@pytest.mark.parametrize("native", [False, True])
def test_rates_are_of_all_precisions_that_run(monkeypatch: pytest.MonkeyPatch, native: bool):
    monkeypatch.setattr(kernels, "_NATIVE", native)
    matmul_rates.cache_clear()
    rates = matmul_rates("cpu")
    matmul_rates.cache_clear()
    assert set(rates) == ({"bf16", "fp32", "int8"} if native else {"bf16", "fp32"})
    assert all(rate > 0 and math.isfinite(rate) for rate in rates.values())
