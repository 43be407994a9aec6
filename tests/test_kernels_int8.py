"""int8 products against fp64: exact where nothing is rounded, near elsewhere, loud about NaN, and out of the way."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mar import kernels
from mar.config import NeuronConfig, site_neurons
from mar.conversion import convert_llama
from mar.insertion import insert_neurons
from mar.kernels import int8, native
from mar.losses import chunked_bidirectional_kl, forward_kl
from mar.mixer import DiscreteMamba2
from mar.neurons import build_neuron
from mar.objective import Objective
from mar.precision import forward_precision
from mar.stages import Distill, Spike
from mar.train import TrainConfig, train
from tiny_models import llama_model, mar_config, mar_model, packed_rows, rms_ratio
from tiny_training import log_of

Spikes = tuple[Tensor, int]
SHAPES = [(4, 32, 32), (12, 96, 32), (260, 160, 96), (300, 32, 160), (32, 64, 64)]
"""Tokens, inputs and outputs: what fills no tile of 12 rows, no block of 256, and what fills panels of 32."""

BAD = [float("nan"), float("inf"), -float("inf")]
WIDE = {"intermediate_size": 64, "state_size": 8}
"""Makes every width of the tiny models a multiple of 32, but for the decay rows."""


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.core is not None, native.REASON
    monkeypatch.setattr(kernels, "_NATIVE", True)


def products(
    x: Tensor, weight: Tensor, gradient: Tensor, spikes: Spikes | None = None, by: Callable = int8.linear
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = by(x, weight, spikes)
    return y.detach(), *torch.autograd.grad(y, (x, weight), gradient)


def exact(x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in fp64."""
    return products(x.double(), weight.double(), gradient.double(), by=lambda x, weight, _: F.linear(x, weight))


def spread(count: int, octaves: float) -> Tensor:
    """Sizes from 2^-octaves to 2^octaves in random order."""
    return 2 ** torch.linspace(-octaves, octaves, count)[torch.randperm(count)]


def whole(rows: int, columns: int) -> Tensor:
    """Random codes, 127 of either sign in every row and every column."""
    codes = torch.randint(-127, 128, (rows, columns)).float()
    codes[torch.arange(rows), torch.randint(columns, (rows,))] = 127
    codes[torch.randint(rows, (columns,)), torch.arange(columns)] = 127
    return codes * torch.randint(2, (rows, 1)).mul(2).sub(1)


def assert_near(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], limit: float = 0.03) -> None:
    for i, (one, other) in enumerate(zip(found, truth, strict=True)):
        assert rms_ratio(one, other) < limit, i
        assert F.cosine_similarity(one.double().flatten(), other.double().flatten(), 0) > 0.999, i


def equal(found: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, others, strict=True))


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("scales", ["one", "each input"])
def test_what_fits_8_bits_is_multiplied_exactly(tokens, inputs, outputs, scales):
    scale = torch.tensor([0.125]) if scales == "one" else 2.0 ** torch.randint(-4, 4, (inputs,))
    x = torch.randint(-127, 128, (tokens, inputs)) * scale
    weight = whole(outputs, inputs) / scale
    gradient = whole(tokens, outputs)
    found = products(x, weight, gradient, (scale, 127))
    assert all(one.dtype == torch.float32 for one in found)
    assert equal(tuple(one.double() for one in found), exact(x, weight, gradient))


@pytest.mark.parametrize("shape", [(2, 130), (5, 4), (1, 3, 4)])
def test_leading_dimensions_are_kept(shape):
    scale = torch.tensor([0.5])
    x = torch.randint(-127, 128, (*shape, 96)) * scale
    weight = whole(64, 96) / scale
    gradient = whole(x[..., 0].numel(), 64).view(*shape, 64)
    found = products(x, weight, gradient, (scale, 127))
    assert equal(tuple(one.double() for one in found), exact(x, weight, gradient))


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_inputs_of_very_different_sizes_are_near(tokens, inputs, outputs):
    x = torch.randn(tokens, inputs) * spread(inputs, 3)
    weight = torch.randn(outputs, inputs)
    gradient = torch.randn(tokens, outputs) * spread(outputs, 2) * spread(tokens, 2)[:, None]
    assert_near(products(x, weight, gradient), exact(x, weight, gradient))


def test_one_huge_input_costs_the_rest_little():
    """Without smoothing its column would leave the others of a token four levels."""
    x, weight, gradient = torch.randn(256, 128), torch.randn(64, 128), torch.randn(256, 64)
    x[:, 5] *= 100
    weight[:, 5] /= 100
    truth = exact(x, weight, gradient)
    assert rms_ratio(products(x, weight, gradient)[0], truth[0]) < 0.03
    step = x.abs().amax(1, keepdim=True) / 127
    assert rms_ratio((x / step).round() * step @ weight.t(), truth[0]) > 0.1


def test_strides_are_read_as_they_are():
    x, gradient = torch.randn(68, 96), torch.randn(68, 64)
    wide = torch.randn(128, 160)
    for weight in (wide[:64, :96], wide[64:, 32:128], wide[::2, :96], wide.split([64, 64])[1].narrow(1, 64, 96)):
        assert equal(products(x, weight, gradient), products(x, weight.clone(), gradient))
    weight = torch.randn(64, 96)
    truth = products(x, weight, gradient)
    apart = torch.randn(68, 200)
    apart[:, 7:103] = x
    for view in (x.t().contiguous().t(), apart[:, 7:103], torch.stack([x, x], -1)[..., 0]):
        assert not view.is_contiguous()
        assert equal(products(view, weight, gradient), truth)
    batch = x.view(17, 4, 96).transpose(0, 1).contiguous().transpose(0, 1)
    found = products(batch, weight, gradient.view(17, 4, 64))
    assert equal(tuple(one.view(other.shape) for one, other in zip(found, truth, strict=True)), truth)


def test_gradients_may_be_views_too():
    x, weight = torch.randn(68, 96), torch.randn(64, 96)
    one, wide = torch.randn(64), torch.randn(68, 100)
    turned = torch.randn(64, 68).t()
    for gradient in (one.expand(68, 64), torch.tensor(0.5).expand(68, 64), wide[:, :64], wide[:, 9:73], turned):
        assert not gradient.is_contiguous()
        assert equal(products(x, weight, gradient), products(x, weight, gradient.clone()))
    x.requires_grad_()
    int8.linear(x, weight).sum().backward()
    assert torch.equal(x.grad, products(x, weight, torch.ones(68, 64))[1])


def test_gradients_of_a_split_weight_are_put_together():
    x, parameter, gradient = torch.randn(20, 32), torch.randn(96, 32).requires_grad_(), torch.randn(20, 96)
    first, last = parameter.split([64, 32])
    y = torch.cat([int8.linear(x, first), int8.linear(x, last)], 1)
    assert_near(
        (y, gradient @ parameter, torch.autograd.grad(y, parameter, gradient)[0]), exact(x, parameter, gradient)
    )


def test_only_gradients_that_are_wanted_are_made():
    x, weight, gradient = torch.randn(8, 32), torch.randn(64, 32), torch.randn(8, 64)
    y, dx, dweight = products(x, weight, gradient)
    assert not int8.linear(x, weight).requires_grad
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(int8.linear(x, weight), x, gradient)[0], dx)
    x, weight = x.detach(), weight.requires_grad_()
    assert torch.equal(torch.autograd.grad(int8.linear(x, weight), weight, gradient)[0], dweight)
    with torch.no_grad():
        assert torch.equal(int8.linear(x, weight), y)


def rounded_weight(weight: Tensor, scale: Tensor, steps: int) -> Tensor:
    """What the codes of a weight stand for: thresholds over their whole factors folded in, a scale for each output."""
    scale = scale.detach().expand(weight.shape[1])
    most = 127 // steps
    channel = scale / (scale * (most / scale.max())).ceil().clamp(1, most)
    folded = weight * channel
    step = folded.abs().amax(1, keepdim=True) / 127
    # By a reciprocal and not a quotient, as halves are rounded by the last bit.
    return (folded * step.reciprocal()).round().clamp(-127, 127).double() * step / channel


@pytest.mark.parametrize("steps", [1, 4, 8, 16, 127])
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
@pytest.mark.parametrize("kind", ["atmn", "ternary", "binary"])
def test_spikes_are_not_rounded(kind, threshold, steps):
    neuron = build_neuron(NeuronConfig(kind=kind, time_steps=steps, threshold=threshold), 96)
    with torch.no_grad():
        neuron.a.copy_(torch.linspace(0.01, 3.0, len(neuron.a))[torch.randperm(len(neuron.a))].log())
    x = neuron(steps * neuron.threshold * torch.randn(2, 34, 96)).detach()
    weight, gradient = torch.randn(64, 96), torch.randn(2, 34, 64)
    truth = rounded_weight(weight, neuron.scale, steps)
    found = products(x, weight, gradient, (neuron.scale, steps))
    assert rms_ratio(found[0], x.double() @ truth.t()) < 1e-5
    assert rms_ratio(found[1], exact(x, weight, gradient)[1]) < 0.03
    assert rms_ratio(found[2], exact(x, weight, gradient)[2]) < 0.03


def test_one_huge_input_costs_the_gradients_of_the_rest_little():
    """Rounded as forward, W would leave them few levels: its columns are scaled by the inputs' sizes there."""
    x, weight, gradient = torch.randn(256, 128), torch.randn(64, 128), torch.randn(256, 64)
    x[:, 5] *= 1e4
    assert_near(products(x, weight, gradient)[1:2], exact(x, weight, gradient)[1:2], 0.02)


def test_a_neuron_notes_its_scale_for_the_linear_behind_it():
    neuron = build_neuron(NeuronConfig(time_steps=8), 64)
    nn.init.uniform_(neuron.a, -3, 1)
    current, weight = 3 * torch.randn(12, 64), torch.randn(32, 64)
    spikes = neuron(current)
    with kernels.Int8Products():
        noted = F.linear(spikes, weight)
        plain = F.linear(spikes.clone(), weight)
    assert torch.equal(noted, int8.linear(spikes, weight, (neuron.scale, 8)))
    assert torch.equal(plain, int8.linear(spikes, weight))
    assert rms_ratio(noted, spikes.double() @ rounded_weight(weight, neuron.scale, 8).t()) < 1e-5
    leaky = build_neuron(NeuronConfig(tau=0.5), 64)
    assert getattr(leaky(current), int8.SPIKES, None) is None
    slopes = torch.autograd.grad(noted.sum(), neuron.a)[0]
    assert rms_ratio(slopes, torch.autograd.grad(F.linear(neuron(current), weight).sum(), neuron.a)[0]) < 0.05


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("spiking", [False, True])
def test_what_is_not_finite_shows(bad, spiking):
    scale = torch.full((64,), 0.25)
    x, weight, gradient = torch.randint(-4, 5, (40, 64)) * scale, torch.randn(96, 64), torch.randn(40, 96)

    def run(at: str) -> tuple[Tensor, ...]:
        tensors = {"x": x.clone(), "weight": weight.clone(), "gradient": gradient.clone()}
        tensors[at][37, 33] = bad
        return products(**tensors, spikes=(scale, 4) if spiking else None)

    y, _, dweight = run("x")
    assert not y[37].isfinite().any()
    assert not dweight[:, 33].isfinite().any()
    y, dx, _ = run("weight")
    assert not y[:, 37].isfinite().any()
    assert not dx[:, 33].isfinite().any()
    y, dx, dweight = run("gradient")
    assert y.isfinite().all()
    assert not dx[37].isfinite().any()
    assert not dweight[33].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_shows_beside_zeros(bad):
    x, weight, gradient = torch.zeros(8, 32), torch.zeros(32, 32), torch.zeros(8, 32)
    x[0, 0] = bad
    assert not products(x, weight, gradient)[0][0].isfinite().any()
    assert not products(x, weight, gradient)[2][:, 0].isfinite().any()
    x[0, 0], weight[0, 0] = 0, bad
    assert not products(x, weight, gradient)[0][:, 0].isfinite().any()
    assert not products(x, weight, gradient)[1][:, 0].isfinite().any()
    weight[0, 0], gradient[0, 0] = 0, bad
    assert not products(x, weight, gradient)[1][0].isfinite().any()
    assert not products(x, weight, gradient)[2][0].isfinite().any()


@pytest.mark.parametrize("spikes", [None, (torch.tensor([0.5]), 4)])
def test_zeros_give_zeros(spikes):
    x, weight, gradient = torch.randint(-4, 5, (36, 64)) / 2, torch.randn(32, 64), torch.randn(36, 32)
    nothing = products(0 * x, weight, gradient, spikes)
    assert not nothing[0].any()
    assert not nothing[2].any()
    assert rms_ratio(nothing[1], gradient @ weight) < 0.03
    weight[3:5] = 0
    y, dx, _ = products(x, weight, gradient, spikes)
    assert not y[:, 3:5].any()
    assert rms_ratio(dx, gradient @ weight) < 0.03
    y, dx, dweight = products(x, weight, 0 * gradient, spikes)
    assert y.any()
    assert not dx.any()
    assert not dweight.any()
    x[7], gradient[9], gradient[:, 11] = 0, 0, 0
    y, dx, dweight = products(x, weight, gradient, spikes)
    assert not torch.cat([y[7], dx[9], dweight[11]]).any()
    assert all(one.isfinite().all() for one in (y, dx, dweight))


REFUSED: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "inputs": lambda: (torch.randn(4, 48), torch.randn(32, 48)),
    "outputs": lambda: (torch.randn(4, 32), torch.randn(33, 32)),
    "tokens": lambda: (torch.randn(2, 3, 32), torch.randn(32, 32)),
    "one token": lambda: (torch.randn(32), torch.randn(32, 32)),
    "bf16": lambda: (torch.randn(4, 32).bfloat16(), torch.randn(32, 32).bfloat16()),
    "fp64": lambda: (torch.randn(4, 32).double(), torch.randn(32, 32).double()),
    "no tokens": lambda: (torch.randn(0, 32), torch.randn(32, 32)),
    "no inputs": lambda: (torch.randn(4, 0), torch.randn(32, 0)),
    "no outputs": lambda: (torch.randn(4, 32), torch.randn(0, 32)),
    "strided columns": lambda: (torch.randn(4, 32), torch.randn(32, 64)[:, ::2]),
    "turned": lambda: (torch.randn(4, 32), torch.randn(32, 32).t()),
    "meta": lambda: (torch.randn(4, 32, device="meta"), torch.randn(32, 32, device="meta")),
    "1-D": lambda: (torch.randn(4, 32), torch.randn(32)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_refuses_stays_as_it_is(what):
    x, weight = REFUSED[what]()
    assert not int8.takes(x, weight)
    x.requires_grad_()
    biases = [None] if weight.dim() == 1 else [None, torch.randn(len(weight), dtype=x.dtype, device=x.device)]
    for bias in biases:
        expected = F.linear(x, weight, bias)
        with kernels.Int8Products():
            found = F.linear(x, weight, bias)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        if not found.is_meta:
            assert torch.equal(found, expected)
            assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)))


def test_tensors_must_be_on_one_device_and_of_one_type():
    x, weight = torch.randn(4, 32), torch.randn(32, 32)
    assert int8.takes(x, weight)
    assert not int8.takes(x, weight.double())
    assert not int8.takes(x.bfloat16(), weight)
    # The core would follow its address, which is 0.
    assert not int8.takes(x, torch.randn(32, 32, device="meta"))


def test_sums_that_32_bits_may_not_hold_stay_with_torch():
    weight = torch.randn(32, 32)
    assert int8.takes(torch.empty(2**16, 32), weight)
    assert not int8.takes(torch.empty(2**16 + 4, 32), weight)


def test_shapes_that_do_not_fit_are_refused_by_torch():
    x, weight = torch.randn(4, 64), torch.randn(32, 32)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), kernels.Int8Products():
        F.linear(x, weight)


def test_without_the_core_everything_stays_with_torch(monkeypatch):
    x, weight = torch.randn(4, 32), torch.randn(32, 32)
    expected = F.linear(x, weight)
    monkeypatch.setattr(int8, "core", None)
    with kernels.Int8Products():
        assert torch.equal(F.linear(x, weight), expected)
        assert kernels.int8_head(weight, x) is None


def test_biases_are_added():
    linear, x = nn.Linear(32, 64), torch.randn(3, 4, 32)
    with kernels.Int8Products():
        found = linear(x)
        assert torch.equal(F.linear(input=x, weight=linear.weight, bias=linear.bias), found)
        assert torch.equal(F.linear(x, linear.weight) + linear.bias, found)
    assert torch.equal(found, int8.linear(x, linear.weight) + linear.bias)
    assert not torch.equal(found, linear(x))
    assert torch.equal(torch.autograd.grad(found.sum(), linear.bias)[0], torch.full((64,), 12.0))


def in_int8(x: Tensor, weight: Tensor) -> bool:
    """Whether linears and heads are, just now."""
    found = torch.equal(F.linear(x, weight), int8.linear(x, weight))
    assert found == (kernels.int8_head(weight, x) is not None)
    return found


def test_the_mode_nests_and_ends_with_an_exception():
    x, weight = torch.randn(8, 32), torch.randn(32, 32)
    assert not in_int8(x, weight)
    with kernels.Int8Products():
        with kernels.Int8Products():
            assert in_int8(x, weight)
        assert in_int8(x, weight)
        with pytest.raises(RuntimeError, match="cannot be multiplied"), kernels.Int8Products():
            torch.mm(x, weight[:5])
        assert in_int8(x, weight)
    assert not in_int8(x, weight)
    with pytest.raises(ValueError, match="stop"), kernels.Int8Products():
        raise ValueError("stop")
    assert not in_int8(x, weight)


def test_the_mode_leaves_all_else_alone():
    x, weight = torch.randn(8, 32), torch.randn(32, 32)
    operations: list[Callable[[], Tensor]] = [
        lambda: torch.mm(x, weight),
        lambda: x @ weight.t(),
        lambda: torch.addmm(x, x, weight),
        lambda: F.bilinear(x, x, weight[None].clone()),
        lambda: F.conv1d(x[None], weight[:, :8, None].clone()),
        lambda: torch.einsum("ti,oi->to", x, weight),
        lambda: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    ]
    expected = [operation() for operation in operations]
    with kernels.Int8Products():
        assert equal(tuple(operation() for operation in operations), tuple(expected))


def test_hooks_of_modules_still_run():
    linear, seen = nn.Linear(32, 32, bias=False), []
    linear.register_forward_pre_hook(lambda *_: seen.append("pre"))
    linear.register_forward_hook(lambda _, inputs, y: seen.append(y.detach().clone()))
    linear.register_full_backward_hook(lambda *_: seen.append("back"))
    linear.weight.register_hook(lambda _: seen.append("weight"))
    x = torch.randn(4, 32, requires_grad=True)
    with kernels.Int8Products():
        linear(x).sum().backward()
    pre, y, *rest = seen
    assert pre == "pre"
    assert torch.equal(y, int8.linear(x, linear.weight))
    assert sorted(rest) == ["back", "weight"]


def test_autocast_goes_first():
    """It says in which dtype results are wanted, and the heads' buffers are of that one."""
    x, weight = torch.randn(8, 32), torch.randn(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, weight)
        with kernels.Int8Products():
            assert torch.equal(F.linear(x, weight), expected)
            assert kernels.int8_head(weight, x) is None


def test_decay_logits_stay_fp32():
    mixer = DiscreteMamba2(mar_config(**WIDE, num_heads=32))
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(2, 8, 32)
    expected = mixer._project(hidden)
    with kernels.Int8Products():
        found = mixer._project(hidden)
    assert not torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_head_is_the_product_of_its_tensors():
    hidden, weight, out = torch.randn(70, 64) * spread(64, 2), torch.randn(160, 64), torch.empty(70, 160)
    assert kernels.int8_head(weight, hidden[:68]) is None
    with kernels.Int8Products():
        assert kernels.int8_head(weight, hidden) is None  # 70 are no multiple of four
        head = kernels.int8_head(weight, hidden[:68])
    assert head is not None
    for start, stop in ((0, 33), (33, 34), (34, 68)):
        head.logits(hidden[start:stop], out[start:stop])
    assert torch.equal(out[:68], int8.linear(hidden[:68], weight))


def test_a_head_reads_strides_as_they_are():
    hidden, weight = torch.randn(68, 64) * spread(64, 2), torch.randn(160, 64)
    outs = torch.empty(2, 68, 160)
    for states, out in zip((hidden, hidden.t().contiguous().t()), outs, strict=True):
        int8.Head(weight, states).logits(states, out)
    assert torch.equal(*outs)


def kl_and_gradients(tensors: list[Tensor], **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head, *teacher = (t.clone() for t in tensors)
    loss = chunked_bidirectional_kl(hidden.requires_grad_(), head.requires_grad_(), *teacher, 0.3, 0.7, **how)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def test_kl_of_int8_heads_is_near():
    tensors = [torch.randn(68, 64), torch.randn(160, 64) / 4, torch.randn(68, 32), torch.randn(160, 32) / 4]
    expected = kl_and_gradients(tensors, chunk=24)
    with kernels.Int8Products():
        found = kl_and_gradients(tensors, chunk=24)
        assert equal(found, kl_and_gradients(tensors, chunk=24))
    assert not torch.equal(found[0], expected[0])
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.02)
    assert_near(found[1:], expected[1:])


@pytest.mark.parametrize("why", ["vocabulary", "tokens"])
def test_kl_of_heads_that_stay_is_bit_for_bit_what_it_was(why):
    words = 161 if why == "vocabulary" else 160
    tensors = [torch.randn(68, 64), torch.randn(words, 64) / 4, torch.randn(68, 64), torch.randn(words, 64) / 4]
    kept = None if why == "vocabulary" else torch.arange(68) != 3
    expected = kl_and_gradients(tensors, weight=kept)
    with kernels.Int8Products():
        assert equal(kl_and_gradients(tensors, weight=kept), expected)


@pytest.mark.usefixtures("poisoned_memory")
def test_no_uninitialised_memory_is_read():
    x, weight, gradient = torch.randn(300, 96), torch.randn(64, 96), torch.randn(300, 64)
    spikes, words = (torch.full((96,), 0.5), 4), torch.randn(128, 96)

    def run() -> tuple[Tensor, ...]:
        out = torch.empty(300, 128)
        int8.Head(words, x).logits(x, out)
        codes = (4 * x).round().clamp(-4, 4) / 2
        return *products(x, weight, gradient), *products(codes, weight, gradient, spikes), out

    poisoned = run()
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert all(one.isfinite().all() for one in poisoned)
    assert equal(poisoned, run())


def test_threads_change_nothing():
    x, weight, gradient = torch.randn(300, 160), torch.randn(96, 160), torch.randn(300, 96)
    single = products(x, weight, gradient)
    try:
        torch.set_num_threads(2)
        assert equal(products(x, weight, gradient), single)
    finally:
        torch.set_num_threads(1)


def test_nothing_given_is_changed_and_runs_are_alike():
    given = torch.randn(12, 64), torch.randn(32, 64), torch.randn(12, 32)
    before = [t.clone() for t in given]
    first = products(*given)
    assert equal(first, products(*given))
    assert equal(given, tuple(before))


def logits(model: nn.Module, precision: str) -> Tensor:
    with torch.no_grad(), forward_precision(precision, torch.device("cpu")):
        return model(**packed_rows()).logits


def test_a_dense_student_in_int8_says_nearly_the_same():
    model = mar_model(**WIDE)
    expected, found = logits(model, "fp32"), logits(model, "int8")
    shuffled = expected.flatten(0, 1)[torch.randperm(48)].view(expected.shape)
    divergence = forward_kl(expected, found).mean()
    assert 0 < divergence < 0.01 * forward_kl(expected, shuffled).mean()


def test_every_linear_of_a_spiking_student_takes_codes(monkeypatch):
    model = mar_model(**WIDE, neurons=site_neurons(NeuronConfig(time_steps=4)))
    linear, noted = int8.linear, []

    def watched(x: Tensor, weight: Tensor, spikes: Spikes | None = None) -> Tensor:
        noted.append(spikes is not None)
        if spikes is not None:
            codes = x / spikes[0]
            torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
            assert codes.abs().max() <= spikes[1] + 1e-4
        return linear(x, weight, spikes)

    monkeypatch.setattr(int8, "linear", watched)
    assert logits(model, "int8").isfinite().all()
    # in_proj but for its decay rows, out_proj, gate, up and down of each layer, then the head, which has no neuron
    assert noted == [True] * 10 + [False]


class OneBatch:
    """The same two packed rows over and over."""

    length = 24

    def shard(self, rank: int, world: int) -> None:
        assert (rank, world) == (0, 1)

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        yield {name: rows[:batch_size] for name, rows in packed_rows().items()}

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {}


def distill() -> Objective:
    teacher = llama_model(intermediate_size=64)
    return Distill(convert_llama(teacher), teacher)


def spike() -> Objective:
    dense = convert_llama(llama_model(intermediate_size=64))
    return Spike(insert_neurons(dense, site_neurons(NeuronConfig(time_steps=4)), [packed_rows(seed=3)]), dense)


@pytest.mark.parametrize("stage", [distill, spike])
def test_training_in_int8_learns_as_fp32_does(tmp_path: Path, monkeypatch, stage):
    linear, products_made = int8.linear, []
    monkeypatch.setattr(int8, "linear", lambda *given: products_made.append(1) or linear(*given))
    losses = {}
    for precision in ("fp32", "int8"):
        settings = TrainConfig(
            tokens=20 * 48, batch_size=2, lr=1e-2, warmup_steps=2, precision=precision, checkpoint_minutes=5
        )
        done = train(stage(), OneBatch(), settings, tmp_path / precision, progress=False)
        assert done["precision"] == precision
        assert done["steps"] == 20
        assert bool(products_made) == (precision == "int8")
        losses[precision] = [line["loss"] for line in log_of(tmp_path / precision)]
    wide, narrow = losses["fp32"], losses["int8"]
    assert narrow[0] == pytest.approx(wide[0], rel=0.05)
    assert narrow[-1] < 0.8 * narrow[0]
    assert wide[0] - wide[-1] == pytest.approx(narrow[0] - narrow[-1], rel=0.1)


@pytest.mark.parametrize("stage", [distill, spike])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused_by_name(tmp_path: Path, stage, reentrant):
    objective: Any = stage()
    objective.student.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    config = TrainConfig(tokens=48, batch_size=2, precision="int8")
    with pytest.raises(ValueError, match=r"has gradient checkpointing on, and int8 .*; call its gradient_check"):
        train(objective, OneBatch(), config, tmp_path, progress=False)
