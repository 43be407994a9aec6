"""RMSNorm and gated unit: torch's values and gradients, in fewer saved bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from mar import kernels


def torch_norm(x, weight):
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def torch_product(gate, up):
    return F.silu(gate) * up


OPS = {
    "rms_norm": (lambda x, weight: kernels.rms_norm(x, weight, 1e-5), torch_norm, (7,)),
    "silu_product": (kernels.silu_product, torch_product, (2, 5, 7)),
}


def leaves(shape, dtype):
    tensors = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_torchs(name, dtype):
    ours, theirs, shape = OPS[name]
    given = leaves(shape, dtype)
    output, wanted = ours(*given), theirs(*given)
    upstream = torch.randn_like(wanted)
    assert output.dtype == wanted.dtype
    torch.testing.assert_close(output, wanted)
    gradients = torch.autograd.grad(output, given, upstream), torch.autograd.grad(wanted, given, upstream)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", OPS)
def test_gradients_against_finite_differences(name):
    ours, _, shape = OPS[name]
    assert torch.autograd.gradcheck(ours, leaves(shape, torch.float64))


def test_a_backward_under_autocast_stays_in_fp32():
    given = leaves((7,), torch.float32)
    upstream = torch.randn(2, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (torch.autograd.grad(op(*given), given, upstream) for op in (OPS["rms_norm"][0], torch_norm))
    torch.testing.assert_close(found, wanted)


def test_a_frozen_weight_or_input_gets_no_gradient():
    x, weight = leaves((7,), torch.float64)
    for frozen, trained in ((weight, x), (x, weight)):
        frozen.requires_grad_(False)
        torch_gradient = torch.autograd.grad(torch_norm(x, weight).sum(), trained)
        torch.testing.assert_close(
            torch.autograd.grad(kernels.rms_norm(x, weight, 1e-5).sum(), trained), torch_gradient
        )
        frozen.requires_grad_(True)


@pytest.mark.parametrize("name", OPS)
def test_nothing_of_the_outputs_size_is_saved_but_the_inputs(name):
    ours, theirs, shape = OPS[name]
    given = leaves(shape, torch.float32)

    def saved(op):
        sizes = {}
        with saved_tensors_hooks(
            lambda tensor: sizes.setdefault(tensor.data_ptr(), tensor.nbytes) and tensor, lambda t: t
        ):
            op(*given)
        return sum(size for pointer, size in sizes.items() if pointer not in {t.data_ptr() for t in given})

    assert saved(ours) <= 10 * 4  # one scale a token, at most
    assert saved(theirs) >= 70 * 4
