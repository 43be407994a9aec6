"""Neurons in models: dense models to spiking ones, spiking ones to other codes, thresholds folded into weights.

Does: set thresholds from data (by mar.calibration, or from what training found). Does not: train anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mar.calibration import calibrate_threshold, calibration_curve, check_budget, spend_spikes
from mar.config import SITES, MarConfig, NeuronConfig, Site
from mar.layers import NEURON_PLACES
from mar.model import MarForCausalLM
from mar.neurons import Neuron, fold_threshold, has_closed_form

Place = tuple[int, Site]
"""A neuron's layer and site."""

CALIBRATION_TOKENS = 4096
"""Tokens that threshold calibration looks at per site; the least-error threshold moves little beyond a few thousand."""


@torch.no_grad()
def insert_neurons(
    dense: MarForCausalLM,
    neurons: dict[str, dict[str, Any]],
    batches: Iterable[dict[str, Tensor]],
    tokens: int = CALIBRATION_TOKENS,
    spike_budget: float | None = None,
) -> MarForCausalLM:
    """A spiking copy of a dense MAR model, thresholds set to least squared error on the dense model's own activations.

    neurons: see `mar.config.site_neurons`. batches: rows of token ids; the first `tokens` tokens are used.
    spike_budget: most MAC-weighted spikes per input (r·T) on those tokens, shared out to where they lower the error
    most (`spend_spikes`), each weight column of a neuron that does not round taking the least-squares factor from its
    output to its input; None spends whatever the least error takes and leaves the weights alone.
    """
    if dense.config.neurons is not None:
        raise ValueError("The model already has neurons; use `retune_neurons`, or insert into its dense model.")
    config = MarConfig(**{**dense.config.to_dict(), "neurons": neurons})
    spiking = MarForCausalLM(config).to(dense.device)  # type: ignore[arg-type]
    spiking.load_state_dict(dense.state_dict(), strict=False)
    samples = _site_inputs(dense, list(_neurons(spiking)), batches, tokens)
    curves, weights = [], []
    for layer, site, neuron in spiking.neuron_sites():
        current = samples.pop((layer, site))
        try:
            if spike_budget is None:
                neuron.a.copy_(calibrate_threshold(current, neuron.config))
            else:
                curves.append(calibration_curve(current, neuron.config))
                weights.append([linear.weight for linear in spiking.neuron_linears(layer, site)])
        except ValueError as error:
            raise ValueError(f"Calibrating the neuron of layer {layer}, site {site}: {error}") from error
    if spike_budget is not None:
        chosen = spend_spikes(curves, weights, spike_budget)
        for (_, _, neuron), spent, linears in zip(spiking.neuron_sites(), chosen, weights, strict=True):
            neuron.a.copy_(spent.threshold.log())
            for weight in linears:
                weight.mul_(spent.scale)
    spiking.generation_config = dense.generation_config
    return spiking.eval()


TUNABLE = ("time_steps", "precharge")
"""What of a neuron can change while its threshold keeps its meaning."""


@torch.no_grad()
def retune_neurons(
    model: MarForCausalLM,
    changes: dict[str, dict[str, Any]],
    batches: Iterable[dict[str, Tensor]],
    tokens: int = CALIBRATION_TOKENS,
    spike_budget: float | None = None,
) -> MarForCausalLM:
    """A copy of a spiking model with other codes: another T or `precharge`, and by `spike_budget` fewer spikes.

    Thresholds are those that training found: a neuron starts to fire at the size of input where it did, or, to keep a
    budget, all at one multiple of that. Weight columns take the ratio of the factors of least squares from the old and
    the new output to the input, but for neurons that round and those that are silent on these tokens.

    changes: per site, as {"down_proj": {"time_steps": 16}}; {} for none. batches, tokens: as for `insert_neurons`.
    spike_budget: most MAC-weighted spikes per input (r·T) on those tokens, by what the old neurons see; None leaves
    each neuron where it fires. Raises ValueError for a model without neurons, for sites where it has none, for changes
    of anything else, and for neurons without a closed form (`ternary`, or tau not 1).
    """
    neurons = _tuned(model.config.neurons or {}, changes)
    if spike_budget is not None:
        check_budget(spike_budget)
    tuned = MarForCausalLM(MarConfig(**{**model.config.to_dict(), "neurons": neurons})).to(model.device)  # type: ignore[arg-type]
    tuned.load_state_dict(model.state_dict())
    old, new = _neurons(model), _neurons(tuned)
    samples = _site_inputs(model, list(new), batches, tokens)
    for place, neuron in new.items():
        neuron.a.add_(math.log((1 - old[place].config.precharge) / (1 - neuron.config.precharge)))
    if spike_budget is not None:
        macs = {place: sum(linear.weight.numel() for linear in tuned.neuron_linears(*place)) for place in new}
        _raise_thresholds(new, samples, macs, spike_budget)
    for place, neuron in new.items():
        if min(old[place].config.precharge, neuron.config.precharge) >= 0.5:
            continue  # rounding is unbiased, and weights learn more as they are (docs/lab-log.md)
        current = samples.pop(place).float()
        before, after = (_least_squares_factor(each(current), current) for each in (old[place], neuron))
        for linear in tuned.neuron_linears(*place):
            linear.weight.mul_((after / before).nan_to_num(1.0))
    tuned.generation_config = model.generation_config
    return tuned.eval()


def _neurons(model: MarForCausalLM) -> dict[Place, Neuron]:
    return {(layer, site): neuron for layer, site, neuron in model.neuron_sites()}


def _tuned(neurons: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The neurons of a config with changes, checked."""
    if not neurons:
        raise ValueError("The model has no neurons to retune; insert some first.")
    for site, change in changes.items():
        if site not in neurons:
            raise ValueError(f"There are no neurons at {site!r} to retune; the model has them at {', '.join(neurons)}.")
        if other := sorted(set(change) - set(TUNABLE)):
            raise ValueError(
                f"{other[0]} at {site} cannot change while thresholds are kept, only {' and '.join(TUNABLE)} can; "
                "insert such neurons into the dense model."
            )
    tuned = {site: {**own, **changes.get(site, {})} for site, own in neurons.items()}
    for site, own in tuned.items():
        if not has_closed_form(config := NeuronConfig(**own)):
            raise ValueError(
                f"neurons of kind {config.kind!r} with tau {config.tau} at {site} have no closed form to retune; "
                "insert new ones into the dense model."
            )
    return tuned


def _raise_thresholds(
    neurons: dict[Place, Neuron], samples: dict[Place, Tensor], macs: dict[Place, int], budget: float
) -> None:
    """Multiply all thresholds by the least factor from 1 up that keeps r·T within the budget, found by bisection."""
    start = {place: neuron.a.clone() for place, neuron in neurons.items()}

    def spent(by: float) -> float:
        for place, neuron in neurons.items():
            neuron.a.copy_(start[place] + by)
        counts = [neuron.spike_count(samples[place]).float().mean() * macs[place] for place, neuron in neurons.items()]
        return float(sum(counts)) / sum(macs.values())

    low, high = 0.0, 0.0
    while spent(high) > budget:
        low, high = high, 2 * high + 0.5
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    spent(high)


def _least_squares_factor(output: Tensor, current: Tensor) -> Tensor:
    """What brings each channel of (tokens, channels) outputs closest to its input; NaN where it is silent."""
    return ((output * current).sum(0, dtype=torch.float64) / output.square().sum(0, dtype=torch.float64)).float()


def _site_inputs(
    model: MarForCausalLM, places: list[Place], batches: Iterable[dict[str, Tensor]], tokens: int
) -> dict[Place, Tensor]:
    """What neurons at these layers and sites see, (tokens, channels) in bf16, whether there are any yet or not."""
    if tokens < 1:
        raise ValueError(f"The tokens to calibrate thresholds on are {tokens}; use at least 1.")
    samples: dict[Place, list[Tensor]] = {place: [] for place in places}
    handles = []
    for (layer, site), kept in samples.items():
        module = model.get_submodule(f"model.layers.{layer}.{NEURON_PLACES[SITES.index(site)]}")
        handles.append(module.register_forward_pre_hook(_keep(kept)))
    seen = 0
    try:
        for rows in batches:
            batch = {name: tensor.to(model.device) for name, tensor in rows.items()}
            model.model(input_ids=batch["input_ids"], document_ids=batch.get("document_ids"), use_cache=False)
            seen += batch["input_ids"].numel()
            if seen >= tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("There is no text to calibrate thresholds on; give at least one batch of rows.")
    found = {place: torch.cat(samples.pop(place))[:tokens] for place in places}
    for (layer, site), current in found.items():
        if not current.isfinite().all():
            raise ValueError(
                f"What drives the neuron of layer {layer}, site {site}: not finite; find the layer that it comes from."
            )
    return found


def _keep(samples: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    return lambda _, args: samples.append(args[0].flatten(0, 1).bfloat16())


@torch.no_grad()
def fold_thresholds(model: MarForCausalLM) -> dict[str, Tensor]:
    """Weights that take integer codes: for each linear behind a neuron, W diag(scale), by the weight's name (eq. 4).

    folded @ code equals weight @ neuron(current) up to rounding; runtimes that skip silent inputs read these.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    folded = {}
    for layer, site, neuron in model.neuron_sites():
        for linear in model.neuron_linears(layer, site):
            folded[names[id(linear.weight)]] = fold_threshold(linear.weight, neuron.scale)
    return folded
