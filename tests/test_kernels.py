"""Scan and convolution: every backend against the recurrence in fp64, in outputs, final state and all gradients."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mar import kernels
from mar.kernels import reference
from tiny_models import documents, rms_ratio

NAMES = ("x", "log_decay", "b", "c", "state")
LENGTHS = (1, 2, 15, 16, 17, 50)
IDS = torch.tensor([[0] * 5 + [1] * 30 + [2] * 2 + [3] * 13, [0] * 16 + [1] * 1 + [2] * 31 + [3] * 2])
"""Documents that begin inside a chunk of 16, on its edge, and twice in it; some shorter than the convolution."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_inputs(
    length: int, decay: tuple[float, float] = (0.0, 1.0), batch: int = 2, sizes: tuple[int, int, int] = (3, 5, 7)
) -> tuple[Tensor, ...]:
    """x, log_decay (drawn evenly from -decay), b, c, state in fp64; sizes are heads, head width and state size."""
    heads, width, size = sizes
    log_decay = -(decay[0] + (decay[1] - decay[0]) * torch.rand(batch, length, heads, dtype=torch.float64))
    b, c = normal(batch, length, heads, size), normal(batch, length, heads, size)
    return normal(batch, length, heads, width), log_decay, b, c, normal(batch, heads, width, size)


def conv_inputs(length: int, taps: int = 4, batch: int = 2) -> tuple[Tensor, ...]:
    """x, weight, bias, past in fp64, 6 channels."""
    return normal(batch, length, 6), normal(6, taps), normal(6), normal(batch, taps - 1, 6)


def in_dtype(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Scan inputs as the mixer hands them over: log decay and state never below fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(t.to(wide if name in ("log_decay", "state") else dtype) for name, t in zip(NAMES, inputs, strict=True))


def gradients(function: Callable, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of all inputs of sum_i <weights_i, outputs_i>."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = torch.stack([(o.double() * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()
    return list(torch.autograd.grad(loss, leaves))


# Scan


def test_the_recurrence_by_hand():
    """Two tokens, one head, P = N = 1: S = 2·5 then exp(-1)·10 + 3·7, read out with C = 1 and 0.5."""
    x, b, c = (torch.tensor(pair, dtype=torch.float64).view(1, 2, 1, 1) for pair in ((2, 3), (5, 7), (1, 0.5)))
    log_decay = torch.tensor([-0.3, -1.0], dtype=torch.float64).view(1, 2, 1)
    y, state = reference.scan_recurrent(x, log_decay, b, c)
    last = 10 * torch.e**-1 + 21
    torch.testing.assert_close(y.flatten(), torch.tensor([10, last / 2], dtype=torch.float64))
    torch.testing.assert_close(state.flatten(), torch.tensor([last], dtype=torch.float64))


@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_scan_is_the_recurrence(length, chunk, ids):
    inputs = scan_inputs(length)
    ids = None if ids is None else ids[:, :length]
    expected = reference.scan_recurrent(*inputs, document_ids=ids)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        y, state = kernels.scan(*in_dtype(inputs, dtype), document_ids=ids, chunk=chunk)
        assert y.dtype == dtype
        assert state.dtype == torch.promote_types(dtype, torch.float32)
        assert rms_ratio(y, expected[0]) < limit
        assert rms_ratio(state, expected[1]) < limit


@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
def test_the_matrix_is_the_scan(ids):
    x, log_decay, b, c, _ = scan_inputs(50)
    matrix = reference.scan_matrix(log_decay, b, c, ids)
    y, _ = reference.scan_recurrent(x, log_decay, b, c, document_ids=ids)
    assert rms_ratio(torch.einsum("bhts,bshp->bthp", matrix, x), y) < 1e-13
    assert (matrix.triu(1) == 0).all()


@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_gradients(length, ids):
    inputs = scan_inputs(length)
    ids = None if ids is None else ids[:, :length]
    weights = normal(*inputs[0].shape), normal(*inputs[4].shape)
    expected = gradients(lambda *i: reference.scan_recurrent(*i, document_ids=ids), inputs, weights)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = gradients(lambda *i: kernels.scan(*i, document_ids=ids, chunk=16), in_dtype(inputs, dtype), weights)
        for name, gradient, truth in zip(NAMES, found, expected, strict=True):
            if truth.any():
                assert rms_ratio(gradient, truth) < limit, name
            else:  # a state that a document boundary cuts off at once
                assert not gradient.any(), name


def test_scan_gradients_against_finite_differences():
    """So that nothing rests on the recurrence's own autograd alone."""
    inputs = [t.requires_grad_() for t in scan_inputs(7, batch=1, sizes=(1, 2, 2))]
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *i: kernels.scan(*i, document_ids=ids, chunk=3), inputs)


def test_scan_without_a_state_starts_from_zero():
    inputs = scan_inputs(20)
    weights = normal(*inputs[0].shape), normal(*inputs[4].shape)
    zero = torch.zeros_like(inputs[4])
    for with_none, with_zero in zip(
        gradients(lambda *i: kernels.scan(*i, chunk=8), inputs[:4], weights),
        gradients(lambda *i: kernels.scan(*i, zero, chunk=8), inputs[:4], weights),
        strict=True,
    ):
        assert torch.equal(with_none, with_zero)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 37), max_size=6), st.integers(1, 20))
def test_scan_in_pieces_is_the_scan_in_one_go(cuts, chunk):
    """Also with empty pieces, where the state passes through."""
    torch.manual_seed(len(cuts))
    *inputs, state = scan_inputs(37)
    whole, last = kernels.scan(*inputs, state, chunk=chunk)
    edges = [0, *sorted(cuts), 37]
    pieces = []
    for start, stop in pairwise(edges):
        y, state = kernels.scan(*(t[:, start:stop] for t in inputs), state, chunk=chunk)
        pieces.append(y)
    assert rms_ratio(torch.cat(pieces, 1), whole) < 1e-13
    assert rms_ratio(state, last) < 1e-13


def test_one_step_is_the_scan_of_one_token():
    inputs = in_dtype(scan_inputs(20), torch.float32)
    state, steps = inputs[4], []
    for t in range(20):
        y, state = kernels.scan_step(*(tensor[:, t] for tensor in inputs[:4]), state)
        steps.append(y)
    expected, last = kernels.scan(*inputs, chunk=16)
    assert rms_ratio(torch.stack(steps, 1), expected) < 1e-6
    assert rms_ratio(state, last) < 1e-6


def test_tokens_that_are_masked_out_leave_no_trace():
    """What the mixer makes of padding, x = 0 and decay 1, is as if it were not there."""
    inputs = scan_inputs(20)
    padded = [F.pad(t, (0,) * (2 * t.dim() - 4) + (9, 0)) for t in inputs[:2]]
    padded += [torch.cat([normal(2, 9, 3, 7), t], 1) for t in inputs[2:4]]
    y, state = kernels.scan(*padded, inputs[4], chunk=8)
    expected, last = kernels.scan(*inputs, chunk=8)
    assert rms_ratio(y[:, 9:], expected) < 1e-13
    assert rms_ratio(state, last) < 1e-13


def test_packed_documents_are_separate_scans():
    """Outputs, last states and all gradients; the given state belongs to each row's first document."""
    inputs = scan_inputs(50)
    weights = normal(*inputs[0].shape), normal(*inputs[4].shape)
    y, last = kernels.scan(*inputs, document_ids=IDS, chunk=16)
    found = gradients(lambda *i: kernels.scan(*i, document_ids=IDS, chunk=16), inputs, weights)
    for row, place in documents(IDS):
        own = tuple(t[row : row + 1, place] for t in inputs[:4])
        state = inputs[4][row : row + 1] if place.start == 0 else torch.zeros(1, 3, 5, 7, dtype=torch.float64)
        expected, after = reference.scan_recurrent(*own, state)
        assert rms_ratio(y[row : row + 1, place], expected) < 1e-13
        ends = place.stop == 50
        if ends:
            assert rms_ratio(last[row : row + 1], after) < 1e-13
        own_weights = weights[0][row : row + 1, place], weights[1][row : row + 1] * ends
        apart = gradients(reference.scan_recurrent, (*own, state), own_weights)
        for gradient, truth in zip(found[:4], apart[:4], strict=True):
            torch.testing.assert_close(gradient[row : row + 1, place], truth, rtol=1e-10, atol=1e-12)
        if place.start == 0:
            assert rms_ratio(found[4][row : row + 1], apart[4]) < 1e-12


def test_an_id_that_comes_back_is_another_document():
    comes_back = torch.tensor([[0] * 10 + [1] * 2 + [0] * 8, [3] * 4 + [1] * 4 + [3] * 12])
    numbered = torch.tensor([[0] * 10 + [1] * 2 + [2] * 8, [0] * 4 + [1] * 4 + [2] * 12])
    assert torch.equal(reference.segments(comes_back), numbered)
    inputs, conv = scan_inputs(20), conv_inputs(20)
    for scan in (lambda ids: kernels.scan(*inputs, document_ids=ids, chunk=16)[0],
                 lambda ids: reference.scan_recurrent(*inputs, document_ids=ids)[0],
                 lambda ids: reference.scan_matrix(*inputs[1:4], ids),
                 lambda ids: kernels.causal_conv(*conv, ids),
                 lambda ids: reference.causal_conv(*conv, ids)):  # fmt: skip
        assert torch.equal(scan(comes_back), scan(numbered))


@pytest.mark.parametrize(
    ("decay", "limit"),
    [((1e-6, 1e-3), 1e-5), ((0.0, 0.0), 1e-5), ((50.0, 50.0), 1e-6), ((0.0, 5.0), 1e-5)],
    ids=["near 1", "exactly 1", "strong", "mixed"],
)
def test_thousands_of_steps(decay, limit):
    inputs = scan_inputs(4096, decay, batch=1, sizes=(1, 3, 4))
    y, last = reference.scan_recurrent(*inputs)
    weights = normal(*y.shape), normal(*last.shape)
    found, state = kernels.scan(*in_dtype(inputs, torch.float32))
    assert rms_ratio(found, y) < limit
    assert rms_ratio(state, last) < limit
    expected = gradients(kernels.scan, inputs, weights)
    for name, gradient, truth in zip(
        NAMES, gradients(kernels.scan, in_dtype(inputs, torch.float32), weights), expected, strict=True
    ):
        assert gradient.isfinite().all(), name
        # Where decay is strong, the gradient of its logarithm is nothing but the rounding of sums that cancel.
        negligible = name == "log_decay" and gradient.abs().max() < 1e-9 and truth.abs().max() < 1e-9
        assert negligible or rms_ratio(gradient, truth) < 10 * limit, name


def test_strong_and_weak_decay_side_by_side():
    """A chunk's running sum of logarithms is large then, and differences of its fp32 values lose digits."""
    inputs = list(scan_inputs(200, (0.0, 1e-3)))
    inputs[1] = torch.where(torch.rand(2, 200, 3) < 0.3, -50.0, inputs[1])
    y, last = reference.scan_recurrent(*inputs)
    found, state = kernels.scan(*in_dtype(tuple(inputs), torch.float32))
    assert rms_ratio(found, y) < 5e-5
    assert rms_ratio(state, last) < 5e-5


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
def test_scan_reads_no_uninitialised_memory(ids):
    inputs = scan_inputs(50)
    weights = normal(*inputs[0].shape), normal(*inputs[4].shape)
    run = lambda *i: kernels.scan(*i, document_ids=ids, chunk=16)  # noqa: E731
    results = [*run(*inputs), *gradients(run, inputs, weights)]
    torch.utils.deterministic.fill_uninitialized_memory = False
    for poisoned, clean in zip(results, [*run(*inputs), *gradients(run, inputs, weights)], strict=True):
        assert torch.equal(poisoned, clean)


def test_empty_sequence_passes_the_state_on():
    inputs = scan_inputs(0)
    y, state = kernels.scan(*inputs, document_ids=torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (2, 0, 3, 5)
    assert torch.equal(state, inputs[4])
    assert not kernels.scan(*inputs[:4])[1].any()
    weights = normal(2, 0, 3, 5), normal(2, 3, 5, 7)
    leaves = [t.requires_grad_() for t in inputs]
    (kernels.scan(*leaves)[1] * weights[1]).sum().backward()
    assert torch.equal(leaves[4].grad, weights[1])


# Convolution


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 20])
def test_conv_is_torchs_conv(length, taps):
    x, weight, bias, past = conv_inputs(length, taps)
    expected = F.conv1d(torch.cat([past, x], 1).transpose(1, 2), weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(reference.causal_conv(x, weight, bias, past), expected)
    torch.testing.assert_close(kernels.causal_conv(x, weight, bias, past), expected)
    none = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(kernels.causal_conv(x, weight, bias), none)


@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_conv_and_its_gradients_are_the_reference(length, ids):
    inputs = conv_inputs(length)
    ids = None if ids is None else ids[:, :length]
    weights = (normal(*inputs[0].shape),)
    y = reference.causal_conv(*inputs, ids)
    expected = gradients(lambda *i: reference.causal_conv(*i, ids), inputs, weights)
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        # as under autocast: activations in 16 bits, parameters in fp32
        wide = torch.promote_types(dtype, torch.float32)
        cast = tuple(t.to(dtype if i in (0, 3) else wide) for i, t in enumerate(inputs))
        found = kernels.causal_conv(*cast, ids)
        assert found.dtype == dtype
        assert rms_ratio(found, y) < limit
        for gradient, truth in zip(
            gradients(lambda *i: kernels.causal_conv(*i, ids), cast, weights), expected, strict=True
        ):
            assert rms_ratio(gradient, truth) < limit


def test_conv_gradients_against_finite_differences():
    inputs = [t.requires_grad_() for t in conv_inputs(7)]
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda *i: kernels.causal_conv(*i, ids), inputs)


def test_conv_of_packed_documents_is_separate_convs():
    x, weight, bias, past = conv_inputs(50)
    y = kernels.causal_conv(x, weight, bias, past, IDS)
    for row, place in documents(IDS):
        before = past[row : row + 1] if place.start == 0 else None
        expected = reference.causal_conv(x[row : row + 1, place], weight, bias, before)
        torch.testing.assert_close(y[row : row + 1, place], expected)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 20), max_size=6))
def test_conv_in_pieces_is_the_conv_in_one_go(cuts):
    torch.manual_seed(len(cuts))
    x, weight, bias, past = conv_inputs(20)
    whole = kernels.causal_conv(x, weight, bias, past)
    edges = [0, *sorted(cuts), 20]
    seen = torch.cat([past, x], 1)
    pieces = [
        kernels.causal_conv(x[:, start:stop], weight, bias, seen[:, start : start + 3])
        for start, stop in pairwise(edges)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.usefixtures("poisoned_memory")
def test_conv_reads_no_uninitialised_memory():
    inputs, weights = conv_inputs(50), (normal(2, 50, 6),)
    run = lambda *i: kernels.causal_conv(*i, IDS)  # noqa: E731
    results = [run(*inputs), *gradients(run, inputs, weights)]
    torch.utils.deterministic.fill_uninitialized_memory = False
    for poisoned, clean in zip(results, [run(*inputs), *gradients(run, inputs, weights)], strict=True):
        assert torch.equal(poisoned, clean)


def test_every_op_names_its_backend():
    ops = {"scan", "scan_step", "causal_conv", "mixer", "staircase", "mean_spikes", "int8"}
    assert set(kernels.backends()) == ops
    assert all(": " in choice for choice in kernels.backends().values())
