"""Neurons into models: dense models to spiking ones, spiking ones to other codes, thresholds folded into weights.

Does: set thresholds from data (by mar.calibration, or from what training found). Does not: train anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mar.calibration import calibrate_threshold, calibration_curve, spend_spikes
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
        raise ValueError("The model already has neurons; `move_neurons` gives it others.")
    config = MarConfig(**{**dense.config.to_dict(), "neurons": neurons})
    spiking = MarForCausalLM(config).to(dense.device)  # type: ignore[arg-type]
    spiking.load_state_dict(dense.state_dict(), strict=False)
    samples = _site_inputs(dense, batches, tokens)
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


@torch.no_grad()
def move_neurons(
    model: MarForCausalLM,
    neurons: dict[str, dict[str, Any]],
    batches: Iterable[dict[str, Tensor]],
    tokens: int = CALIBRATION_TOKENS,
    spike_budget: float | None = None,
) -> MarForCausalLM:
    """A copy of a spiking model with other codes at the same sites: T, `precharge`, and by `spike_budget` fewer spikes.

    Thresholds are those that training found: a neuron starts to fire at the size of input where it did, or, to keep a
    budget, all at one multiple of that; weight columns take the ratio of the factors of least squares from the old
    output and from the new one to the input.

    neurons, batches, tokens: as for `insert_neurons`. spike_budget: most MAC-weighted spikes per input (r·T) on those
    tokens, by what the old neurons see; None leaves each neuron where it fires. Raises ValueError for other sites,
    kinds or shapes of thresholds than the model's, and for neurons without a closed form (`ternary`, or tau not 1).
    """
    old = _neurons(model)
    moved = MarForCausalLM(MarConfig(**{**model.config.to_dict(), "neurons": neurons})).to(model.device)  # type: ignore[arg-type]
    new = _neurons(moved)
    if not old or old.keys() != new.keys():
        raise ValueError(
            f"The model has neurons at {sorted({site for _, site in old})}, the new ones are for {sorted(neurons)}; "
            "move them at the same sites, or insert new ones into the dense model."
        )
    for place, neuron in new.items():
        _check_move(place, old[place].config, neuron.config)
    moved.load_state_dict(model.state_dict())
    samples = _site_inputs(model, batches, tokens)
    for place, neuron in new.items():
        neuron.a.add_(math.log((1 - old[place].config.precharge) / (1 - neuron.config.precharge)))
    if spike_budget is not None:
        macs = {place: sum(linear.weight.numel() for linear in moved.neuron_linears(*place)) for place in new}
        _raise_thresholds(new, samples, macs, spike_budget)
    for place, neuron in new.items():
        current = samples.pop(place).float()
        before, after = (_least_squares_factor(each(current), current) for each in (old[place], neuron))
        for linear in moved.neuron_linears(*place):
            linear.weight.mul_(after / before)
    moved.generation_config = model.generation_config
    return moved.eval()


def _neurons(model: MarForCausalLM) -> dict[Place, Neuron]:
    return {(layer, site): neuron for layer, site, neuron in model.neuron_sites()}


def _check_move(place: Place, old: NeuronConfig, new: NeuronConfig) -> None:
    for name in ("kind", "threshold", "tau"):
        if (was := getattr(old, name)) != (becomes := getattr(new, name)):
            raise ValueError(
                f"{name} at {place[1]} would become {becomes!r} from {was!r}; thresholds carry over to another T or "
                "precharge only, so insert such neurons into the dense model."
            )
    if not has_closed_form(new):
        raise ValueError(
            f"neurons of kind {new.kind!r} with tau {new.tau} have no closed form to move; insert new ones into the "
            "dense model."
        )


def _raise_thresholds(
    neurons: dict[Place, Neuron], samples: dict[Place, Tensor], macs: dict[Place, int], budget: float
) -> None:
    """Multiply all thresholds by the least factor from 1 up that keeps r·T within the budget, found by bisection."""
    if not 0 < budget < math.inf:
        raise ValueError(f"the budget is {budget} spikes per MAC; use a number above 0, such as 1.")

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
    """What brings each channel of (tokens, channels) outputs closest to its input; 1 where it is silent."""
    square = output.square().sum(0, dtype=torch.float64)
    return torch.where(square > 0, (output * current).sum(0, dtype=torch.float64) / square, 1.0).float()


def _site_inputs(model: MarForCausalLM, batches: Iterable[dict[str, Tensor]], tokens: int) -> dict[Place, Tensor]:
    """What a neuron at each layer and site sees, (tokens, channels) in bf16, whether there is one yet or not."""
    if tokens < 1:
        raise ValueError(f"The tokens to calibrate thresholds on are {tokens}; use at least 1.")
    samples: dict[Place, list[Tensor]] = {}
    handles = []
    for layer in range(len(model.model.layers)):
        for site, place in zip(SITES, NEURON_PLACES, strict=True):
            kept = samples.setdefault((layer, site), [])
            module = model.get_submodule(f"model.layers.{layer}.{place}")
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
        raise ValueError("There is no text to calibrate thresholds on; give insert_neurons at least one batch of rows.")
    return {place: torch.cat(kept)[:tokens] for place, kept in samples.items()}


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
