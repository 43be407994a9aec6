"""The plain statement of every op, in torch, one line per equation: what all faster backends are compared with.

Does: the state-space recurrence token by token, the same map as a matrix, and the causal depthwise convolution.
Does not: aim for speed. Works in any float type; use float64 as the oracle.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def segments(document_ids: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """The documents of a row numbered in order, so that an id that comes back later is another document."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.cat([torch.zeros_like(document_ids[:, :1]), changes.cumsum(1).to(document_ids.dtype)], dim=1)


def scan_recurrent(
    x: Float[Tensor, "b l h p"],
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    state: Float[Tensor, "b h p n"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """S_t = exp(log_decay_t) S_{t-1} + x_t B_t^T and y_t = S_t C_t, the state starting anew where the document changes.

    Returns y in x's dtype and the last state. Source: Discrete Mamba-2 (method, section 5).
    """
    batch, length, heads, width = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(batch, heads, width, b.shape[-1], dtype=work)
    outputs = []
    for t in range(length):
        if document_ids is not None and t > 0:
            same = (document_ids[:, t] == document_ids[:, t - 1]).to(state.dtype)
            state = state * same[:, None, None, None]
        update = x[:, t].to(work)[..., :, None] * b[:, t].to(work)[..., None, :]
        state = log_decay[:, t].to(work).exp()[..., None, None] * state + update
        outputs.append((state @ c[:, t].to(work)[..., None])[..., 0])
    y = torch.stack(outputs, dim=1) if outputs else x.new_zeros(x.shape)
    return y.to(x.dtype), state


def scan_matrix(
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b h l l"]:
    """The matrix M with y = M x: M[t, s] = (C_t . B_s) exp(sum of log_decay over s+1..t) for s <= t, else 0."""
    total = log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)).cumsum(1).transpose(1, 2)  # b h l
    allowed = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).tril()
    if document_ids is not None:
        ids = segments(document_ids)
        allowed = allowed & (ids[:, None, :, None] == ids[:, None, None, :])
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    return torch.einsum("bthn,bshn->bhts", c.to(decay.dtype), b.to(decay.dtype)) * decay


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"],
    past: Float[Tensor, "b k_1 c"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """y_t = bias + sum_j weight[:, K-1-j] x_{t-j}, j < K; tokens before the row (`past`, K-1 of them) or of another
    document count as zero (`past` belongs to the first document)."""
    taps = weight.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if past is None else past.to(x.dtype)
    padded = torch.cat([before, x], dim=1).to(work)
    y = bias.to(work).expand(x.shape).clone()
    ids = None if document_ids is None else segments(document_ids)
    for j in range(taps):
        term = padded[:, taps - 1 - j : padded.shape[1] - j] * weight[:, taps - 1 - j].to(work)
        if ids is not None:
            same = torch.cat([ids[:, :1].expand(-1, j), ids], dim=1)[:, : x.shape[1]] == ids
            term = term * same[..., None]
        y = y + term
    return y.to(x.dtype)
