"""The native training kernels against fp64: outputs, final states and all gradients, on every instruction set."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mar import kernels
from mar.config import NeuronConfig
from mar.kernels import chunked, native, reference
from mar.mixer import DiscreteMamba2, MixerState
from mar.neurons import _ClosedForm, build_neuron
from tiny_models import mar_config, rms_ratio

LENGTHS = st.sampled_from([1, 2, 3, 17, 63, 64, 65, 130])
WIDTHS = st.sampled_from([1, 5, 8, 16, 33, 64])
NEEDS = {
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"},
}
NEEDS["amx"] = NEEDS["avx512"] | {"amx_tile", "amx_int8"}
"""Variants beyond the baseline and the flags of /proc/cpuinfo that they need."""


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.core is not None, native.REASON
    monkeypatch.setattr(kernels, "_NATIVE", True)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def packed(batch: int, length: int) -> Tensor:
    return torch.randint(0, 4, (batch, length)).sort(1).values


def scan_inputs(length: int, heads: int, width: int, size: int, slowest: float = 0.0) -> list[Tensor]:
    """x, log decay, B, C and state in fp64, in values that bf16 holds exactly where they may be bf16."""
    x, b, c = (normal(2, length, heads, n).bfloat16().double() for n in (width, size, size))
    log_decay = -(slowest + torch.rand(2, length, heads)).float().double()
    return [x, log_decay, b, c, normal(2, heads, width, size).float().double()]


def cast(inputs: list[Tensor], dtype: torch.dtype, wide: tuple[int, ...]) -> list[Tensor]:
    """Inputs in dtype, those at the places `wide` in fp32."""
    return [t.to(torch.float32 if i in wide else dtype) for i, t in enumerate(inputs)]


def results(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs of a fixed random weighing of the outputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().double()
        loss = loss + (output.double() * weights).sum()
    return [output.detach() for output in outputs] + list(torch.autograd.grad(loss, leaves))


def assert_close(found: list[Tensor], truth: list[Tensor], limit: float) -> None:
    for i, (one, other) in enumerate(zip(found, truth, strict=True)):
        assert one.isfinite().all(), i
        if other.any():
            assert rms_ratio(one, other) < limit, i


def assert_no_worse(found: list[Tensor], peer: list[Tensor], truth: list[Tensor]) -> None:
    """No further from the truth than 1.2 times what the peer is."""
    for i, (one, other, exact) in enumerate(zip(found, peer, truth, strict=True)):
        assert one.dtype == other.dtype, i
        assert rms_ratio(one, exact) <= 1.2 * rms_ratio(other, exact), i


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(1, 3), WIDTHS, WIDTHS, st.booleans())
def test_scan_is_the_recurrence(length, heads, width, size, cut):
    torch.manual_seed(length + width)
    inputs = scan_inputs(length, heads, width, size)
    ids = packed(2, length) if cut else None
    truth = results(lambda *i: chunked.scan(*i, ids), inputs)
    assert rms_ratio(truth[0], reference.scan_recurrent(*inputs, ids)[0]) < 1e-12
    assert_close(results(lambda *i: native.scan(*i, ids), cast(inputs, torch.float32, ())), truth, 1e-5)


@pytest.mark.parametrize("cut", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("width", [8, 64])
def test_scan_in_bf16_is_no_worse_than_torch(width, cut):
    inputs = scan_inputs(150, 2, width, 64)
    ids = packed(2, 150) if cut else None
    truth = results(lambda *i: chunked.scan(*i, ids), inputs)
    low = cast(inputs, torch.bfloat16, (1, 4))
    peer = results(lambda *i: chunked.scan(*i, ids), low)
    assert_no_worse(results(lambda *i: native.scan(*i, ids), low), peer, truth)


@pytest.mark.parametrize("rate", [0.0, 1e-5, 1e-3])
def test_thousands_of_steps_that_forget_little(rate):
    inputs = scan_inputs(4000, 1, 3, 8)
    inputs[1] = (inputs[1] * rate).float().double()
    truth = results(lambda *i: chunked.scan(*i), inputs)
    assert_close(results(lambda *i: native.scan(*i), cast(inputs, torch.float32, ())), truth, 1e-5)


def test_strong_and_weak_decay_side_by_side():
    inputs = scan_inputs(200, 2, 8, 8)
    inputs[1] = torch.where(torch.rand(2, 200, 2) < 0.3, -50.0, inputs[1] * 1e-3).float().double()
    truth = results(lambda *i: chunked.scan(*i), inputs)
    assert_close(results(lambda *i: native.scan(*i), cast(inputs, torch.float32, ())), truth, 1e-5)


def test_scan_reads_slices_and_strides_as_they_are():
    wide = torch.randn(2, 70, 3 * (8 + 16 + 16)).requires_grad_()
    log_decay = -torch.rand(2, 70, 3)

    def run(rows: Tensor, scan: Callable) -> Tensor:
        x, b, c = (part.unflatten(-1, (3, -1)) for part in rows.split([24, 48, 48], dim=-1))
        return scan(x, log_decay.to(rows.dtype), b, c)[0]

    truth = results(lambda rows: run(rows, chunked.scan), [wide.double()])
    assert_close(results(lambda rows: run(rows, native.scan), [wide]), truth, 1e-5)
    assert_close(results(lambda rows: run(rows.transpose(0, 1).contiguous().transpose(0, 1), native.scan), [wide]),
                 truth, 1e-5)  # fmt: skip


def test_threads_change_nothing():
    inputs = cast(scan_inputs(130, 3, 16, 16), torch.float32, ())
    single = results(lambda *i: native.scan(*i), inputs)
    torch.set_num_threads(3)
    several = results(lambda *i: native.scan(*i), inputs)
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(single, several, strict=True))


@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.integers(1, 4), st.sampled_from([1, 6, 64, 112, 241]), st.booleans())
def test_conv_is_the_reference(length, taps, channels, cut):
    torch.manual_seed(length + channels)
    inputs = [normal(2, length, channels), normal(channels, taps), normal(channels), normal(2, taps - 1, channels)]
    inputs = [t.bfloat16().double() for t in inputs]
    ids = packed(2, length) if cut else None
    truth = results(lambda *i: reference.causal_conv(*i, ids), inputs)
    found = results(lambda *i: native.causal_conv(*i, ids), cast(inputs, torch.float32, ()))
    assert_close(found, truth, 1e-5)
    low = cast(inputs, torch.bfloat16, (1, 2))
    found = results(lambda *i: native.causal_conv(*i, ids), low)
    peer = results(lambda *i: chunked.causal_conv(*i, ids), low)
    for one, other, exact in zip(found, peer, truth, strict=True):
        # the peer may be exact, where few numbers are added up
        if exact.any():
            assert rms_ratio(one, exact) <= max(1.2 * rms_ratio(other, exact), 2**-8)


def mixer_pass(mixer: DiscreteMamba2, hidden: Tensor, state: MixerState | None, ids: Tensor | None) -> list[Tensor]:
    """Output, last state, and the gradients of hidden and of every parameter."""
    hidden = hidden.clone().requires_grad_()
    y, last = mixer(hidden, state, None, ids)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    loss = (y * weights.to(y.dtype)).sum() + last.ssm.square().sum().to(y.dtype)
    return [y.detach(), last.ssm.detach(), *torch.autograd.grad(loss, [hidden, *mixer.parameters()])]


@pytest.mark.parametrize("gain", ["none", "one_minus_decay"])
@pytest.mark.parametrize("unit", ["none", "l2"])
@pytest.mark.parametrize("continues", [False, True], ids=["from nothing", "from a state"])
def test_fused_mixer_is_the_composed_one(gain, unit, continues, monkeypatch):
    config = mar_config(input_gain=gain, bc_norm=unit)
    mixer = DiscreteMamba2(config)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, ids = torch.randn(2, 70, config.hidden_size), packed(2, 70)
    past = torch.randn(2, config.conv_kernel - 1, config.conv_size)
    ssm = torch.randn(2, config.num_heads, config.head_dim, config.state_size)
    state = MixerState(past, ssm) if continues else None
    found = mixer_pass(mixer, hidden, state, ids)
    with torch.autocast("cpu", torch.bfloat16):
        low = mixer_pass(mixer, hidden, state, ids)
        monkeypatch.setattr(kernels, "_NATIVE", False)
        peer = mixer_pass(mixer, hidden, state, ids)
    wide = None if state is None else MixerState(*(t.double() for t in state))
    truth = mixer_pass(mixer.double(), hidden.double(), wide, ids)
    assert_close(found, truth, 1e-5)
    # Both round their input to bf16 first, which is most of the error and differs by chance between parameters.
    errors = [sum(rms_ratio(one, exact) for one, exact in zip(some, truth, strict=True)) for some in (low, peer)]
    assert errors[0] <= 1.2 * errors[1]


CURRENTS = st.one_of(
    st.floats(-40, 40, width=32),
    st.integers(-20, 20).map(lambda n: n / 2),  # exact levels and halves between them
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, 1e-30]),
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(CURRENTS, min_size=1, max_size=40),
    st.sampled_from([0.5, 1.0, 0.3]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([0.0, 0.25, 0.3, 0.5]),
    st.sampled_from(["atmn", "binary"]),
    st.sampled_from(["channel", "scalar"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_staircase_is_the_closed_form_bit_for_bit(values, v, steps, precharge, kind, threshold, dtype):
    config = NeuronConfig(kind=kind, time_steps=steps, precharge=precharge, threshold=threshold)
    neuron = build_neuron(config, len(values))
    torch.nn.init.constant_(neuron.a, float(torch.tensor(v).log()))
    current = torch.tensor([values] * 70).to(dtype).requires_grad_()
    found = neuron(current)
    expected = _ClosedForm.apply(current, neuron.threshold, config)
    assert found.dtype == dtype
    assert torch.equal(found.nan_to_num(99), expected.nan_to_num(99))
    weights = torch.randn(found.shape).to(dtype)
    slopes = (torch.autograd.grad(output, current, weights, retain_graph=True)[0] for output in (found, expected))
    # Where the current is NaN, torch's gradient depends on the place in a vector.
    known = ~current.isnan()
    assert torch.equal(*(slope[known] for slope in slopes))
    found_a, expected_a = (torch.autograd.grad(output, neuron.a, weights)[0] for output in (found, expected))
    finite = expected_a.isfinite()
    assert torch.equal(found_a.isfinite(), finite)
    scale = weights.float().abs().sum() * steps * v
    assert (found_a - expected_a)[finite].abs().sum() <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["atmn", "binary"])
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_mean_spikes_are_counted_as_torch_counts_them(monkeypatch, kind, threshold, dtype):
    neuron = build_neuron(NeuronConfig(kind=kind, time_steps=4, precharge=0.25, threshold=threshold), 37)
    torch.nn.init.normal_(neuron.a, std=0.3)
    current = torch.where(torch.rand(3, 50, 37) < 0.2, 4 * neuron.threshold.detach(), 4 * torch.randn(3, 50, 37))
    current = current.to(dtype).requires_grad_()
    found = neuron.mean_spikes(current)
    slopes = torch.autograd.grad(3 * found, (current, neuron.a))
    monkeypatch.setattr(kernels, "_NATIVE", False)
    expected = neuron.mean_spikes(current)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(neuron.spike_count(current).double().mean().item(), rel=1e-6)
    torch.testing.assert_close(found, expected)
    for slope, wanted in zip(slopes, torch.autograd.grad(3 * expected, (current, neuron.a)), strict=True):
        torch.testing.assert_close(slope, wanted)
        assert slope.abs().sum() > 0


def test_mean_spikes_refuse_nan():
    with pytest.raises(ValueError, match="NaN"):
        build_neuron(NeuronConfig(), 5).mean_spikes(torch.full((2, 5), torch.nan))


@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_read():
    ids = packed(2, 70)
    scan = cast(scan_inputs(70, 2, 5, 7), torch.float32, ())
    conv = [torch.randn(2, 70, 6), torch.randn(6, 4), torch.randn(6), torch.randn(2, 3, 6)]
    neuron = build_neuron(NeuronConfig(), 6)

    def run() -> list[Tensor]:
        return [
            *results(lambda *i: native.scan(*i, ids), scan),
            *results(lambda *i: native.causal_conv(*i, ids), conv),
            *results(neuron, conv[:1]),
            *results(neuron.mean_spikes, conv[:1]),
        ]

    poisoned = run()
    torch.utils.deterministic.fill_uninitialized_memory = False
    for one, other in zip(poisoned, run(), strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_a_gradient_of_the_state_alone():
    inputs = cast(scan_inputs(70, 2, 5, 7), torch.float32, ())
    run = lambda scan: results(lambda *i: scan(*i)[1], inputs)  # noqa: E731
    assert_close(run(native.scan), run(chunked.scan), 1e-5)


def test_what_does_not_fit_stays_with_torch():
    inputs = scan_inputs(20, 2, 4, 4)
    assert torch.equal(kernels.scan(*inputs)[0], chunked.scan(*inputs)[0])
    conv = torch.randn(1, 9, 4), torch.randn(4, 6), torch.randn(4)
    assert torch.equal(kernels.causal_conv(*conv), chunked.causal_conv(*conv))
    assert not native.takes(torch.zeros(1, 0)) and not native.takes(torch.zeros(1, device="meta"))  # noqa: PT018


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables)


def test_the_backend_can_be_forced():
    code = "from mar import kernels; print(kernels.backends()['scan'])"
    assert python(code, MAR_KERNELS="native").stdout.startswith("native: ")
    assert python(code, MAR_KERNELS="torch").stdout.startswith("torch: ")
    assert "MAR_KERNELS is 'cuda'; use 'torch' or 'native'" in python(code, MAR_KERNELS="cuda").stderr


def test_forcing_a_core_that_is_missing_is_refused():
    code = "import sys; sys.modules['mar._native'] = None; from mar import kernels; print(kernels.backends()['scan'])"
    assert "without its native core" in python(code).stdout
    assert "MAR_KERNELS is 'native', but" in python(code, MAR_KERNELS="native").stderr


def other_variants() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    best = native.core.variant()["name"] if native.core else ""
    names = ["generic", *(name for name, needed in NEEDS.items() if needed <= flags)]
    return [] if "MAR_ISA" in os.environ else [name for name in names if name != best]


@pytest.mark.parametrize("file", ["test_kernels_native.py", "test_kernels_int8.py"])
def test_all_of_this_holds_on_the_other_instruction_sets(file):
    for name in other_variants():
        path = str(Path(__file__).with_name(file))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not other and not training",
            path,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MAR_ISA": name})
        assert done.returncode == 0, f"{name}: {done.stdout[-3000:]}"
