"""The steps of mar.stages as they look in plain torch: the peer that benchmarks compare the product with.

Does: state each op the way one writes it first (library convolution, einsum and exp under autograd, logits of the whole
batch in fp32, a straight-through neuron, AdamW's defaults), and put these in the product's place for a while.
Does not: leave anything out: documents of a packed row stay apart, and losses and gradients agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mar.config import NeuronConfig
from mar.kernels.reference import segments
from mar.objective import ParameterGroup
from mar.optimizer import TrainConfig
from mar.surrogate import PRIMITIVES


def scan(
    x: Float[Tensor, "b l h p"],
    log_decay: Float[Tensor, "b l h"],
    b: Float[Tensor, "b l h n"],
    c: Float[Tensor, "b l h n"],
    state: Float[Tensor, "b h p n"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """As `mar.kernels.scan`: the usual chunked form, differentiated by autograd. Decay and state are fp32."""
    batch, length, heads, width = x.shape
    size = min(chunk, length)
    pad = -length % size
    work = torch.promote_types(x.dtype, torch.float32)
    ids = log_decay.new_zeros(batch, length).long() if document_ids is None else segments(document_ids)
    ids = F.pad(ids, (0, pad), mode="replicate").view(batch, 1, -1, size)
    before = torch.cat([ids[:, :, :1, 0], ids[:, :, :-1, -1]], dim=2)

    def split(tensor: Tensor) -> Tensor:
        """(b, l, h, ...) to (b, h, chunks, size, ...)."""
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, pad))
        return tensor.unflatten(1, (-1, size)).movedim(3, 1)

    xs, bs, cs = split(x), split(b), split(c)
    total = split(log_decay.to(work)).cumsum(-1)
    allowed = torch.ones(size, size, dtype=torch.bool).tril() & (ids[..., :, None] == ids[..., None, :])
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    enter = total.exp() * (ids == before[..., None])
    leave = (total[..., -1:] - total).exp() * (ids == ids[..., -1:])
    carry = total[..., -1].exp() * (ids[..., -1] == before)

    scores = torch.einsum("bhctn,bhcsn->bhcts", cs, bs) * within.to(x.dtype)
    y = torch.einsum("bhcts,bhcsp->bhctp", scores, xs)
    updates = torch.einsum("bhcsp,bhcsn->bhcpn", xs, bs * leave[..., None].to(x.dtype)).to(work)
    current = x.new_zeros(batch, heads, width, b.shape[-1], dtype=work) if state is None else state
    states = []
    for i in range(updates.shape[2]):
        states.append(current)
        current = carry[:, :, i, None, None] * current + updates[:, :, i]
    entering = torch.stack(states, dim=2).to(x.dtype)
    y = y + torch.einsum("bhctn,bhcpn->bhctp", cs * enter[..., None].to(x.dtype), entering)
    return y.movedim(1, 3).flatten(1, 2)[:, :length], current


def causal_conv(
    x: Float[Tensor, "b l c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, " c"],
    past: Float[Tensor, "b k_1 c"] | None = None,
    document_ids: Int[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b l c"]:
    """As `mar.kernels.causal_conv`, by torch's depthwise conv1d; what crosses a document boundary is taken back."""
    channels, taps = weight.shape
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    before = x.new_zeros(x.shape[0], taps - 1, channels) if past is None else past.to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
    if document_ids is None:
        return y
    ids = segments(document_ids)
    ids = torch.cat([ids[:, :1].expand(-1, taps - 1), ids], dim=1)
    for tap in range(taps - 1):
        row, token = (ids[:, tap : tap + x.shape[1]] != ids[:, taps - 1 :]).nonzero(as_tuple=True)
        if len(row):
            y = y.index_put((row, token), -padded[row, token + tap] * weight[:, tap], accumulate=True)
    return y


def bidirectional_kl(
    student_hidden: Float[Tensor, "n d"],
    student_head: Float[Tensor, "v d"],
    teacher_hidden: Float[Tensor, "n e"],
    teacher_head: Float[Tensor, "v e"],
    alpha: float,
    beta: float,
) -> Float[Tensor, ""]:
    """As `mar.losses.chunked_bidirectional_kl`, over the logits of the whole batch in fp32."""
    with torch.no_grad():
        log_p = F.linear(teacher_hidden, teacher_head).float().log_softmax(-1)
    log_q = F.linear(student_hidden, student_head).float().log_softmax(-1)
    loss = log_q.new_zeros(())
    if alpha:
        loss = loss + alpha * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if beta:
        loss = loss + beta * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return loss


class ClosedForm:
    """Stands in for the autograd function of mar.neurons."""

    @staticmethod
    def apply(
        current: Float[Tensor, "*batch channels"], threshold: Float[Tensor, "thresholds"], config: NeuronConfig
    ) -> Float[Tensor, "*batch channels"]:
        """V code(I / V); the gradient of the code goes straight through the surrogate's primitive."""
        signed = config.kind != "binary"
        level = current.float() / threshold
        smooth = PRIMITIVES[config.surrogate](level, config.time_steps, config.precharge, signed)
        charged = current.float() + current.float().sign() * config.precharge * threshold
        whole = torch.div(charged, threshold, rounding_mode="trunc")
        code = whole.clamp(-config.time_steps if signed else 0, config.time_steps)
        return (threshold * (smooth + (code - smooth).detach())).to(current.dtype)


def build_optimizers(groups: list[ParameterGroup], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """As `mar.optimizer.build_optimizers` for the groups of mar.stages: AdamW as torch sets it up by default."""
    settings = [
        {
            "params": list(group.parameters.values()),
            "lr_scale": group.lr_scale,
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]
    return [torch.optim.AdamW(settings, lr=config.lr, betas=config.betas)]


@contextmanager
def plain() -> Iterator[None]:
    """While this lasts, mar trains with the functions of this file."""
    with ExitStack() as stack:
        for name, function in (
            ("mar.kernels.scan", scan),
            ("mar.kernels.causal_conv", causal_conv),
            ("mar.kernels.rms_norm", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)),
            ("mar.kernels.silu_product", lambda gate, up: F.silu(gate) * up),
            ("mar.stages.chunked_bidirectional_kl", bidirectional_kl),
            ("mar.neurons._ClosedForm", ClosedForm),
            ("mar.train.build_optimizers", build_optimizers),
            # The native core has ops that span several of these.
            ("mar.kernels._NATIVE", False),
        ):
            stack.enter_context(patch(name, function))
        yield
