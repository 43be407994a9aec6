"""Fast torch versions of the reference ops: the scan in chunks of matrix products, the convolution in shifted adds.

Does: forward and hand-written backward, which recompute what is cheap and keep only inputs and chunk states.
Does not: compile anything; runs on every device that torch runs on. Decay, state and sums stay in fp32 (fp64 for fp64
input); matrix products run in the input's dtype. Exponentials are of differences of cumulative decay, all <= 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mar.kernels.reference import segments


def scan(
    x: Float[Tensor, "b l h p"],
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    state: Float[Tensor, "b h p n"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """As `reference.scan_recurrent`, for any length, in O(length * chunk) work with matrix products.

    Differentiable in x, log_decay, b, c and state.
    """
    if x.shape[1] == 0:
        work = torch.promote_types(x.dtype, torch.float32)
        empty = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3], dtype=work)
        return x, empty if state is None else state.to(work)
    ids = None if document_ids is None else segments(document_ids)
    y, last = _Scan.apply(x, log_decay, b, c, state, ids, chunk)  # type: ignore[misc]
    return y, last


class _Chunks:
    """The decay factors of one call, per chunk of q tokens; zero where a document boundary lies between.

    Computed in `work` and handed out in `dtype`: elementwise torch kernels are several times slower on mixed types.
    """

    def __init__(
        self, log_decay: Tensor, document_ids: Tensor | None, chunk: int, work: torch.dtype, dtype: torch.dtype
    ):
        batch, length, heads = log_decay.shape
        self.q = min(chunk, length)
        self.count = -(-length // self.q)
        self.pad = self.count * self.q - length
        total = self.split(log_decay.to(work)).cumsum(-1)  # b h n q
        within = total[..., :, None] - total[..., None, :]
        allowed = torch.ones(self.q, self.q, dtype=torch.bool, device=total.device).tril()
        self.carry = total[..., -1].exp()  # b h n: what a chunk keeps of the state before it
        self.enter = total.exp()  # b h n q: what token t sees of the state before its chunk
        self.leave = (total[..., -1:] - total).exp()  # b h n q: what of token s is left at the chunk's end
        if document_ids is not None:
            ids = F.pad(document_ids, (0, self.pad), mode="replicate") if self.pad else document_ids
            ids = ids.view(batch, 1, self.count, self.q)
            ends = ids[..., -1]
            before = torch.cat([ids[:, :, :1, 0], ends[:, :, :-1]], dim=2)
            allowed = allowed & (ids[..., :, None] == ids[..., None, :])
            self.carry = self.carry * (ends == before)
            self.enter = self.enter * (ids == before[..., None])
            self.leave = self.leave * (ids == ends[..., None])
        self.within = within.masked_fill_(~allowed, -torch.inf).exp_().to(dtype)  # b h n q q
        self.enter = self.enter[..., None].to(dtype)
        self.leave = self.leave[..., None].to(dtype)

    def split(self, tensor: Tensor) -> Tensor:
        """(b, l, h, ...) to contiguous (b, h, n, q, ...), padded with zeros."""
        tensor = tensor.transpose(1, 2)
        if self.pad:
            tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, self.pad))
        return tensor.reshape(*tensor.shape[:2], self.count, self.q, *tensor.shape[3:])

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of `split`."""
        tensor = tensor.flatten(2, 3)
        return (tensor[:, :, : tensor.shape[2] - self.pad] if self.pad else tensor).transpose(1, 2)


def _states(first: Tensor, updates: Tensor, carry: Tensor) -> Tensor:
    """States before each chunk and after the last one: (b, h, n + 1, p, n_state)."""
    states = updates.new_empty(*updates.shape[:2], updates.shape[2] + 1, *updates.shape[3:])
    states[:, :, 0] = first
    for i in range(updates.shape[2]):
        torch.addcmul(updates[:, :, i], states[:, :, i], carry[:, :, i, None, None], out=states[:, :, i + 1])
    return states


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, log_decay, b, c, state, document_ids, chunk):
        work = torch.promote_types(x.dtype, torch.float32)
        chunks = _Chunks(log_decay, document_ids, chunk, work, x.dtype)
        xs, bs, cs = chunks.split(x), chunks.split(b.to(x.dtype)), chunks.split(c.to(x.dtype))
        first = torch.zeros((), dtype=work, device=x.device) if state is None else state.to(work)
        updates = torch.matmul(xs.transpose(-1, -2), bs * chunks.leave).to(work)
        states = _states(first, updates, chunks.carry)
        seen = torch.matmul(cs, states[:, :, :-1].to(x.dtype).transpose(-1, -2))
        mixed = torch.matmul(cs, bs.transpose(-1, -2)).mul_(chunks.within)
        y = chunks.join(torch.matmul(mixed, xs).addcmul_(seen, chunks.enter))
        ctx.save_for_backward(xs, bs, cs, log_decay, states, document_ids)
        ctx.chunk, ctx.dtypes, ctx.has_state = chunk, (b.dtype, c.dtype), state is not None
        return y, states[:, :, -1].clone()

    @staticmethod
    def backward(ctx, dy, dlast):  # type: ignore[override]
        xs, bs, cs, log_decay, states, document_ids = ctx.saved_tensors
        dtype, work = xs.dtype, states.dtype
        chunks = _Chunks(log_decay, document_ids, ctx.chunk, work, dtype)
        dys = chunks.split(dy.to(dtype))

        dys_in = dys * chunks.enter
        dupdates = torch.matmul(dys_in.transpose(-1, -2), cs).to(work)
        after = torch.empty_like(states[:, :, 1:])  # gradient of the state at each chunk's end
        current = dlast.to(work)
        dcarry = torch.empty_like(chunks.carry)
        for i in reversed(range(chunks.count)):
            after[:, :, i] = current
            dcarry[:, :, i] = (current * states[:, :, i]).sum((-1, -2))
            current = torch.addcmul(dupdates[:, :, i], current, chunks.carry[:, :, i, None, None])
        after = after.to(dtype)

        mixed = torch.matmul(cs, bs.transpose(-1, -2)).mul_(chunks.within)
        dmixed = torch.matmul(dys, xs.transpose(-1, -2))
        dx = torch.matmul(mixed.transpose(-1, -2), dys)
        dx += torch.matmul(bs * chunks.leave, after.transpose(-1, -2))

        # A decay's logarithm enters as a factor's exponent: its gradient is the factor times the factor's gradient.
        dwithin = (mixed.mul_(dmixed)).to(work)
        dtotal = dwithin.sum(-1) - dwithin.sum(-2)
        dc = torch.matmul(dys_in, states[:, :, :-1].to(dtype))
        dtotal += (dc * cs).to(work).sum(-1)
        db = torch.matmul(xs, after).mul_(chunks.leave)
        dleave = (db * bs).to(work).sum(-1)
        dtotal -= dleave
        dtotal[..., -1] += dleave.sum(-1) + dcarry * chunks.carry
        dlog_decay = chunks.join(dtotal.flip(-1).cumsum(-1).flip(-1)).to(log_decay.dtype)

        dscores = dmixed.mul_(chunks.within)
        dc += torch.matmul(dscores, bs)
        db += torch.matmul(dscores.transpose(-1, -2), cs)
        dstate = current if ctx.has_state else None
        b_dtype, c_dtype = ctx.dtypes
        return (
            chunks.join(dx),
            dlog_decay,
            chunks.join(db).to(b_dtype),
            chunks.join(dc).to(c_dtype),
            dstate,
            None,
            None,
        )


def scan_step(
    x: Float[Tensor, "b h p"],
    log_decay: Float[Tensor, "b h"],
    b: Float[Tensor, "b h n"],
    c: Float[Tensor, "b h n"],
    state: Float[Tensor, "b h p n"],
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One token of the recurrence, for decoding."""
    work = state.dtype
    state = state * log_decay.to(work).exp()[..., None, None] + x.to(work)[..., :, None] * b.to(work)[..., None, :]
    return torch.matmul(state, c.to(work)[..., None])[..., 0].to(x.dtype), state


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"],
    past: Float[Tensor, "b k_1 c"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """As `reference.causal_conv`, differentiable in x, weight, bias and past."""
    if x.shape[1] == 0:
        return x
    ids = None if document_ids is None else segments(document_ids)
    return _Conv.apply(x, weight, bias, past, ids)  # type: ignore[return-value]


def _correlate(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(b, l + k - 1, c) and taps (c, k) to (b, l, c). The view is channels-last, which libraries are fast at."""
    image = padded.transpose(1, 2)[:, :, None]
    taps = weight.to(padded.dtype)[:, None, None]
    y = F.conv2d(image, taps, None if bias is None else bias.to(padded.dtype), groups=weight.shape[0])
    return y[:, :, 0].transpose(1, 2)


def _crossings(document_ids: Tensor | None, taps: int) -> list[tuple[int, Tensor, Tensor]]:
    """For each shift j > 0 the (row, token) pairs whose j-th predecessor is of another document.

    What precedes the row belongs to the row's first document.
    """
    if document_ids is None:
        return []
    ids = torch.cat([document_ids[:, :1].expand(-1, taps - 1), document_ids], dim=1)
    length = document_ids.shape[1]
    pairs = []
    for j in range(1, taps):
        row, token = (ids[:, taps - 1 - j : taps - 1 - j + length] != document_ids).nonzero(as_tuple=True)
        pairs.append((j, row, token))
    return pairs


def _sum_tokens(tensor: Tensor) -> Tensor:
    """(b, l, c) to (c,). A matrix product accumulates in fp32 and is several times faster than a converting sum."""
    flat = tensor.flatten(0, 1)
    return torch.mm(flat.new_ones(1, flat.shape[0]), flat)[0]


class _Conv(torch.autograd.Function):
    """One library convolution each way; the few products that cross a document boundary are taken back afterwards."""

    @staticmethod
    def forward(ctx, x, weight, bias, past, document_ids):
        taps = weight.shape[1]
        if past is None:
            past = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
        padded = torch.cat([past.to(x.dtype), x], dim=1)
        y = _correlate(padded, weight, bias)
        crossings = _crossings(document_ids, taps)
        for j, row, token in crossings:
            lost = padded[row, token + taps - 1 - j] * weight[:, taps - 1 - j].to(x.dtype)
            y.index_put_((row, token), -lost, accumulate=True)
        ctx.save_for_backward(padded, weight)
        ctx.crossings, ctx.bias_dtype = crossings, bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[override]
        padded, weight = ctx.saved_tensors
        work = torch.promote_types(dy.dtype, torch.float32)
        taps, length = weight.shape[1], dy.shape[1]
        dy = dy.contiguous()
        # The transposed map is the same correlation with taps reversed, over dy padded on both sides.
        dpadded = _correlate(F.pad(dy, (0, 0, taps - 1, taps - 1)), weight.flip(1), None)
        dweight = torch.empty(weight.shape, dtype=work, device=dy.device)
        for j in range(taps):
            dweight[:, taps - 1 - j] = _sum_tokens(dy * padded[:, taps - 1 - j : taps - 1 - j + length])
        for j, row, token in ctx.crossings:
            place = (row, token + taps - 1 - j)
            dpadded.index_put_(place, -dy[row, token] * weight[:, taps - 1 - j].to(dy.dtype), accumulate=True)
            dweight[:, taps - 1 - j] -= (dy[row, token] * padded[place]).sum(0, dtype=work)
        dpast = dpadded[:, : taps - 1] if ctx.needs_input_grad[3] else None
        dbias = _sum_tokens(dy).to(ctx.bias_dtype)
        return dpadded[:, taps - 1 :], dweight.to(weight.dtype), dbias, dpast, None
