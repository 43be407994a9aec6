"""Softmax attention over the last tokens and the first one, beside the scan: what a hybrid mixer keeps of attention.

Does: attention in blocks with rotary positions, linear in length; the inputs that it carries over, constant in number.
Does not: project, gate or weigh; the mixer hands it its x, B and C before their convolution.
Source: ours, and no part of the paper. A sliding window beside a linear mixer as in LoLCATs (Zhang et al., 2024); the
first token is kept because trained attention rests on it (attention sinks, Xiao et al., ICLR 2024).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
) -> tuple[Float[Tensor, "b rows_l c_1"], Int[Tensor, "b l"]]:
    """All that the tokens of a call can look at, and where each finds its first token.

    Rows are what was carried over, (b, window, c + 1): the sequence's first token, then the last window - 1; then this
    call's tokens. The last channel is a row's position in its sequence plus 1, and 0 where there is nothing. Padding
    stands before a sequence's first token: after it, it would take places of the window.
    """
    batch, length, _ = xbc.shape
    work = torch.promote_types(xbc.dtype, torch.float32)  # narrower floats would round positions
    if past is None:
        past = xbc.new_zeros(batch, window, xbc.shape[2] + 1, dtype=work)
    if length == 0:
        return past.to(work), torch.zeros(batch, 0, dtype=torch.long, device=xbc.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=xbc.device) if mask is None else mask
    seen = past[:, :, -1].amax(1, keepdim=True).long()
    count = real.cumsum(1)
    positions = seen + count
    # The first token is in the tail too as long as it is one of the last; there it is found, and else in its own row.
    tail_first = past[:, 1:, -1] == 1
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
    positions = positions * real
    rows = torch.cat([xbc.to(work) * real[..., None], positions[..., None].to(work)], dim=-1)
    return torch.cat([past.to(work), rows], dim=1), first


def carry_over(
    rows: Float[Tensor, "b rows_l c_1"], first: Int[Tensor, "b l"], window: int
) -> Float[Tensor, "b window c_1"]:
    """What the next call has to be given of `carried`'s rows: those of the last token's sequence."""
    if first.shape[1] == 0:
        return rows[:, :window]
    rows = rows.detach()
    head = rows.gather(1, first[:, -1:, None].expand(-1, -1, rows.shape[2]))
    tail = rows[:, rows.shape[1] - window + 1 :]
    index = torch.arange(rows.shape[1] - window + 1, rows.shape[1], device=rows.device)
    own = (index >= first[:, -1:]) | (first[:, -1:] == 0)
    return torch.cat([head, tail * own[..., None]], dim=1)


def attend(
    rows: Float[Tensor, "b rows_l c_1"],
    first: Int[Tensor, "b l"],
    heads: int,
    head_dim: int,
    window: int,
    base: float,
    dtype: torch.dtype,
) -> Float[Tensor, "b l h p"]:
    """softmax(C_t . B_s) x_s over the last `window` tokens s of t's sequence, itself included, and its first token.

    rows, first: of `carried`; their channels are x, B, C of all heads. Scores have no factor of their own, as
    conversion from attention weights puts 1 / sqrt(N) into C. A token with nothing to look at (padding) gets zeros.
    """
    batch, length = first.shape
    if length == 0:
        return rows.new_zeros(batch, 0, heads, head_dim, dtype=dtype)
    positions = rows[..., -1].long()
    inner = heads * head_dim
    x, b, c = rows[..., :-1].to(dtype).split([inner, *[(rows.shape[2] - 1 - inner) // 2] * 2], dim=-1)
    x, b, c = (part.unflatten(-1, (heads, -1)) for part in (x, b, c))
    turns = positions.clamp(min=1) - 1
    b, c = rotary(b, turns, base), rotary(c[:, window:], turns[:, window:], base)

    def gathered(part: Tensor) -> Tensor:
        return part.gather(1, first[..., None, None].expand(-1, -1, *part.shape[2:]))

    # Blocks of queries look at their own rows and the block before them; what is carried over is the first block's. The
    # row of the first token is no part of its tail: every query looks at its own through an extra column.
    size = length if length <= window else window
    blocks = -(-length // size)
    fill = blocks * size - length

    def tiles(part: Tensor) -> Tensor:  # (b, rows, ...) to (b, blocks, window + size, ...)
        part = torch.cat([part, part.new_zeros(batch, fill, *part.shape[2:])], dim=1) if fill else part
        if blocks == 1:
            return part[:, None]
        part = part.unflatten(1, (blocks + 1, size))
        return torch.cat([part[:, :-1], part[:, 1:]], dim=2)

    def queries(part: Tensor) -> Tensor:  # (b, l, ...) to (b, blocks, size, ...)
        part = torch.cat([part, part.new_zeros(batch, fill, *part.shape[2:])], dim=1) if fill else part
        return part.unflatten(1, (blocks, size))

    index = torch.arange(window, window + length, device=rows.device).expand(batch, -1)
    key = torch.arange(window + length, device=rows.device).expand(batch, -1)
    here, begin, keys = queries(index)[..., None], queries(first)[..., None], tiles(key)[:, :, None]
    seen = (keys <= here) & (keys > here - window) & (keys >= begin) & (tiles(positions) > 0)[:, :, None]
    far = (first <= index - window) & (positions.gather(1, first) > 0)
    seen = torch.cat([queries(far)[..., None], seen], dim=-1)  # b, blocks, size, 1 + window + size
    # What sees nothing (padding) gets any shares, and then zeros.
    some = seen.any(-1, keepdim=True)
    barred = torch.zeros(seen.shape, dtype=c.dtype, device=c.device).masked_fill(~seen & some, -torch.inf)
    scores = torch.einsum("bkqhn,bkshn->bkhqs", queries(c), tiles(b))
    own = torch.einsum("blhn,blhn->blh", c, gathered(b))
    scores = torch.cat([queries(own).transpose(2, 3)[..., None], scores], dim=-1) + barred[:, :, None]
    shares = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(x.dtype)
    mixed = torch.einsum("bkhqs,bkshp->bkqhp", shares[..., 1:], tiles(x)).flatten(1, 2)[:, :length]
    to_first = shares[..., 0].transpose(2, 3).flatten(1, 2)[:, :length, :, None]
    return (mixed + to_first * gathered(x)) * some.flatten(1, 2)[:, :length, :, None]
