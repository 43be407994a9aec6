"""Linear layers whose three products run in int8, for training on a CPU: y = x W^T, and the gradients of x and W.

Does: round both sides of each product to 8 bits with scales by rows and columns, on the native core; sums are exact and
results fp32. Where a neuron gave x, its codes are whole numbers and only weights are rounded. Does not: keep anything
between calls, or decide where it pays (mar.precision does). The rounding is passed straight through backward.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mar.kernels.native import Call, core, dense_rows

WIDTH = 32
"""Inputs and outputs come in so many."""

SPIKES = "_mar_spikes"
"""The attribute of a tensor with what `note_spikes` noted."""

LARGEST = 127
TINY = 1e-5
TINIEST = 1e-30
"""Least size of an input, and of a gradient, that counts where scales are formed."""

LONGEST = 2**16
"""The most numbers that a product sums over: so many of 255 times 127 fit 32 bits."""

QUAD = 4
"""Tokens come in so many, as the gradient of W sums over them."""


_entered: list[TorchFunctionMode] = []


class Int8Products(TorchFunctionMode):
    """While it is entered, every linear layer that `takes` its tensors runs in int8, and the heads' products of
    `mar.losses` on their way forward; all else stays as it is.

    What gradient checkpointing computes again within `backward` stays too, as torch suspends a mode there: MarModel
    refuses the two together."""

    def __enter__(self) -> Self:
        _entered.append(self)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        _entered.pop()
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stands for the torch function `func`."""
        given = kwargs or {}
        return _linear_or_not(*args, **given) if func is F.linear else func(*args, **given)


def _linear_or_not(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not takes(input, weight):
        return F.linear(input, weight, bias)
    y = linear(input, weight, getattr(input, SPIKES, None))
    return y if bias is None else y + bias


def note_spikes(x: Tensor, scale: Tensor, steps: int) -> Tensor:
    """x itself, with a note for linear layers: its inputs are codes of -steps to steps times `scale`."""
    setattr(x, SPIKES, (scale, steps))
    return x


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear of this weight can multiply x in int8. Under autocast none does, as it wants another dtype."""
    return (
        core is not None
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and weight.stride(1) == 1
        and all(size % WIDTH == 0 for size in weight.shape)
        and x.numel() * weight.numel() > 0
        and x.numel() // x.shape[-1] % QUAD == 0
        and max(x.numel() // x.shape[-1], *weight.shape) <= LONGEST
    )


def linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "outputs inputs"],
    spikes: tuple[Float[Tensor, "scales"], int] | None = None,
) -> Float[Tensor, "*batch outputs"]:
    """x W^T, for tensors that `takes` accepts; differentiable in x and W.

    spikes: the scale, one for each input or one for all, and T, where x is codes of -T to T times that scale, T at most
    127: x is then exact, as the scales are folded into W. Without it each input of x is first divided, and of W
    multiplied, by sqrt(max |x|) of what is given here (SmoothQuant, arXiv 2211.10438, eq. 4 with a half, but for the
    sizes of W, which change little here and cost a pass), then each token rounded with its own scale.
    """
    return _Int8Linear.apply(x, weight, spikes)  # type: ignore[return-value]


def _channels(rows: Tensor, spikes: tuple[Tensor, int] | None) -> Tensor:
    """What each input of x is divided and of W multiplied by."""
    if spikes is None:
        return _maxima(rows).clamp_(min=TINY).sqrt_()
    scale, steps = spikes[0].detach().expand(rows.shape[1]), spikes[1]
    # Codes take over a whole factor of the largest scales, as in `mar.compact.row_multipliers`: their columns would set
    # every output's scale and leave few levels to all others.
    most = LARGEST // steps
    return scale / (scale * (most / scale.max())).ceil_().clamp_(1, most)


def _maxima(rows: Tensor) -> Tensor:
    """Largest |x| of each column."""
    found = torch.empty(rows.shape[1])
    Call("Int8Rows", rows=len(rows), columns=rows.shape[1], stride=rows.stride(0), input=rows, scales=found).run(
        "int8_maxima"
    )
    return found


def _rounded(rows: Tensor, by: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of each row of x * by, their scales and sums."""
    codes = torch.empty(rows.shape, dtype=torch.int8)
    scales, sums = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
    call = Call("Int8Rows", rows=len(rows), columns=rows.shape[1], stride=rows.stride(0), whole=whole)
    call.set(input=rows, by=by, codes=codes, scales=scales, sums=sums)
    call.run("int8_rows")
    return codes, scales, sums


def _weights(weight: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of each output of weight * by in panels, for x W^T, and their scales."""
    outputs, inputs = weight.shape
    panels, scales = torch.empty(outputs * inputs, dtype=torch.uint8), torch.empty(outputs)
    call = Call("Int8Weights", outputs=outputs, inputs=inputs, stride=weight.stride(0), weight=weight, by=by)
    call.set(scales=scales, panels=panels, scratch=torch.empty(outputs // WIDTH * inputs, dtype=torch.int8))
    call.run("int8_weights")
    return panels, scales


def _turned(rows: Tensor, by: Tensor, weights: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of each column of rows * by, by of each row, in panels, off by 128 if `weights`; their scales and sums."""
    count, columns = rows.shape
    panels = torch.empty(count * columns, dtype=torch.uint8)
    scales, sums = torch.empty(columns), torch.empty(columns, dtype=torch.int32)
    call = Call("Int8Turned", rows=count, columns=columns, stride=rows.stride(0), weights=weights)
    call.set(input=rows, by=by, scales=scales, sums=sums, panels=panels)
    call.run("int8_turned")
    return panels, scales, sums


def _product(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    panels: Tensor,
    column_scales: Tensor,
    out: Tensor,
    turned: bool = False,
) -> Tensor:
    """The codes' rows, in panels if `turned`, times the panels' columns: into `out`, which it returns."""
    rows, columns = out.shape
    call = Call("Int8Product", rows=rows, columns=columns, inner=panels.numel() // columns, stride=out.stride(0))
    call.set(turned=turned, codes=codes, scales=scales, sums=sums, panels=panels, column_scales=column_scales, out=out)
    call.run("int8_product")
    return out


class Head:
    """The logits of an output head in int8, for hidden states of which all are known beforehand."""

    def __init__(self, weight: Float[Tensor, "words d"], hidden: Float[Tensor, "n d"]) -> None:
        channel = _channels(dense_rows(hidden), None)
        self.weight = _weights(weight, channel)
        self.inverse = channel.reciprocal()

    def logits(self, hidden: Float[Tensor, "n d"], out: Float[Tensor, "n words"]) -> None:
        """Of some of the hidden states, into `out`."""
        _product(*_rounded(dense_rows(hidden), self.inverse, whole=False), *self.weight, out)


def entered() -> bool:
    """Whether `Int8Products` is."""
    return bool(_entered)


def head(weight: Float[Tensor, "words d"], hidden: Float[Tensor, "n d"]) -> Head | None:
    """The head in int8, if `Int8Products` is entered and it can be."""
    return Head(weight.detach(), hidden.detach()) if entered() and takes(hidden, weight) else None


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, spikes: tuple[Tensor, int] | None) -> Tensor:
        outputs, inputs = weight.shape
        rows = dense_rows(x.reshape(-1, inputs))
        channel = _channels(rows, spikes)
        codes, scales, sums = _rounded(rows, channel.reciprocal(), whole=spikes is not None)
        ctx.save_for_backward(codes, scales, channel, weight)
        y = _product(codes, scales, sums, *_weights(weight, channel), torch.empty(len(rows), outputs))
        return y.view(*x.shape[:-1], outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, scales, channel, weight = ctx.saved_tensors
        (tokens, inputs), outputs = codes.shape, len(weight)
        gradient = dense_rows(grads[0].reshape(tokens, outputs))
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = dweight = None
        if needs_x:
            # Rounded anew, and not as forward: a column of W that large inputs made large would leave few levels to all
            # others. Large outputs of the gradient hand over half of their size, as inputs do forward.
            sizes = _maxima(gradient).clamp_(min=TINIEST).sqrt_()
            panels, column_scales, _ = _turned(weight, sizes, weights=True)
            rounded = _rounded(gradient, sizes.reciprocal(), whole=False)
            dx = _product(*rounded, panels, column_scales, torch.empty(tokens, inputs))
            dx = dx.view(*grads[0].shape[:-1], inputs)
        if needs_weight:
            # The sum runs over tokens, so their scales go into the gradient before it is rounded.
            turned, row_scales, sums = _turned(gradient, scales, weights=False)
            panels = torch.empty(inputs * tokens, dtype=torch.uint8)
            Call("Int8Turned", rows=tokens, columns=inputs, stride=inputs, codes=codes, panels=panels).run(
                "int8_turned"
            )
            dweight = _product(turned, row_scales, sums, panels, channel, torch.empty(outputs, inputs), turned=True)
        return dx, dweight, None
