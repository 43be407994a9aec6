"""What the stages minimise: KL divergences on logits, SBDS's bidirectional KL from hidden states, feature distances.

Does: fp32 logarithms and sums whatever the input (fp64 for fp64); teacher-student KL straight from hidden states and
heads, chunk by chunk, so that no (tokens, vocabulary) tensor exists. Does not: run models, mix losses or shift labels.
The teacher comes first wherever a function takes both (except in `relative_mse`) and never receives gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mar import kernels

IGNORE_LABEL = -100
_BLOCK_ELEMENTS = 3 * 2**17
"""Entries of one fp32 work buffer on a CPU: four such buffers stay in its caches, whatever the vocabulary."""


def forward_kl(
    teacher_logits: Float[Tensor, "*tokens vocab"], student_logits: Float[Tensor, "*tokens words"]
) -> Float[Tensor, "*tokens"]:
    """KL(teacher || student) in nats per token: mass-covering. Takes logits or log-probabilities."""
    return bidirectional_kl(teacher_logits, student_logits, alpha=1.0, beta=0.0)


def reverse_kl(
    teacher_logits: Float[Tensor, "*tokens vocab"], student_logits: Float[Tensor, "*tokens words"]
) -> Float[Tensor, "*tokens"]:
    """KL(student || teacher) in nats per token: mode-seeking. Takes logits or log-probabilities."""
    return bidirectional_kl(teacher_logits, student_logits, alpha=0.0, beta=1.0)


def bidirectional_kl(
    teacher_logits: Float[Tensor, "*tokens vocab"],
    student_logits: Float[Tensor, "*tokens words"],
    alpha: float,
    beta: float,
) -> Float[Tensor, "*tokens"]:
    """Paper eq. 5: sum_k (α p_k - β q_k)(log p_k - log q_k) = α KL(p || q) + β KL(q || p), p teacher and q student.

    Keeps several (..., vocab) tensors for backward; for many tokens use `chunked_bidirectional_kl`. Logits must be
    finite. Raises ValueError if the vocabularies differ.
    """
    _same_vocabulary(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p = _wide(teacher_logits.detach()).log_softmax(-1)
    log_q = _wide(student_logits).log_softmax(-1)
    return ((alpha * log_p.exp() - beta * log_q.exp()) * (log_p - log_q)).sum(-1)


def chunked_bidirectional_kl(
    student_hidden: Float[Tensor, "n d"],
    student_head: Float[Tensor, "v d"],
    teacher_hidden: Float[Tensor, "n e"],
    teacher_head: Float[Tensor, "w e"],
    alpha: float,
    beta: float,
    weight: Float[Tensor, "n"] | Bool[Tensor, "n"] | None = None,
    chunk: int = 256,
) -> Float[Tensor, ""]:
    """Mean over tokens of `bidirectional_kl` of the heads' logits, `chunk` tokens at a time.

    The gradients for student_hidden and, if it requires one, student_head are made in the forward pass while a chunk's
    logits are at hand, so nothing is stored per (token, word) and nothing is computed twice. Matrix products run in
    autocast's dtype, else in that of each hidden tensor; everything after the logits, and the sum of the head's
    gradient, in fp32.

    weight: per token, at least 0: the mean is sum(weight * kl) / sum(weight). Tokens of weight 0 cost nothing; if all
    are 0, so is the loss. Raises ValueError if the vocabularies differ.
    """
    count = student_hidden.shape[0]
    if weight is None:
        share = student_hidden.new_full((count,), 1 / max(count, 1), dtype=_work_dtype(student_hidden))
    else:
        kept = weight.nonzero().squeeze(1)
        share = weight[kept].to(_work_dtype(student_hidden))
        share = share / share.sum()
        if len(kept) < count:
            student_hidden, teacher_hidden = student_hidden[kept], teacher_hidden[kept]
    wanted = torch.is_grad_enabled()
    return _ChunkedKL.apply(  # type: ignore[return-value]
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        share,
        (alpha, beta),
        chunk,
        (wanted and student_hidden.requires_grad, wanted and student_head.requires_grad),
    )


@torch.no_grad()
def compare_hidden(
    student_hidden: Float[Tensor, "n d"],
    student_head: Float[Tensor, "v d"] | None,
    teacher_hidden: Float[Tensor, "n e"],
    teacher_head: Float[Tensor, "w e"],
    labels: Int[Tensor, "n"],
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Per token, for evaluation: how far the student is from the teacher and from the text. All of shape (n,), fp32.

    kl, reverse_kl: KL(teacher || student) and the other direction, in nats. agree: 1 where the student's best word is
    the teacher's. student_nll, teacher_nll: -log probability of the label, in nats. valid: bool, whether there is a
    label; where it is -100 both nll are 0. labels are the next tokens, already shifted. A student_head of None says
    that student_hidden are logits. Raises ValueError if the vocabularies differ.
    """
    pair = _Pair(student_hidden, student_head, teacher_hidden, teacher_head, chunk)
    valid = labels != IGNORE_LABEL
    targets = labels.masked_fill(~valid, 0)[:, None]
    names = ("kl", "reverse_kl", "agree", "student_nll", "teacher_nll")
    result = {name: torch.empty(len(labels), dtype=pair.work, device=labels.device) for name in names}
    for _ in pair.chunks():
        for rows, _, z, w, q, p in pair.blocks():
            z_label, w_label = z.gather(1, targets[rows]), w.gather(1, targets[rows])
            result["agree"][rows] = (z.gather(1, w.argmax(1, keepdim=True)) == z.amax(1, keepdim=True)).squeeze(1).to(z)
            log_z, log_w, ratio = _compare(z, w, q, p)
            result["student_nll"][rows] = (log_z - z_label).squeeze(1)
            result["teacher_nll"][rows] = (log_w - w_label).squeeze(1)
            result["kl"][rows] = -torch.linalg.vecdot(p, ratio)
            result["reverse_kl"][rows] = torch.linalg.vecdot(q, ratio)
    for name in ("student_nll", "teacher_nll"):
        result[name].masked_fill_(~valid, 0.0)
    return {**result, "valid": valid}


def feature_alignment(teacher: Float[Tensor, "*tokens d"], student: Float[Tensor, "*tokens d"]) -> Float[Tensor, ""]:
    """Paper eq. 6: mean over tokens of ||teacher - student||_2 (not squared) over the hidden size.

    Give it the outputs of a layer's first RMSNorm, each model's own. The gradient where the two are equal is 0.
    """
    return _mean_norm(teacher, student, (-1,))


def hidden_distance(teacher: Float[Tensor, "*tokens d"], student: Float[Tensor, "*tokens d"]) -> Float[Tensor, ""]:
    """MOHAWK's second stage: mean over tokens of the L2 distance between a teacher block's output and the student's."""
    return _mean_norm(teacher, student, (-1,))


def matrix_distance(
    teacher: Float[Tensor, "*heads length length"], student: Float[Tensor, "*heads length length"]
) -> Float[Tensor, ""]:
    """MOHAWK's first stage: mean over batch and heads of ||attention matrix - student's mixing matrix||_F."""
    return _mean_norm(teacher, student, (-2, -1))


def relative_mse(student: Float[Tensor, "*tokens d"], teacher: Float[Tensor, "*tokens d"]) -> Float[Tensor, ""]:
    """||student - teacher||^2 / ||teacher||^2 over all tokens and channels: 1 for a student that answers 0."""
    target = _wide(teacher.detach())
    tiny = torch.finfo(target.dtype).tiny
    return (_wide(student) - target).square().sum() / target.square().sum().clamp_min(tiny)


class _ChunkedKL(torch.autograd.Function):
    """Scalar sum_i share_i L1(p_i || q_i), and its gradients, in one pass over the chunks.

    With r = log q - log p, for one token: KL(p || q) = -sum p r, KL(q || p) = sum q r, and after the student's softmax
    dL1/dz = α (q - p) + β q (r - KL(q || p)).
    """

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, share, mix, chunk, needs):  # type: ignore[override]
        alpha, beta = mix
        pair = _Pair(student_hidden, student_head, teacher_hidden, teacher_head, chunk)
        total = share.new_zeros(())
        hidden_grad = torch.empty_like(student_hidden) if needs[0] else None
        head_grad = torch.zeros(student_head.shape, dtype=pair.work, device=share.device) if needs[1] else None
        for tokens, logits in pair.chunks():
            for rows, logits_block, z, w, q, p in pair.blocks():
                _, _, ratio = _compare(z, w, q, p)
                loss = share.new_zeros(len(z))
                reverse = loss
                if alpha:
                    loss = loss - alpha * torch.linalg.vecdot(p, ratio)
                if beta:
                    reverse = torch.linalg.vecdot(q, ratio)
                    loss = loss + beta * reverse
                total += torch.dot(share[rows], loss)
                if any(needs):
                    if beta:
                        torch.add((alpha - beta * reverse)[:, None], ratio, alpha=beta, out=ratio).mul_(q)
                    else:
                        torch.mul(q, alpha, out=ratio)
                    if alpha:
                        ratio.sub_(p, alpha=alpha)
                    logits_block.copy_(ratio)
            if hidden_grad is not None:
                hidden_grad[tokens] = torch.mm(logits, pair.student.weight) * share[tokens, None]
            if head_grad is not None:
                _add_product(head_grad, logits, student_hidden[tokens] * share[tokens, None])
        ctx.save_for_backward(hidden_grad, head_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[override]
        # autograd casts the head's gradient to the head's dtype
        scaled = (None if grad is None else grad * grad_output for grad in ctx.saved_tensors)
        return *scaled, *(None,) * 6


class _Head:
    """An output head, cast once. In 16 bits its logits are taken relative to a level near each token's best word.

    Softmax ignores what a token's logits have in common, but rounding does not: at 20 a bf16 logit is off by up to
    0.06. A constant column more in the product (its sums are fp32) subtracts the level before anything is rounded.
    """

    def __init__(self, weight: Tensor, hidden: Tensor):
        self.dtype = dtype = _product_dtype(hidden)
        self.int8 = kernels.int8_head(weight, hidden)
        self.levelled = torch.finfo(dtype).bits == 16
        self.vocab, self.width = weight.shape
        if self.levelled:
            # Rows of a multiple of 64 bytes: products with an odd row length are slower.
            self.rows = torch.empty(self.vocab, self.width // 32 * 32 + 32, dtype=dtype, device=weight.device)
            self.rows[:, : self.width] = weight.detach()
            self.rows[:, self.width] = 1
            self.rows[:, self.width + 1 :] = 0
        else:
            self.rows = weight.detach().to(dtype)
        self.weight = self.rows[:, : self.width]

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        if self.int8 is not None:
            return self.int8.logits(hidden, out)
        hidden = hidden.to(self.dtype)
        if self.levelled:
            # Tokenizers number frequent words first, so a few rows show about how high the logits reach.
            first = self.weight[: max(self.vocab // 32, 1)]
            level = torch.mm(hidden, first.t()).amax(1)
            hidden = F.pad(hidden, (0, self.rows.shape[1] - self.width))
            hidden[:, self.width] = -level
        torch.mm(hidden, self.rows.t(), out=out)
        return None


class _NoHead(_Head):
    """In the place of a head where logits are given."""

    def __init__(self, logits: Tensor):
        self.dtype = logits.dtype

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        out.copy_(hidden)


class _Pair:
    """Student and teacher logits of one chunk of tokens at a time, in buffers made once.

    Products want many rows, the element-wise work wants to stay in cache: so a chunk is cut into blocks of a few rows.
    """

    def __init__(
        self,
        student_hidden: Tensor,
        student_head: Tensor | None,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        chunk: int,
    ):
        vocab = student_hidden.shape[1] if student_head is None else student_head.shape[0]
        _same_vocabulary(vocab, teacher_head.shape[0])
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it counts the tokens of one pass, so use at least 1.")
        device = student_hidden.device
        self.hidden = student_hidden, teacher_hidden
        if student_head is None:
            self.student = _NoHead(student_hidden)
        else:
            self.student = _Head(student_head, student_hidden)
        self.teacher = _Head(teacher_head, teacher_hidden)
        self.chunk = min(chunk, max(len(student_hidden), 1))
        self.work = _work_dtype(student_hidden)
        self.rows = min(self.chunk, max(_BLOCK_ELEMENTS // vocab, 1)) if device.type == "cpu" else self.chunk
        self.logits = tuple(
            torch.empty(self.chunk, vocab, dtype=head.dtype, device=device) for head in (self.student, self.teacher)
        )
        self.buffers = torch.empty(4, self.rows, vocab, dtype=self.work, device=device)
        self.tokens = slice(0, 0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Per chunk: its tokens and the student's logits, which the caller may overwrite."""
        count = len(self.hidden[0])
        for start in range(0, count, self.chunk):
            self.tokens = slice(start, min(start + self.chunk, count))
            size = self.tokens.stop - start
            self.student.logits(self.hidden[0][self.tokens], self.logits[0][:size])
            self.teacher.logits(self.hidden[1][self.tokens], self.logits[1][:size])
            yield self.tokens, self.logits[0][:size]

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Per block of the present chunk: its tokens, the student's logits, and both logits and two buffers in fp32."""
        start, stop = self.tokens.start, self.tokens.stop
        for first in range(start, stop, self.rows):
            rows = slice(first, min(first + self.rows, stop))
            inside = slice(rows.start - start, rows.stop - start)
            z, w, q, p = self.buffers[:, : rows.stop - first]
            z.copy_(self.logits[0][inside])
            w.copy_(self.logits[1][inside])
            yield rows, self.logits[0][inside], z, w, q, p


def _compare(z: Tensor, w: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From logits z, w: writes q = softmax(z), p = softmax(w), and log q - log p over z. Gives both log-partitions."""
    torch.softmax(z, -1, out=q)
    torch.softmax(w, -1, out=p)
    # The best word's probability is 1 / sum(exp(z - max z)), so the logarithm of one number a row replaces a pass.
    log_z = z.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log_()
    log_w = w.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
    return log_z, log_w, z.sub_(w).add_(log_w - log_z)


def _add_product(total: Tensor, logit_grad: Tensor, hidden: Tensor) -> None:
    """total += logit_grad^T hidden, in tiles of the vocabulary: a 16-bit tile is still in cache when it is added."""
    hidden = hidden.to(logit_grad.dtype)
    tile = max(2**20 // hidden.shape[1], 1)
    for first in range(0, len(total), tile):
        total[first : first + tile].add_(torch.mm(logit_grad[:, first : first + tile].t(), hidden))


def _mean_norm(teacher: Tensor, student: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(_wide(teacher.detach()) - _wide(student), dim=dims).mean()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_work_dtype(tensor))


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def _same_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(
            f"the student's vocabulary has {student} words and the teacher's {teacher}; "
            "distil from a teacher with the student's own tokenizer, or convert the student anew from this teacher."
        )
