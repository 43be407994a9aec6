"""The backward shapes: each derivative integrates to its primitive and belongs to the staircase that it stands for."""

import itertools

import pytest
import torch

from mar.surrogate import PRIMITIVES, SURROGATES

SETTINGS = list(itertools.product((1, 4), (0.0, 0.5), (True, False)))
WINDOWED = [name for name in SURROGATES if name != "ste"]
every_shape = pytest.mark.parametrize("name", SURROGATES)
every_setting = pytest.mark.parametrize(("steps", "shift", "signed"), SETTINGS)


def test_every_derivative_has_a_primitive():
    assert SURROGATES.keys() == PRIMITIVES.keys() == {"ste", "rectangle", "triangle", "arctan", "sigmoid"}


@every_shape
@every_setting
def test_derivative_integrates_to_primitive(name, steps, shift, signed):
    v = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    area = torch.cumulative_trapezoid(SURROGATES[name](v, steps, shift, signed), v)
    rise = PRIMITIVES[name](v, steps, shift, signed)
    # Half a grid cell at each jump of the derivative is what the trapezoid rule can miss.
    torch.testing.assert_close(area, rise[1:] - rise[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", WINDOWED)
@every_setting
def test_windows_have_unit_area(name, steps, shift, signed):
    far = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    low, high = PRIMITIVES[name](far, steps, shift, signed)
    assert high.item() == pytest.approx(steps, abs=1e-5)
    assert low.item() == pytest.approx(-steps if signed else 0, abs=1e-5)


@pytest.mark.parametrize("name", ["rectangle", "triangle"])
@every_setting
def test_primitive_crosses_each_threshold_half_way(name, steps, shift, signed):
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(PRIMITIVES[name](k - shift, steps, shift, signed), k - 0.5)
    if signed:
        torch.testing.assert_close(PRIMITIVES[name](shift - k, steps, shift, signed), 0.5 - k)


@every_shape
@every_setting
def test_symmetry_and_sign(name, steps, shift, signed):
    v = torch.linspace(-7.03, 7.03, 401, dtype=torch.float64)
    slope, rise = SURROGATES[name](v, steps, shift, signed), PRIMITIVES[name](v, steps, shift, signed)
    assert (slope >= 0).all()
    assert (rise.diff() >= 0).all()
    if signed:
        torch.testing.assert_close(slope, slope.flip(0))
        torch.testing.assert_close(rise, -rise.flip(0))


def test_values_by_hand():
    v = torch.tensor([-4.6, -4.5, 0.0, 0.25, 0.75, 4.5, 4.6, 4.75])
    shapes = {name: shape(v, 4).tolist() for name, shape in SURROGATES.items()}
    assert shapes["ste"] == [0, 1, 1, 1, 1, 1, 0, 0]
    assert shapes["rectangle"] == [0, 1, 0, 0, 1, 1, 0, 0]
    assert shapes["triangle"] == pytest.approx([0.4, 0.5, 0, 0.25, 0.75, 0.5, 0.4, 0.25])
    # Pre-charged, the thresholds ±1/2 close the gap at 0; the binary neuron has none below.
    assert SURROGATES["rectangle"](v, 4, 0.5).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert SURROGATES["triangle"](v, 4, 0.5).tolist() == pytest.approx([0, 0, 1, 1, 1, 0, 0, 0])
    assert SURROGATES["ste"](v, 4, 0.0, False).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    # One threshold at 1: the windows have height 1 in their middle, and the mirror image adds its tail.
    one = torch.tensor([1.0])
    assert SURROGATES["arctan"](one, 1, 0.0, False).item() == pytest.approx(1)
    assert SURROGATES["arctan"](one, 1).item() == pytest.approx(1 + 1 / (1 + (2 * torch.pi) ** 2))
    assert SURROGATES["sigmoid"](one, 1, 0.0, False).item() == pytest.approx(1)


@every_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_keeps_shape_dtype_and_input(name, dtype):
    v = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = v.clone()
    for table in (SURROGATES, PRIMITIVES):
        result = table[name](v, 4)
        assert (result.shape, result.dtype) == (v.shape, dtype)
    assert torch.equal(v, before)
