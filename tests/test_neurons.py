"""Neurons: the recurrences against worked traces and other libraries, the closed form against the recurrences."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar import neurons
from mar.config import NeuronConfig
from mar.neurons import (
    build_neuron,
    closed_form,
    fold_threshold,
    has_closed_form,
    merge_spikes,
    recurrence,
)
from mar.surrogate import PRIMITIVES, SURROGATES

ASSETS = Path(__file__).parent / "assets" / "neurons"
KINDS = {
    "atmn": NeuronConfig(),
    "atmn-precharged": NeuronConfig(precharge=0.5),
    "atmn-leaky": NeuronConfig(tau=2.0),
    "atmn-leaky-precharged": NeuronConfig(tau=1.5, precharge=0.5),
    "atmn-growing-sum": NeuronConfig(tau=0.5, merge="sum"),
    "ternary": NeuronConfig(kind="ternary"),
    "binary": NeuronConfig(kind="binary"),
    "binary-precharged": NeuronConfig(kind="binary", precharge=0.5),
    "binary-leaky": NeuronConfig(kind="binary", tau=2.0),
}
CLOSED = {name: config for name, config in KINDS.items() if has_closed_form(config)}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
every_closed = pytest.mark.parametrize("config", CLOSED.values(), ids=CLOSED)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def neuron_with(config, a):
    neuron = build_neuron(config, len(a))
    neuron.a.data.copy_(a if config.threshold == "channel" else a[:1])
    return neuron


def distance_to_threshold(current, threshold, config):
    """How far |I| / V lies from the nearest point where the code changes, relative to that point, in fp64."""
    shift = config.precharge
    v = current.double().abs() / threshold.double()
    nearest = ((v + shift).round().clamp(1, config.time_steps)) - shift
    return (v - nearest).abs() / nearest


# Traces


def stored(name):
    content = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    return content["cases"] if isinstance(content, dict) else content


def trace_of(case):
    config = NeuronConfig(**case["config"])
    current, threshold = torch.tensor(case["current"], dtype=torch.float32), torch.tensor([case["threshold"]])
    return current, threshold, config, recurrence(current, threshold, config)


@pytest.mark.parametrize("name", ["atmn", "ternary", "binary"])
def test_golden_traces(name):
    """Worked in exact fractions from the equations; every number is exact in fp32, so equality is too."""
    for case in stored(name):
        current, threshold, config, trace = trace_of(case)
        assert trace.spikes.tolist() == case["spikes"]
        assert trace.membrane.tolist() == case["membrane"]
        neuron = neuron_with(config, threshold.log().expand(len(current)))
        assert torch.equal(neuron.threshold, threshold.expand(len(current)))
        assert neuron.spike_train(current).tolist() == case["spikes"]
        assert torch.equal(neuron.encode(current).int(), torch.tensor(case["spikes"]).sum(0, dtype=torch.int32))


@pytest.mark.parametrize("number", range(6))
def test_agrees_with_spikingjelly(number):
    """It fires at >= as we do, and its v after a step is our u_t."""
    case = stored("spikingjelly")[number]
    trace = trace_of(case)[3]
    assert trace.spikes.int().tolist() == case["spikes"]
    torch.testing.assert_close(trace.membrane, torch.tensor(case["membrane"]), atol=1e-6, rtol=1e-6)


def test_agrees_with_snntorch_but_at_the_threshold():
    """It fires at > where we fire at >=, and its mem is h_t: the reset comes one step later."""
    (case,) = stored("snntorch")
    current, threshold, _, trace = trace_of(case)
    before = torch.cat([current[None], trace.membrane[:-1]])
    theirs, potential = torch.tensor(case["spikes"]), torch.tensor(case["potential"])
    on_threshold = (before == threshold).any(0)
    assert 0 < on_threshold.sum() < len(current) / 3
    assert torch.equal(trace.spikes.int()[:, ~on_threshold], theirs[:, ~on_threshold])
    torch.testing.assert_close(before[:, ~on_threshold], potential[:, ~on_threshold], atol=1e-6, rtol=1e-6)
    assert ((trace.spikes.sum(0) - theirs.sum(0))[on_threshold] == 1).all()


def test_steps_by_hand():
    one = torch.ones(1)
    current = torch.tensor([7.0])
    leaky = NeuronConfig(tau=2.0)
    trace = recurrence(current, one, leaky)
    # h: 7, 6/2 = 3, 2/2 = 1, 0; three spikes worth 1, 2 and 4.
    assert trace.spikes[:, 0].tolist() == [1, 1, 1, 0]
    assert trace.membrane[:, 0].tolist() == [6, 2, 0, 0]
    assert merge_spikes(trace.spikes, one, leaky).item() == 7
    assert merge_spikes(trace.spikes, one, replace(leaky, merge="sum")).item() == 3
    # Hard reset: 0.45 stays below V / 2 once, is 0.5625 at the second step, and starts again: two spikes of four.
    ternary = build_neuron(NeuronConfig(kind="ternary"), 1)
    assert ternary.spike_train(torch.tensor([-0.45]))[:, 0].tolist() == [0, -1, 0, -1]
    assert ternary(torch.tensor([-0.45])).item() == -0.5


# Identities


@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["atmn", "binary"]),
    steps=st.integers(1, 12),
    tau=st.sampled_from([0.5, 0.9, 1.0, 1.7, 2.0]),
    precharge=st.sampled_from([0.0, 0.25, 0.4, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_current_is_weighted_spikes_plus_remainder(seed, kind, steps, tau, precharge):
    config = NeuronConfig(kind=kind, time_steps=steps, tau=tau, precharge=precharge)
    current, threshold = normal(40, 8, seed=seed, dtype=torch.float64) * 3, normal(8, seed=seed + 1).exp()
    spikes, membrane = recurrence(current, threshold, config)
    start = current.sign() * (threshold * precharge)
    rebuilt = merge_spikes(spikes, threshold, config) + tau ** (steps - 1) * membrane[-1]
    torch.testing.assert_close(current + start, rebuilt, atol=1e-9, rtol=1e-9)


@given(
    seed=st.integers(0, 2**20),
    kind=st.sampled_from(["atmn", "binary"]),
    steps=st.sampled_from([1, 2, 4, 8, 16, 127]),
    precharge=st.sampled_from([0.0, 0.25, 0.4, 0.5]),
    near=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=80, deadline=None)
def test_closed_form_is_the_recurrence(seed, kind, steps, precharge, near, dtype):
    """Equal wherever |I| / V is more than 1e-5 of its value away from each threshold, also right beside them."""
    config = NeuronConfig(kind=kind, time_steps=steps, precharge=precharge)
    threshold = normal(16, seed=seed).exp()
    current = normal(64, 16, seed=seed + 1) * threshold * steps / 2
    if near:
        multiple = torch.randint(1, steps + 1, current.shape, generator=torch.Generator().manual_seed(seed))
        offset = normal(*current.shape, seed=seed + 2) * 3e-5
        current = current.sign() * (multiple - precharge) * threshold * (1 + offset)
    current = current.to(dtype)
    expected = recurrence(current, threshold, config).spikes.sum(0)
    code = build_code(current, threshold, config)
    clear = distance_to_threshold(current, threshold, config) > 1e-5
    assert clear.float().mean() > 0.5
    assert torch.equal(code[clear], expected[clear])
    assert (code - expected).abs().max() <= 1


def build_code(current, threshold, config):
    return closed_form(current.float(), threshold, config)


def test_single_step_truncation_never_differs():
    config = NeuronConfig(time_steps=1)
    threshold = normal(4096).exp()
    for ulps in range(-3, 4):
        current = (threshold.view(torch.int32) + ulps).view(torch.float32)
        assert torch.equal(build_code(current, threshold, config), (current >= threshold).float())


@every_closed
def test_exact_multiples_are_not_missed(config):
    """A product with 1 / V would put some of them one level too low."""
    threshold = normal(512).exp().bfloat16().float()
    levels = torch.arange(1, 5)[:, None] - config.precharge
    current = levels * threshold
    assert torch.equal(build_code(current, threshold, config), torch.arange(1.0, 5)[:, None].expand(4, 512))
    assert torch.equal(recurrence(current, threshold, config).spikes.sum(0), build_code(current, threshold, config))
    if not config.precharge:
        assert (torch.trunc(current * (1 / threshold)) < levels).any()


def test_precharged_rounds_half_away_from_zero():
    v = torch.tensor([0.49, 0.5, 1.49, 1.5, 2.5, 3.5, 4.5, 9.0])
    for threshold in (1.0, 0.75, 0.1):
        neuron = neuron_with(NeuronConfig(precharge=0.5), torch.full((8,), threshold).log())
        current = v * neuron.threshold
        assert neuron.encode(current).tolist() == [0, 1, 1, 2, 3, 4, 4, 4]
        assert neuron.encode(-current).tolist() == [0, -1, -1, -2, -3, -4, -4, -4]
        assert neuron.encode(torch.zeros(8)).tolist() == [0] * 8


@every_kind
@pytest.mark.parametrize("steps", [1, 3, 127])
def test_codes_and_counts(config, steps):
    config = replace(config, time_steps=steps, tau=1.0 if steps == 127 else config.tau)
    neuron = neuron_with(config, normal(6) - 2)
    current = normal(5, 7, 6, seed=1) * 20
    code, train = neuron.encode(current), neuron.spike_train(current)
    assert code.dtype == train.dtype == torch.int8
    assert train.shape == (steps, 5, 7, 6)
    assert code.abs().max() <= steps
    assert train.abs().max() == 1
    assert (config.kind == "binary") == bool((code >= 0).all())
    assert torch.equal(train.sum(0), code)
    assert torch.equal(neuron.spike_count(current), train.abs().sum(0))


# The module


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_output_is_what_the_recurrence_says(config, dtype, threshold):
    config = replace(config, threshold=threshold)
    neuron = neuron_with(config, normal(6) / 2)
    current = (normal(3, 50, 6, seed=1) * 2).to(dtype)
    output = neuron(current)
    assert (output.shape, output.dtype) == (current.shape, dtype)
    trace = recurrence(current.float(), neuron.threshold, config)
    assert torch.equal(output, merge_spikes(trace.spikes, neuron.threshold, config).to(dtype))
    if config.tau == 1:
        assert torch.equal(output, (neuron.scale * neuron.encode(current)).to(dtype))


def test_bf16_is_compared_in_fp32():
    """A quotient rounded to bf16 lands on thresholds that the current has not reached."""
    neuron = neuron_with(NeuronConfig(time_steps=16), normal(64) / 2)
    current = (normal(500, 64, seed=1) * 6).bfloat16()
    expected = neuron.encode(current.float())
    assert torch.equal(neuron.encode(current), expected)
    assert torch.equal(neuron(current), (neuron.threshold * expected).bfloat16())
    rounded = (current / neuron.threshold.bfloat16()).float().trunc().clamp(-16, 16)
    assert (rounded != expected).float().mean() > 0.005


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(config, dtype):
    current = (normal(40, 6, seed=1) * 2).to(dtype)
    results = []
    for enabled in (False, True):
        neuron = neuron_with(config, normal(6) / 2)
        leaf = current.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = neuron(leaf)
            output.backward(normal(40, 6, seed=2).to(dtype))
        assert (output.dtype, leaf.grad.dtype, neuron.a.grad.dtype) == (dtype, dtype, torch.float32)
        results.append((output, leaf.grad, neuron.a.grad))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@every_closed
def test_chunks_do_not_show(config, monkeypatch):
    results = []
    for chunk in (2**18, 50, 3):
        monkeypatch.setattr(neurons, "CHUNK", chunk)
        neuron = neuron_with(config, normal(6) / 2)
        current = (normal(6, 43, seed=1) * 2).requires_grad_()
        # A transposed current and an expanded gradient: neither is contiguous.
        output = neuron(current.t())
        (output.sum() * 3).backward()
        results.append((output, current.grad, neuron.a.grad))
    for output, grad, grad_a in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(grad, results[0][1])
        torch.testing.assert_close(grad_a, results[0][2])


@every_kind
def test_empty_and_single(config):
    neuron = build_neuron(config, 6)
    for shape in ((0, 6), (2, 0, 6), (6,)):
        current = torch.ones(shape, requires_grad=True)
        output = neuron(current)
        output.sum().backward()
        assert output.shape == current.grad.shape == neuron.encode(current).shape == torch.Size(shape)
    assert torch.isfinite(neuron.a.grad).all()


@every_kind
def test_nan_is_seen_and_infinity_saturates(config):
    neuron = build_neuron(config, 3)
    current = torch.tensor([[float("nan"), 2.0, float("inf")], [1.0, float("-inf"), 0.0]])
    output = neuron(current)
    # The hard reset multiplies an infinite membrane by 0.
    hard = config.kind == "ternary"
    assert output.isnan().tolist() == [[True, False, hard], [False, hard, False]]
    assert hard or torch.equal(output[0, 2], neuron(torch.full((3,), 1e30))[0])
    for integers in (neuron.encode, neuron.spike_train, neuron.spike_count):
        with pytest.raises(ValueError, match="NaN"):
            integers(current)
    neuron.a.data[1] = float("nan")
    assert neuron(torch.ones(3)).isnan().tolist() == [False, True, False]


@every_kind
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_state_dict_round_trip(config, threshold, tmp_path):
    config = replace(config, threshold=threshold)
    neuron = neuron_with(config, normal(6))
    torch.save(neuron.state_dict(), tmp_path / "neuron.pt")
    other = build_neuron(config, 6)
    other.load_state_dict(torch.load(tmp_path / "neuron.pt"))
    assert list(neuron.state_dict()) == ["a"]
    assert neuron.a.shape == ((6,) if threshold == "channel" else (1,))
    current = normal(20, 6, seed=1)
    assert torch.equal(other(current), neuron(current))


def test_refusals():
    with pytest.raises(ValueError, match="surrogate is 'box'; use one of 'ste'"):
        build_neuron(NeuronConfig(surrogate="box"), 4)
    for changes in ({"tau": 2.0}, {"precharge": 0.5}):
        with pytest.raises(ValueError, match="the ternary neuron has a fixed leak"):
            build_neuron(NeuronConfig(kind="ternary", **changes), 4)
    for config in (NeuronConfig(), NeuronConfig(threshold="scalar")):
        with pytest.raises(ValueError, match="has 4 channels but its current has 5"):
            build_neuron(config, 4)(torch.zeros(2, 5))


# Gradients


def check_gradients(config, objective_at):
    """autograd of the module against central differences of `objective_at(current, a)`, both for I and a.

    Each output depends on its own current and its own threshold only, so all entries are moved at once.
    """
    neuron = neuron_with(config, normal(4) / 2)
    current, weights, step = normal(200, 4, seed=1) * 2.5, normal(200, 4, seed=2), 1e-6
    leaf = current.clone().requires_grad_()
    (neuron(leaf) * weights).sum().backward()
    a, x = neuron.a.detach().double(), current.double()
    objective = objective_at(x, a, config)
    expected_x = (objective(x + step, a) - objective(x - step, a)) / (2 * step) * weights
    expected_a = ((objective(x, a + step) - objective(x, a - step)) / (2 * step) * weights).sum(0).sum_to_size(a.shape)
    torch.testing.assert_close(leaf.grad.double(), expected_x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(neuron.a.grad.double(), expected_a, atol=1e-3, rtol=1e-4)
    assert expected_a.abs().max() > 0.1


@every_closed
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_closed_form_gradient(config, surrogate, threshold):
    """The surrogate objective is V (S(I / V) + r) with the rest r = code - S frozen where the gradient is taken."""

    def objective_at(x, a, config):
        def smooth(x, a):
            return PRIMITIVES[surrogate](x / a.exp(), config.time_steps, config.precharge, config.kind != "binary")

        rest = closed_form(x, a.exp(), config) - smooth(x, a)
        return lambda x, a: a.exp() * (smooth(x, a) + rest)

    check_gradients(replace(config, surrogate=surrogate, threshold=threshold), objective_at)


def smooth_steps(x, a, config, marks):
    """The T steps with each firing S(h / V) + rest; called with no `marks`, it spikes for real and notes the rests."""
    recording, hard = not marks, config.kind == "ternary"
    threshold, shift, signed = a.exp(), 0.5 if hard else 0.0, config.kind != "binary"
    u = config.tau * x.sign() * threshold * config.precharge
    total = torch.zeros_like(x)
    for t in range(config.time_steps):
        h = u / 4 + x if hard else u / config.tau + (x if t == 0 else 0)
        smooth = PRIMITIVES[config.surrogate](h / threshold, 1, shift, signed)
        if recording:
            level = threshold * (1 - shift)
            spike = (h >= level).double() - (h <= -level).double() * signed
            marks.append((spike, spike - smooth))
        spike, rest = marks[t]
        s = smooth + rest
        # |s| is s times the sign that it has at the point of the gradient, 0 where nothing fires.
        u = h * (1 - s * spike) if hard else h - s * threshold
        total = total + s * (config.tau**t if config.merge == "weighted" else 1)
    return total * threshold / (config.time_steps if hard else 1)


@every_kind
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_recurrence_gradient(config, surrogate, threshold):
    """Back-propagation through the steps: each firing is S(h / V) plus its own frozen rest."""

    def objective_at(x, a, config):
        marks = []
        smooth_steps(x, a, config, marks)
        return lambda x, a: smooth_steps(x, a, config, marks)

    tau = 1.25 if has_closed_form(config) else config.tau
    check_gradients(replace(config, surrogate=surrogate, threshold=threshold, tau=tau), objective_at)


@pytest.mark.parametrize("kind", ["atmn", "binary"])
def test_straight_through_is_the_same_by_steps(kind):
    """Through the T steps, `ste` gives just the closed form's gradient."""
    config = NeuronConfig(kind=kind)
    results = []
    for stepwise in (False, True):
        neuron = neuron_with(config, normal(8) / 2)
        current = (normal(100, 8, seed=1) * 3).requires_grad_()
        threshold = neuron.threshold
        output = (
            merge_spikes(recurrence(current, threshold, config).spikes, threshold, config)
            if stepwise
            else neuron(current)
        )
        output.backward(normal(100, 8, seed=2))
        results.append((output, current.grad, neuron.a.grad))
    for closed, stepped in zip(*results, strict=True):
        torch.testing.assert_close(closed, stepped, atol=1e-5, rtol=1e-5)


def test_frozen_parts_get_no_gradient():
    neuron = neuron_with(NeuronConfig(), normal(6))
    current = normal(10, 6, seed=1)
    neuron(current).sum().backward()
    learned = neuron.a.grad.clone()
    neuron.a.grad = None
    neuron.a.requires_grad_(False)
    leaf = current.clone().requires_grad_()
    neuron(leaf).sum().backward()
    assert neuron.a.grad is None
    assert learned.abs().sum() > 0
    assert leaf.grad.abs().sum() > 0


# Folding


@pytest.mark.parametrize("name", ["atmn", "atmn-precharged", "ternary", "binary"])
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_equals_unfolded(name, threshold, dtype):
    neuron = neuron_with(replace(KINDS[name], threshold=threshold), normal(32) / 2)
    weight, current = normal(16, 32, seed=1).to(dtype), normal(50, 32, seed=2) * 2
    folded = fold_threshold(weight, neuron.scale)
    assert folded.dtype == torch.float32
    unfolded = neuron(current).double() @ weight.double().t()
    assert unfolded.abs().max() > 1
    by_code = neuron.encode(current).double() @ folded.double().t()
    torch.testing.assert_close(by_code, unfolded, atol=1e-5, rtol=1e-5)
