"""RMSNorm and the gated unit of an FFN, saving for backward what they are given and at most one number a token.

Does: recompute what torch would keep, the normalised values and silu(gate). Does not: choose dtypes, or have second
derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*batch d"]:
    """x / sqrt(mean x^2 + eps) * weight, over the last dimension."""
    if x.dtype not in (torch.float32, torch.float64) or weight.dtype != x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # in a low precision torch computes inside in fp32
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[return-value]


def silu_product(gate: Float[Tensor, "*n"], up: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """silu(gate) * up, both of one dtype: the gated unit of LLaMA's FFN."""
    return _SiluProduct.apply(gate, up)  # type: ignore[return-value]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        normed = x * scale
        dweight = (grads[0] * normed).sum_to_size(weight.shape) if needs_weight else None
        if not needs_x:
            return None, dweight, None
        inner = grads[0] * weight
        along = (inner * normed).mean(-1, keepdim=True)
        return inner.addcmul_(normed, along, value=-1).mul_(scale), dweight, None


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return dgate, F.silu(gate).mul_(grads[0])
