"""Softmax attention over the last tokens and the first one, beside the scan: what a hybrid mixer keeps of attention.

Does: attention in blocks with rotary positions, linear in length; the inputs that it carries over, constant in number.
Does not: project, gate or weigh; the mixer hands it its x, B and C before their convolution.
Source: ours, and no part of the paper. A sliding window beside a linear mixer as in LoLCATs (Zhang et al., 2024); the
first token is kept because trained attention rests on it (attention sinks, Xiao et al., ICLR 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mar.kernels import reference


def rotary(vectors: Float[Tensor, "b l h n"], positions: Int[Tensor, "b l"], base: float) -> Float[Tensor, "b l h n"]:
    """LLaMA's rotary positions: channels i and i + n / 2 turned by position / base^(2 i / n)."""
    half = vectors.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=vectors.device, dtype=torch.float64) / half)
    angles = positions[..., None, None].double() * rates
    cos, sin = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def carried(
    xbc: Float[Tensor, "b l c"],
    past: Float[Tensor, "b rows c_1"] | None,
    window: int,
    mask: Bool[Tensor, "b l"] | None,
    document_ids: Int[Tensor, "b l"] | None,
) -> tuple[Float[Tensor, "b rows_l c"], Int[Tensor, "b rows_l"], Int[Tensor, "b l"]]:
    """All that the tokens of a call can look at, each row's position, and where each token finds its first token.

    Rows are what was carried over, `window` of them: the sequence's first token, then the last window - 1; then this
    call's tokens. Positions count from 1 in a row's sequence, and are 0 where there is nothing; past has them as its
    last channel. Padding stands before a sequence's first token: after it, it would take places of the window.
    """
    batch, length, _ = xbc.shape
    if past is None:
        past = xbc.new_zeros(batch, window, xbc.shape[2] + 1, dtype=torch.float32)
    before = past[..., -1].long()
    if length == 0:
        return past[..., :-1].to(xbc.dtype), before, torch.zeros(batch, 0, dtype=torch.long, device=xbc.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=xbc.device) if mask is None else mask
    seen = before.amax(1, keepdim=True)
    count = real.cumsum(1)
    positions = seen + count
    # The first token is in the tail too as long as it is one of the last; there it is found, and else in its own row.
    tail_first = before[:, 1:] == 1
    first = torch.where(tail_first.any(1), 1 + tail_first.float().argmax(1), 0)
    first = torch.where(seen[:, 0] > 0, first, window + real.float().argmax(1))[:, None].expand(-1, length)
    if document_ids is not None:
        ids = reference.segments(document_ids)
        index = torch.arange(length, device=xbc.device).expand(batch, -1)
        start = torch.ones_like(ids, dtype=torch.bool)
        start[:, 1:] = ids[:, 1:] != ids[:, :-1]
        start_index = torch.where(start, index, 0).cummax(1).values
        later = ids != ids[:, :1]
        own = count - (count - real.long()).gather(1, start_index)
        # Before its first real token a document is empty: it finds its first token at padding.
        first_real = torch.where(real & (own == 1) | (own == 0), index, 0).cummax(1).values
        first = torch.where(later, window + first_real, first)
        positions = torch.where(later, own, positions)
    if mask is not None:
        xbc, positions = xbc * real[..., None], positions * real
    return torch.cat([past[..., :-1].to(xbc.dtype), xbc], dim=1), torch.cat([before, positions], dim=1), first


def carry_over(
    rows: Float[Tensor, "b rows_l c"],
    positions: Int[Tensor, "b rows_l"],
    first: Int[Tensor, "b l"],
    window: int,
) -> Float[Tensor, "b window c_1"]:
    """What the next call has to be given of `carried`'s rows, those of the last token's sequence; in fp32 at least, as
    narrower floats would round positions."""
    batch, count, _ = rows.shape
    index = torch.arange(count - window, count, device=rows.device).repeat(batch, 1)
    if first.shape[1]:
        index[:, 0] = first[:, -1]
    kept = rows.detach().gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
    work = torch.promote_types(rows.dtype, torch.float32)
    kept = torch.cat([kept.to(work), positions.gather(1, index)[..., None].to(work)], dim=-1)
    if first.shape[1]:
        own = (index >= first[:, -1:]) | (first[:, -1:] == 0)
        kept = kept * own[..., None]
    return kept


class _Attention(torch.autograd.Function):
    """softmax(q k^T + barred) v over the last dimension of keys, in the precision of q: autocast would take the shares
    to fp32 and back, twice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, barred: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            scores = q @ k.mT
            scores += barred
            shares = scores.softmax(-1)
            ctx.save_for_backward(q, k, v, shares)
            return shares @ v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, shares = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            gradient = torch.ops.aten._softmax_backward_data(dy @ v.mT, shares, -1, shares.dtype)
            return gradient @ k, gradient.mT @ q, shares.mT @ dy, None


def attend(
    rows: Float[Tensor, "b rows_l c"],
    positions: Int[Tensor, "b rows_l"],
    first: Int[Tensor, "b l"],
    heads: int,
    head_dim: int,
    window: int,
    base: float,
) -> Float[Tensor, "b l h p"]:
    """softmax(C_t . B_s) x_s over the last `window` tokens s of t's sequence, itself included, and its first token.

    rows, positions, first: of `carried`; channels are x, B, C of all heads. Scores have no factor of their own, as
    conversion from attention weights puts 1 / sqrt(N) into C. A token with nothing to look at (padding) gets zeros.
    """
    batch, length = first.shape
    if length == 0:
        return rows.new_zeros(batch, 0, heads, head_dim)
    inner = heads * head_dim
    x, b, c = rows.split([inner, *[(rows.shape[2] - inner) // 2] * 2], dim=-1)
    x, b, c = (part.unflatten(-1, (heads, -1)) for part in (x, b, c))
    turns = positions.clamp(min=1) - 1
    b, c = rotary(b, turns, base), rotary(c[:, window:], turns[:, window:], base)

    # Blocks of queries look at their own rows and the block before them; what is carried over is the first block's.
    # First tokens that some query is too far from to find them there are keys that all blocks share.
    size = length if length <= window else window
    blocks = -(-length // size)
    fill = blocks * size - length
    index = torch.arange(window, window + length, device=rows.device).expand(batch, -1)
    far = (first <= index - window) & (positions.gather(1, first) > 0)
    starts = torch.zeros_like(positions).scatter_add_(1, first, far.long()) > 0
    # Where a sequence of the batch has fewer than another some that are nobody's first token fill up, and are barred.
    places = starts.float().topk(int(starts.sum(1).max()), dim=1).indices

    def filled(part: Tensor) -> Tensor:
        return torch.cat([part, part.new_zeros(batch, fill, *part.shape[2:])], dim=1) if fill else part

    def tiles(part: Tensor) -> Tensor:  # (b, rows, ...) to (b, blocks, window + size, ...)
        part = filled(part)
        if blocks == 1:
            return part[:, None]
        part = part.unflatten(1, (blocks + 1, size))
        return torch.cat([part[:, :-1], part[:, 1:]], dim=2)

    def queries(part: Tensor) -> Tensor:  # (b, l, ...) to (b, blocks, size, ...)
        return filled(part).unflatten(1, (blocks, size))

    def keys(part: Tensor) -> Tensor:  # (b, rows, h, n) to (b, blocks, h, firsts + window + size, n)
        own = part.gather(1, places[..., None, None].expand(-1, -1, *part.shape[2:]))
        own = own[:, None].expand(-1, blocks, -1, -1, -1)
        return torch.cat([own.transpose(2, 3), tiles(part).transpose(2, 3)], dim=3)

    key = torch.arange(window + length, device=rows.device).expand(batch, -1)
    here, begin, there = queries(index)[..., None], queries(first)[..., None], tiles(key)[:, :, None]
    seen = (there <= here) & (there > here - window) & (there >= begin) & (tiles(positions) > 0)[:, :, None]
    own = queries(far)[..., None] & (begin == places[:, None, None])
    seen = torch.cat([own, seen], dim=-1)  # b, blocks, size, firsts + window + size
    # What sees nothing (padding) gets any shares, and then zeros.
    some = seen.any(-1, keepdim=True)
    barred = torch.zeros(seen.shape, dtype=c.dtype, device=c.device).masked_fill(~seen & some, -torch.inf)
    y: Any = _Attention.apply(queries(c).transpose(2, 3), keys(b), keys(x), barred[:, :, None])
    return (y.transpose(2, 3) * some[..., None]).flatten(1, 2)[:, :length]
