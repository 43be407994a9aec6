"""Thresholds from data: of least squared error, or of least error for a budget of spikes.

Does: search thresholds for samples of what drives a neuron. Does not: collect the samples, or train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mar.config import NeuronConfig
from mar.neurons import TERNARY_LEAK, has_closed_form, merge_spikes, recurrence

CALIBRATION_SAMPLES = {"channel": 1024, "scalar": 2**18}
"""Most magnitudes that are sorted per threshold; more rows than that are thinned evenly."""


class Curve(NamedTuple):
    """Choices of V for each channel, and what they cost: all (channels, choices) but `energy`, (channels,).

    scales: what the output is multiplied by for the least error; 1 for neurons that round. errors: mean
    (scale * output - x)^2. spikes: mean sum_t |s_t|. energy: mean x^2, of what can drive the neuron.
    """

    thresholds: Tensor
    scales: Tensor
    errors: Tensor
    spikes: Tensor
    energy: Tensor


class Spent(NamedTuple):
    """What a site's channels (channels,) got of a budget: V, and the factor on the output that goes with it."""

    threshold: Tensor
    scale: Tensor


def calibrate_threshold(samples: Float[Tensor, "n channels"], config: NeuronConfig) -> Float[Tensor, "thresholds"]:
    """Log-threshold a of least squared reconstruction error, per channel or (`scalar`) one over all of them, in fp32.

    Searches ratios of V to a channel's peak and RMS, then once more, finely, around the best. Any threshold serves a
    channel that never drives its neuron; it takes the median of the others, or V = 1 if there are none.
    Raises ValueError if there are no samples or not all of them are finite.
    """
    samples = _thinned(samples, config)
    threshold = torch.cat([_least_error(block.float(), config) for block in samples.split(64, dim=1)])
    silent = threshold.isnan()
    threshold[silent] = 1.0 if silent.all() else threshold[~silent].median()
    return threshold.log()


def calibration_curve(samples: Float[Tensor, "n channels"], config: NeuronConfig) -> Curve:
    """What each of a range of thresholds costs a channel in error and in spikes: to spend few spikes where they count.

    From codes that mostly saturate to silence. Needs a threshold per channel and tau = 1, or raises ValueError, as it
    does for samples that `calibrate_threshold` refuses. A channel that is always 0 gets choices around V = 1.
    """
    if config.tau != 1 or config.threshold != "channel":
        raise ValueError(
            f"a budget of spikes needs a threshold per channel and tau = 1, but threshold is {config.threshold!r} and "
            f"tau {config.tau}; change them, or leave the budget out."
        )
    blocks = []
    for block in _thinned(samples, config).split(64, dim=1):
        drive = _drive(block.float(), config)
        rms = drive.double().square().mean(0).sqrt().float()
        choices = torch.where(rms > 0, rms, 1.0)[:, None] * torch.logspace(-1.2, 1.0, 40, device=rms.device)
        cross, square, fired = _staircase_sums(drive, config)(choices)
        energy = drive.double().square().sum(0)[:, None]
        # Rounding is unbiased, and its students learn more with the weights they had (docs/lab-log.md); what truncates
        # more than half of a step is too small by a part of V.
        scales = torch.ones_like(cross)
        if config.precharge < 0.5:
            scales = torch.where(square > 0, cross / (choices * square), 1.0)
        error = energy - 2 * scales * choices * cross + (scales * choices).square() * square
        blocks.append((choices, scales, error / len(drive), fired / len(drive), energy[:, 0] / len(drive)))
    return Curve(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def check_budget(budget: float) -> None:
    """Raises ValueError for a budget of spikes per MAC that is not above 0."""
    if not 0 < budget < math.inf:
        raise ValueError(f"the budget is {budget} spikes per MAC; use a number above 0, such as 1.")


def spend_spikes(curves: list[Curve], weights: list[list[Tensor]], budget: float) -> list[Spent]:
    """V and scale of each channel of a whole model, within a budget of spikes per MAC (r·T), at the least error.

    curves: of `calibration_curve`. weights: (outputs, channels) of the linears that each site feeds. A site's error is
    that of its linears' outputs, the channels' own errors taken as uncorrelated, over the outputs' energy; all sites
    count alike. Each channel takes the V of least error + price x spikes, with one price for a MAC in the whole model,
    found by bisection: where spikes bring most, most are spent. Raises ValueError for a budget that is not above 0.
    """
    check_budget(budget)
    errors, spikes, macs = [], [], 0
    for curve, linears in zip(curves, weights, strict=True):
        outputs = sum(len(weight) for weight in linears)
        gain = torch.cat([weight.detach() for weight in linears]).double().square().sum(0)
        errors.append(curve.errors * (gain / (gain * curve.energy).sum().clamp_min(1e-300))[:, None])
        spikes.append(curve.spikes * outputs)
        macs += outputs * len(gain)

    def choose(price: float) -> tuple[list[Tensor], float]:
        picked = [(error + price * cost).argmin(1, keepdim=True) for error, cost in zip(errors, spikes, strict=True)]
        spent = sum(float(cost.gather(1, pick).sum()) for cost, pick in zip(spikes, picked, strict=True))
        return picked, spent / macs

    # Never for nothing, even where the budget would allow it: a scale fits a channel that is rarely or always of one
    # size exactly at every V, and rounding errors would choose among them.
    low, high = 1e-12, 1e6
    for _ in range(60):
        price = math.sqrt(low * high)
        low, high = (price, high) if choose(price)[1] > budget else (low, price)
    picked, _ = choose(high)
    return [
        Spent(curve.thresholds.gather(1, pick)[:, 0], curve.scales.gather(1, pick)[:, 0])
        for curve, pick in zip(curves, picked, strict=True)
    ]


def _thinned(samples: Float[Tensor, "n channels"], config: NeuronConfig) -> Float[Tensor, "rows columns"]:
    """As many samples as a threshold needs, one column a threshold. Raises ValueError for none, or not finite ones."""
    if samples.numel() == 0:
        raise ValueError(f"calibration got samples of shape {tuple(samples.shape)}; pass at least one row.")
    # The sum is one cheap pass; as finite samples can overflow it, only a bad one is looked into.
    if not samples.sum(dtype=torch.float32).isfinite() and not (finite := samples.isfinite()).all():
        bad = f"{int((~finite).sum())} of {samples.numel()} calibration samples"
        raise ValueError(f"{bad} are not finite; find the layer that they come from.")
    rows, channels = samples.shape
    most = CALIBRATION_SAMPLES[config.threshold]
    keep = min(rows, most if config.threshold == "channel" else max(1, most // channels))
    samples = samples.detach()[torch.linspace(0, rows - 1, keep, device=samples.device).long()]
    return samples.reshape(-1, 1) if config.threshold == "scalar" else samples


def _drive(samples: Tensor, config: NeuronConfig) -> Tensor:
    """Magnitudes, which tell all: every kind is odd in its current or silent below zero."""
    return samples.abs() if config.kind != "binary" else samples.clamp(min=0)


def _least_error(samples: Float[Tensor, "n channels"], config: NeuronConfig) -> Float[Tensor, "channels"]:
    """V of least squared error for each column; NaN where no sample can drive the neuron."""
    drive = _drive(samples, config)
    peak = drive.amax(0)
    rms = (torch.linalg.vector_norm(drive, dim=0, dtype=torch.float64) / len(drive) ** 0.5).float()
    error = _staircase_error(drive, config) if config.tau == 1 else _recurrence_error(drive, config)

    def pick(choices: Float[Tensor, "channels choices"]) -> Float[Tensor, "channels"]:
        return choices.gather(1, error(choices).argmin(1, keepdim=True))[:, 0]

    # From a V where even the RMS saturates up to the peak, which fits a constant channel exactly; beyond the peak only
    # neurons whose output differs from a multiple of V can gain.
    levels = config.tau ** torch.arange(config.time_steps, dtype=torch.float64)
    low = 0.5 * rms / (1.0 if config.kind == "ternary" else levels.sum().clamp(max=1e6).item())
    ratio = (peak * (1.0 if has_closed_form(config) else 2.0) / low) ** (1 / 23)
    grid = low[:, None] * ratio[:, None] ** torch.arange(24, device=low.device)
    best = pick(torch.cat([peak[:, None], rms[:, None], grid], 1))
    fine = ratio[:, None] ** torch.linspace(-1, 1, 11, device=low.device)
    best = pick(torch.cat([best[:, None], best[:, None] * fine], 1))
    return torch.where(peak > 0, best, torch.nan)


def _staircase(config: NeuronConfig) -> tuple[list[float], list[float]]:
    """At tau = 1: the values of |I| / V at which the output rises, ascending, and the output / V from there on."""
    steps = config.time_steps
    if config.kind == "ternary":
        # A current fires T // n times if n steps lift the membrane to V / 2: (1 - leak^n) / (1 - leak) I >= V / 2.
        thresholds = [0.5 * (1 - TERNARY_LEAK) / (1 - TERNARY_LEAK**n) for n in range(steps, 0, -1)]
        return thresholds, [(steps // n) / steps for n in range(steps, 0, -1)]
    levels = [float(k) for k in range(1, steps + 1)]
    return [k - config.precharge for k in levels], levels


def _staircase_error(drive: Float[Tensor, "n channels"], config: NeuronConfig) -> Callable[[Tensor], Tensor]:
    """A function of V (channels, choices): the squared error up to sum x^2."""
    sums = _staircase_sums(drive, config)

    def error(v: Float[Tensor, "channels choices"]) -> Float[Tensor, "channels choices"]:
        cross, square, _ = sums(v)
        return v * (v * square - 2 * cross)

    return error


def _staircase_sums(
    drive: Float[Tensor, "n channels"], config: NeuronConfig
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A function of V (channels, choices): sum x L, sum L^2 and spikes, for the output V L(x / V), by few look-ups.

    With M(y) the sum and N(y) the number of the sorted samples from y up, and L rising to L_j at theta_j:
    sum x L = sum_j (L_j - L_{j-1}) M(theta_j V), and so for L^2 and L with N.
    """
    thresholds, levels = (torch.tensor(x, dtype=torch.float64, device=drive.device) for x in _staircase(config))
    before = torch.cat([levels.new_zeros(1), levels[:-1]])
    per_level = config.time_steps if config.kind == "ternary" else 1
    # numpy sorts fp32 with vector instructions, several times faster than torch.sort on a CPU.
    ordered = drive.t().contiguous().cpu()
    ordered.numpy().sort(axis=1)
    x = ordered.to(drive.device)
    below = nn.functional.pad(x.cumsum(1, dtype=torch.float64), (1, 0))

    def sums(v: Float[Tensor, "channels choices"]) -> tuple[Tensor, Tensor, Tensor]:
        edges = (v[:, :, None] * thresholds.float()).flatten(1)
        index = torch.searchsorted(x, edges)
        number = (x.shape[1] - index).view(*v.shape, -1).double()
        total = (below[:, -1:] - below.gather(1, index)).view(number.shape)
        rise = levels - before
        return total @ rise, number @ (levels.square() - before.square()), number @ rise * per_level

    return sums


def _recurrence_error(drive: Float[Tensor, "n channels"], config: NeuronConfig) -> Callable[[Tensor], Tensor]:
    """The same by running the neuron for each choice: slower, and right for any leak."""

    def error(v: Float[Tensor, "channels choices"]) -> Float[Tensor, "channels choices"]:
        outputs = (merge_spikes(recurrence(drive, c, config).spikes, c, config) for c in v.unbind(1))
        return torch.stack([(output - drive).double().square().sum(0) for output in outputs], 1)

    return error
