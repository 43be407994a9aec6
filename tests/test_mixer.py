"""The mixer against a plain statement of its equations, in pieces, padded, packed and in 16 bits."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mar.config import MIXER_PRESETS, NeuronConfig, site_neurons
from mar.mixer import DiscreteMamba2, MixerState
from tiny_models import documents, mar_config, packed_rows, rms_ratio

CHOICES = [
    {"input_gain": gain, "bc_norm": norm, "decay_bias": bias}
    for gain, norm, bias in product(("none", "one_minus_decay"), ("none", "l2"), (False, True))
]
every_choice = pytest.mark.parametrize("choices", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
both_presets = pytest.mark.parametrize("choices", MIXER_PRESETS.values(), ids=MIXER_PRESETS)


def mixer_of(**changes: Any) -> DiscreteMamba2:
    """In fp64, all parameters random: 4 heads of 8, states of 6, hidden 32, chunks of 8."""
    mixer = DiscreteMamba2(mar_config(**changes))
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer.double()


def plain(mixer: DiscreteMamba2, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output and last state for one sequence (l, d), token by token as section 5 of the method says it."""
    config = mixer.config
    heads, width, size = config.num_heads, config.head_dim, config.state_size
    projected = hidden @ mixer.in_proj.weight.T
    xbc, z, logits = projected.split([config.conv_size, config.inner_size, heads], dim=1)
    if mixer.decay_bias is not None:
        logits = logits + mixer.decay_bias
    state, outputs = torch.zeros(heads, width, size, dtype=hidden.dtype), []
    for t in range(len(hidden)):
        window = [xbc[t - j] if t >= j else torch.zeros_like(xbc[0]) for j in range(config.conv_kernel)]
        mixed = mixer.conv_bias + sum(mixer.conv_weight[:, -1 - j] * one for j, one in enumerate(window))
        x, b, c = mixed.split([config.inner_size, heads * size, heads * size])
        x, b, c = x.view(heads, width), b.view(heads, size), c.view(heads, size)
        if config.bc_norm == "l2":
            b = b / (b.square().sum(1, keepdim=True) + 1e-5).sqrt()
            c = c / (c.square().sum(1, keepdim=True) + 1e-5).sqrt() * size**0.5
        decay = torch.exp(-torch.log(1 + logits[t].exp()))
        gain = 1 - decay if config.input_gain == "one_minus_decay" else torch.ones(heads, dtype=hidden.dtype)
        state = decay[:, None, None] * state + torch.einsum("h,hp,hn->hpn", gain, x, b)
        y = torch.einsum("hpn,hn->hp", state, c) + mixer.D[:, None] * x
        gate = z[t] + mixer.z_bias
        outputs.append(mixer.out_proj.weight @ (y.flatten() * gate * torch.sigmoid(gate)))
    return torch.stack(outputs), state


def hidden_of(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 32, dtype=torch.float64).to(dtype)


@every_choice
def test_mixer_is_its_equations(choices):
    mixer, hidden = mixer_of(**choices), hidden_of(2, 21)
    output, state = mixer(hidden)
    for row in range(2):
        expected, last = plain(mixer, hidden[row])
        torch.testing.assert_close(output[row], expected)
        torch.testing.assert_close(state.ssm[row], last)


@pytest.mark.parametrize("taps", [1, 2])
def test_other_convolution_widths(taps):
    mixer, hidden = mixer_of(conv_kernel=taps), hidden_of(1, 9)
    torch.testing.assert_close(mixer(hidden)[0][0], plain(mixer, hidden[0])[0])
    assert mixer(hidden)[1].conv.shape == (1, taps - 1, mixer.config.conv_size)


@both_presets
@torch.no_grad()
def test_one_token_at_a_time_is_the_whole_sequence(choices):
    mixer, hidden = mixer_of(**choices), hidden_of(2, 21)
    whole, last = mixer(hidden)
    state, outputs = None, []
    for t in range(21):
        output, state = mixer(hidden[:, t : t + 1], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 20), max_size=5, unique=True), st.booleans())
def test_any_split_gives_the_same_outputs_and_state(cuts, with_gradient):
    """With and without gradients, as single tokens take another path without."""
    torch.manual_seed(0)
    mixer, hidden = mixer_of(), hidden_of(2, 21)
    whole, last = mixer(hidden)
    state, outputs = None, []
    with torch.set_grad_enabled(with_gradient):
        for start, stop in pairwise([0, *sorted(cuts), 21]):
            output, state = mixer(hidden[:, start:stop], state)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@every_choice
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_matrix_times_x_is_what_the_scan_gives(choices, packed):
    mixer, hidden = mixer_of(**choices), hidden_of(2, 24)
    ids = packed_rows()["document_ids"] if packed else None
    matrix = mixer.matrix(hidden, ids)
    x, _, _, _, z, _ = mixer.ssm_inputs(hidden, None, None, ids)
    y = torch.einsum("bhts,bshp->bthp", matrix, x).flatten(2)
    torch.testing.assert_close(mixer.out_proj(y * F.silu(z + mixer.z_bias)), mixer(hidden, document_ids=ids)[0])
    assert not matrix.triu(1).any()


def test_l2_gives_b_unit_length_and_c_the_square_root_of_the_state_size():
    _, _, b, c, _, _ = mixer_of(bc_norm="l2").ssm_inputs(hidden_of(2, 5), None, None, None)
    ones = torch.ones(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(b.norm(dim=-1), ones, rtol=1e-3, atol=0)
    torch.testing.assert_close(c.norm(dim=-1), ones * 6**0.5, rtol=1e-3, atol=0)


def test_zero_vectors_stay_zero_and_have_bounded_gradients():
    """The direction of B = 0 is undefined: a gradient of 1 / length would throw the weights anywhere."""
    mixer = mixer_of(bc_norm="l2")
    rows = slice(32, 32 + 24)  # of B
    torch.nn.init.zeros_(mixer.in_proj.weight[rows])
    torch.nn.init.zeros_(mixer.conv_bias[rows])
    output, state = mixer(hidden_of(2, 9))
    assert not state.ssm.any()
    output.sum().backward()
    assert mixer.in_proj.weight.grad is not None
    gradient = mixer.in_proj.weight.grad[rows]
    assert gradient.any()
    assert gradient.abs().max() < 1e5


@both_presets
@pytest.mark.parametrize("rows", [1, 2])
def test_left_padding_leaves_no_trace(choices, rows):
    """Whatever stands at the padding; and no gradient reaches it."""
    mixer, hidden = mixer_of(**choices), hidden_of(rows, 24)
    pads = [9, 2][:rows]
    mask = torch.stack([torch.arange(24) >= pad for pad in pads])
    hidden[~mask] *= 1000
    hidden.requires_grad_()
    output, state = mixer(hidden, None, mask)
    for row, pad in enumerate(pads):
        expected, alone = mixer(hidden[row : row + 1, pad:])
        torch.testing.assert_close(output[row, pad:], expected[0])
        torch.testing.assert_close(state.ssm[row : row + 1], alone.ssm)
        torch.testing.assert_close(state.conv[row : row + 1], alone.conv)
    output[mask].square().sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[~mask].any()
    assert hidden.grad[mask].any()


def test_a_row_of_padding_only_has_an_empty_state():
    mixer = mixer_of()
    _, state = mixer(hidden_of(2, 9), None, torch.tensor([[True] * 9, [False] * 9]))
    assert not state.ssm[1].any()
    assert not state.conv[1].any()
    assert state.ssm[0].any()


@both_presets
def test_packed_documents_are_separate_sequences(choices):
    """In outputs, gradients and the state after the row, which is its last document's, however short that is."""
    mixer, ids = mixer_of(**choices), packed_rows(((5, 11, 7, 1), (14, 1, 7, 2)))["document_ids"]
    hidden, weight = hidden_of(2, 24).requires_grad_(), hidden_of(2, 24)
    output, state = mixer(hidden, document_ids=ids)
    (gradient,) = torch.autograd.grad((output * weight).sum(), hidden)
    for row, place in documents(ids):
        alone = hidden[row : row + 1, place].detach().requires_grad_()
        expected, last = mixer(alone)
        torch.testing.assert_close(output[row, place], expected[0])
        (own,) = torch.autograd.grad((expected * weight[row, place]).sum(), alone)
        torch.testing.assert_close(gradient[row, place], own[0])
        if place.stop == 24:
            torch.testing.assert_close(state.ssm[row], last.ssm[0])
            torch.testing.assert_close(state.conv[row], last.conv[0])


@torch.no_grad()
def test_a_sequence_goes_on_after_a_packed_row():
    mixer, hidden, ids = mixer_of(), hidden_of(1, 12), torch.tensor([[0] * 7 + [1]])
    _, state = mixer(hidden[:, :8], document_ids=ids)
    going_on, _ = mixer(hidden[:, 8:], state)
    torch.testing.assert_close(going_on, mixer(hidden[:, 7:])[0][:, 1:])


# 16 bits


@both_presets
def test_decay_is_fp32_under_autocast(choices):
    """Exactly the decay that fp32 gives for the same spikes; x, B and C are in 16 bits."""
    neurons = site_neurons(NeuronConfig(time_steps=4))
    mixer, hidden = mixer_of(**choices, neurons=neurons).float(), hidden_of(2, 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x, log_decay, b, c, _, _ = mixer.ssm_inputs(hidden, None, None, None)
        output, state = mixer(hidden)
    assert {part.dtype for part in (x, b, c, output)} == {torch.bfloat16}
    assert log_decay.dtype == torch.float32
    assert state.ssm.dtype == torch.float32
    logits = mixer.in_neuron(hidden).double() @ mixer.in_proj.weight[-4:].double().T
    logits = logits + (0 if mixer.decay_bias is None else mixer.decay_bias.double())
    assert rms_ratio(log_decay, -F.softplus(logits)) < 1e-6


def test_decay_is_fp32_in_a_model_of_16_bits():
    mixer, hidden = mixer_of().bfloat16(), hidden_of(2, 9, torch.bfloat16)
    _, log_decay, _, _, _, _ = mixer.ssm_inputs(hidden, None, None, None)
    assert mixer.decay_bias is not None
    logits = hidden.double() @ mixer.in_proj.weight[-4:].double().T + mixer.decay_bias.double()
    assert log_decay.dtype == torch.float32
    assert rms_ratio(log_decay, -F.softplus(logits)) < 1e-6
    assert mixer(hidden)[1].ssm.dtype == torch.float32


@both_presets
def test_autocast_stays_near_fp32(choices):
    mixer, hidden = mixer_of(**choices).float(), hidden_of(2, 50, torch.float32).requires_grad_()
    weight = hidden_of(2, 50, torch.float32)
    exact, _ = mixer(hidden)
    parameters = [hidden, *mixer.parameters()]
    expected = torch.autograd.grad((exact * weight).sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = mixer(hidden)
    assert rms_ratio(rough, exact) < 2e-2
    for found, truth in zip(torch.autograd.grad((rough.float() * weight).sum(), parameters), expected, strict=True):
        assert rms_ratio(found, truth) < 3e-2


@torch.no_grad()
def test_steps_and_whole_agree_under_autocast():
    mixer, hidden = mixer_of().float(), hidden_of(2, 21, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        whole, last = mixer(hidden)
        state, outputs = None, []
        for t in range(21):
            output, state = mixer(hidden[:, t : t + 1], state)
            outputs.append(output)
    assert rms_ratio(torch.cat(outputs, 1), whole) < 2e-2
    assert isinstance(state, MixerState)
    assert rms_ratio(state.ssm, last.ssm) < 2e-2


# Spikes


def test_neurons_stand_before_both_projections():
    """With neurons the mixer is the dense mixer fed with spikes, whose own output passes the second neuron."""
    neurons = site_neurons(NeuronConfig(time_steps=6), sites=("in_proj", "out_proj"))
    mixer, hidden = mixer_of(neurons=neurons), hidden_of(2, 9)
    dense = DiscreteMamba2(mar_config()).double()
    dense.load_state_dict({name: p for name, p in mixer.state_dict().items() if not name.endswith(".a")})
    gated = []
    dense.out_proj.register_forward_pre_hook(lambda _, args: gated.append(args[0]))
    spikes = mixer.in_neuron(hidden)
    dense(spikes)
    assert not torch.equal(spikes, hidden)
    torch.testing.assert_close(mixer(hidden)[0], mixer.out_proj(mixer.out_neuron(gated[0])))
