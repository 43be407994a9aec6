"""Spiking neurons that turn a linear layer's input into small signed integers.

Each neuron runs an inner loop of T steps per token and carries nothing to the next. ATMN (arXiv 2601.21503, eq. 1-4):

    h_t = I [t = 0] + u_{t-1} / tau         the input current enters at step 0 only
    s_t = +1 if h_t >= V, -1 if h_t <= -V, else 0
    u_t = h_t - s_t V                       soft reset
    V   = exp(a)                            one trainable a per channel

so that I = V sum_t tau^t s_t + tau^(T-1) u_{T-1}. `recurrence` is these lines as written, and the truth. At tau = 1 the
T spikes collapse into the code clamp(trunc(I / V + p sign(I)), -T, T), p being the pre-charge, which `Neuron` computes
in one go. In fp32 the two agree whenever |I| / V differs by more than 1e-5 of its value from every threshold, 1-p..T-p;
nearer than that the roundings of T subtractions and of one division may fall on different sides. At T = 1 without
pre-charge they always agree.

Does: the recurrences, the closed form with its gradient, the module, threshold folding. Does not: find thresholds
(mar.calibration), place neurons in a model, or count energy.

A NaN current gives a NaN output, so that a guard on the loss sees it; where integers are asked for it is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from mar import kernels
from mar.config import NeuronConfig
from mar.surrogate import SURROGATES, ste_range

TERNARY_LEAK = 0.25
CHUNK = 2**18
"""Elements that the closed form works on at a time on a CPU, so that its few fp32 buffers stay in cache."""


class Trace(NamedTuple):
    """What the T steps did: spikes s_t and membrane potentials u_t after the reset, both (T, *current.shape)."""

    spikes: Tensor
    membrane: Tensor


class _Fire(torch.autograd.Function):
    """The firing of one step; backward, the surrogate of a staircase with this one threshold, in units of V."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, config: NeuronConfig) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.config = config
        level = threshold * (1 - _shift_of_step(config))
        spikes = (h >= level).to(h.dtype)
        if _signed(config):
            spikes -= (h <= -level).to(h.dtype)
        return torch.where(h.isnan(), h, spikes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        h, threshold = ctx.saved_tensors
        v = h / threshold
        slope = SURROGATES[ctx.config.surrogate](v, 1, _shift_of_step(ctx.config), _signed(ctx.config))
        grad_h = grads[0] * slope / threshold
        return grad_h, (-grad_h * v).sum_to_size(threshold.shape), None


def recurrence(
    current: Float[Tensor, "*batch channels"], threshold: Float[Tensor, "thresholds"], config: NeuronConfig
) -> Trace:
    """The T steps of one token as the papers write them, in fp32 or better; differentiable through the surrogate.

    `atmn` is eq. 1-4 of arXiv 2601.21503, `binary` the same with the positive spike only; pre-charged, they start from
    u_{-1} = tau sign(I) p V instead of 0, p being `precharge`. `ternary` is Guo et al. (AAAI 2024): u <- 0.25 u + I at
    every step, a spike where |u| >= V / 2, hard reset u <- u (1 - |s|). threshold: V, one per channel or one for all.
    """
    current = current.to(torch.promote_types(current.dtype, torch.float32))
    membrane = torch.zeros_like(current)
    if config.precharge:
        membrane = config.tau * current.sign() * (config.precharge * threshold)
    spikes, membranes = [], []
    for t in range(config.time_steps):
        if hard_reset := config.kind == "ternary":
            h = TERNARY_LEAK * membrane + current
        else:
            h = membrane / config.tau + (current if t == 0 else 0)
        s = _Fire.apply(h, threshold, config)
        membrane = h * (1 - s.abs()) if hard_reset else h - s * threshold
        spikes.append(s)
        membranes.append(membrane)
    return Trace(torch.stack(spikes), torch.stack(membranes))


def merge_spikes(
    spikes: Float[Tensor, "steps *batch channels"], threshold: Float[Tensor, "thresholds"], config: NeuronConfig
) -> Float[Tensor, "*batch channels"]:
    """The linear layer's input: V sum_t tau^t s_t (`weighted`), V sum_t s_t (`sum`), or V / T sum_t s_t (ternary)."""
    if config.merge == "weighted" and config.tau != 1:
        powers = config.tau ** torch.arange(config.time_steps, dtype=spikes.dtype, device=spikes.device)
        spikes = spikes * powers.view(-1, *[1] * (spikes.ndim - 1))
    return spikes.sum(0) * _emission(threshold, config)


def _signed(config: NeuronConfig) -> bool:
    return config.kind != "binary"


def _shift_of_step(config: NeuronConfig) -> float:
    """How far below V one step already fires, in units of V."""
    return 0.5 if config.kind == "ternary" else 0.0


def _emission(threshold: Tensor, config: NeuronConfig) -> Tensor:
    return threshold / config.time_steps if config.kind == "ternary" else threshold


def has_closed_form(config: NeuronConfig) -> bool:
    """Whether the T spikes of this neuron are I / V made a whole number in one go."""
    return config.kind != "ternary" and config.tau == 1


def closed_form(
    current: Float[Tensor, "*batch channels"],
    threshold: Float[Tensor, "thresholds"],
    config: NeuronConfig,
    out: Float[Tensor, "*batch channels"] | None = None,
) -> Float[Tensor, "*batch channels"]:
    """The code sum_t s_t at tau = 1, as fp32: (I + p V sign(I)) / V truncated, then clamped, p being `precharge`.

    current must be fp32, for a quotient rounded to bf16 jumps over thresholds; it is divided, since its product with
    1 / V can miss an exact multiple of V. `out` may be `current` itself.
    """
    if config.precharge:
        current = torch.add(current, torch.copysign(config.precharge * threshold, current), out=out)
    # Not torch.trunc: on CPU (torch 2.13) it runs 50 times slower than this fused division.
    code = torch.div(current, threshold, rounding_mode="trunc", out=out)
    return code.clamp_(-config.time_steps if _signed(config) else 0, config.time_steps)


class _ClosedForm(torch.autograd.Function):
    """V code(I / V) in one go. Backward it treats the output as V (S(I / V) + r), r being the frozen rest code - S:

        d/dI = S'(v),    d/dV = code - S'(v) v,    v = I / V.

    Saves the current in its own dtype and the threshold; works in fp32 chunks that fit the cache.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, config: NeuronConfig) -> Tensor:
        ctx.save_for_backward(current, threshold)
        ctx.config = config
        rows = current.reshape(-1, current.shape[-1])
        output = torch.empty_like(rows)
        height = _chunk_rows(rows)
        buffer = rows.new_empty(height, rows.shape[1], dtype=torch.float32)
        for chunk, result in zip(rows.split(height), output.split(height), strict=True):
            code = buffer[: len(chunk)].copy_(chunk)
            closed_form(code, threshold, config, out=code)
            result.copy_(code.mul_(threshold))
        return output.view(current.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        current, threshold = ctx.saved_tensors
        config: NeuronConfig = ctx.config
        needs_current, needs_threshold, _ = ctx.needs_input_grad
        rows = current.reshape(-1, current.shape[-1])
        grad_current = torch.empty_like(rows)
        height = _chunk_rows(rows)
        buffers = rows.new_empty(3, height, rows.shape[1], dtype=torch.float32)
        # One sum per row of a chunk, so that adding up a column costs no pass of its own.
        sums = rows.new_zeros(height, rows.shape[1], dtype=torch.float32)
        chunks = zip(*(x.split(height) for x in (rows, grads[0].reshape(rows.shape), grad_current)), strict=True)
        for chunk, grad_chunk, result in chunks:
            v, code, grad = buffers[:, : len(chunk)]
            v.copy_(chunk)
            grad.copy_(grad_chunk)
            if needs_threshold:
                closed_form(v, threshold, config, out=code)
                sums[: len(chunk)].addcmul_(code, grad)
            v.div_(threshold)
            _pass_through(grad, v, config)
            result.copy_(grad)
            if needs_threshold:
                sums[: len(chunk)].addcmul_(grad, v, value=-1)
        return (
            grad_current.view(current.shape) if needs_current else None,
            sums.sum(0).sum_to_size(threshold.shape) if needs_threshold else None,
            None,
        )


def _chunk_rows(rows: Tensor) -> int:
    fitting = CHUNK // rows.shape[1] if rows.device.type == "cpu" else len(rows)
    return max(1, min(len(rows), fitting))


def _pass_through(grad: Tensor, v: Tensor, config: NeuronConfig) -> None:
    """grad <- grad S'(v)."""
    if config.surrogate == "ste":
        low, high = ste_range(config.time_steps, _signed(config))
        torch.ops.aten.hardtanh_backward(grad, v, low, high, grad_input=grad)
    else:
        grad.mul_(SURROGATES[config.surrogate](v, config.time_steps, config.precharge, _signed(config)))


class Neuron(nn.Module):
    """One site's neurons: `channels` of them, with log-threshold(s) `a`, the only parameter (starts at 0, so V = 1).

    forward maps a current (..., channels) to the linear layer's input, in the same shape and dtype, with thresholds and
    comparisons in fp32. At tau = 1 the output is the fp32 product `scale * encode(current)`, rounded to that dtype.
    """

    def __init__(self, config: NeuronConfig, channels: int) -> None:
        super().__init__()
        if config.surrogate not in SURROGATES:
            raise ValueError(f"surrogate is {config.surrogate!r}; use one of {', '.join(map(repr, SURROGATES))}.")
        if config.kind == "ternary" and (config.precharge or config.tau != 1):
            raise ValueError(
                f"the ternary neuron has a fixed leak of {TERNARY_LEAK} and no pre-charge, but tau is {config.tau} and "
                f"precharge is {config.precharge}; leave them at 1 and 0."
            )
        self.config = config
        self.channels = channels
        self.a = nn.Parameter(torch.zeros(channels if config.threshold == "channel" else 1))

    @property
    def threshold(self) -> Float[Tensor, "thresholds"]:
        """V = exp(a), fp32, one per channel or one."""
        return self.a.float().exp()

    @property
    def scale(self) -> Float[Tensor, "thresholds"]:
        """What one spike is worth: V, or V / T of a ternary neuron."""
        return _emission(self.threshold, self.config)

    def forward(self, current: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """The merged spikes, differentiable in `current` and `a`."""
        self._check(current)
        output = self._output(current, self.threshold)
        return kernels.note_spikes(output, self.scale, self.config.time_steps) if self.config.tau == 1 else output

    def _output(self, current: Tensor, threshold: Tensor) -> Tensor:
        if has_closed_form(self.config):
            if self.config.surrogate == "ste" and kernels.staircase_takes(current):
                passing = ste_range(self.config.time_steps, _signed(self.config))
                return kernels.staircase(current, threshold, self._codes(), passing, self.config.precharge)
            return _ClosedForm.apply(current, threshold, self.config)
        spikes = recurrence(current, threshold, self.config).spikes
        return merge_spikes(spikes, threshold, self.config).to(current.dtype)

    @torch.no_grad()
    def encode(self, current: Float[Tensor, "*batch channels"]) -> Int8[Tensor, "*batch channels"]:
        """The code sum_t s_t, in [-T, T]. Raises ValueError if a current is NaN."""
        self._check(current)
        if has_closed_form(self.config):
            return _to_int8(closed_form(current.float(), self.threshold, self.config))
        return _to_int8(recurrence(current, self.threshold, self.config).spikes.sum(0))

    @torch.no_grad()
    def spike_train(self, current: Float[Tensor, "*batch channels"]) -> Int8[Tensor, "steps *batch channels"]:
        """Each s_t by the recurrence. Raises ValueError if a current is NaN."""
        self._check(current)
        return _to_int8(recurrence(current, self.threshold, self.config).spikes)

    def spike_count(self, current: Float[Tensor, "*batch channels"]) -> Int8[Tensor, "*batch channels"]:
        """Spikes spent per element, sum_t |s_t|: the size of the code, as all spikes have the sign of their current."""
        return self.encode(current).abs()

    def mean_spikes(self, current: Float[Tensor, "*batch channels"]) -> Float[Tensor, ""]:
        """Spikes spent per element, exact; differentiable in `current` and `a`, with the gradient of |I| / V cut at T.

        Raises ValueError if a current is NaN.
        """
        if has_closed_form(self.config) and kernels.staircase_takes(current):
            self._check(current)
            spent = kernels.mean_spikes(current, self.threshold, self._codes(), self.config.precharge)
            _refuse_nan(spent)
            return spent
        level = current.float() / self.threshold
        level = (level.abs() if _signed(self.config) else level.relu()).clamp(max=self.config.time_steps)
        return (level + (self.spike_count(current) - level.detach())).mean()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"channels={self.channels}, {self.config}"

    def _codes(self) -> tuple[float, float]:
        """The outermost ones."""
        return -float(self.config.time_steps) if _signed(self.config) else 0.0, float(self.config.time_steps)

    def _check(self, current: Tensor) -> None:
        if current.shape[-1] != self.channels:
            raise ValueError(
                f"the neuron has {self.channels} channels but its current has {current.shape[-1]}; build it with the "
                "input width of the linear layer that it feeds."
            )


def _to_int8(spikes: Tensor) -> Tensor:
    _refuse_nan(spikes.sum())
    return spikes.to(torch.int8)


def _refuse_nan(total: Tensor) -> None:
    if total.isnan():
        raise ValueError("the current holds NaN, which no spike code can say; find the layer that it comes from.")


def build_neuron(config: NeuronConfig, channels: int) -> Neuron:
    """The neuron of one site. Raises ValueError for an unknown surrogate and for settings that its kind cannot have."""
    return Neuron(config, channels)


def fold_threshold(
    linear_weight: Float[Tensor, "outputs channels"], scale: Float[Tensor, "thresholds"]
) -> Float[Tensor, "outputs channels"]:
    """W diag(scale), in fp32 or better: takes codes where `linear_weight` takes a neuron's output (tau = 1)."""
    return linear_weight * scale.to(torch.promote_types(linear_weight.dtype, torch.float32))
