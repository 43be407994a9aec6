"""Neurons into models: calibrated into dense ones, moved in spiking ones, folded into weights."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mar.config import SITES, NeuronConfig, site_neurons
from mar.conversion import calibrate_mixers, convert_llama
from mar.insertion import fold_thresholds, insert_neurons, retune_neurons
from mar.layers import captured
from mar.losses import forward_kl
from mar.model import MarForCausalLM
from mar.neurons import build_neuron
from mar.spikes import SpikeMonitor
from tiny_models import llama_model, mar_model, packed_rows, rms_ratio


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [packed_rows(((40, 24), (64,)), seed=10 + i) for i in range(count)]


def test_fine_neurons_nearly_reproduce_the_dense_model():
    """127 levels with rounding leave next to nothing, on text other than calibration's; fewer levels leave more."""
    teacher, held_out = llama_model(), packed_rows(seed=1)
    dense = convert_llama(teacher)
    calibrate_mixers(dense, teacher, packed_rows(seed=2))
    expected = dense(**held_out).logits
    distances = []
    for time_steps in (4, 16, 127):
        neurons = site_neurons(NeuronConfig(time_steps=time_steps, precharge=0.5))
        spiking = insert_neurons(dense, neurons, batches())
        distances.append(forward_kl(expected, spiking(**held_out).logits).mean().item())
    assert distances[0] > 4 * distances[1] > 16 * distances[2] > 0
    assert distances[2] < 0.01


def test_a_spiking_model_differs_from_its_dense_one_in_neurons_only():
    dense = mar_model(tie_word_embeddings=True, mlp_bias=True, bc_norm="none")
    dense.generation_config.eos_token_id = [2, 5]
    neurons = site_neurons(NeuronConfig(), sites=("in_proj", "down_proj"))
    spiking = insert_neurons(dense, neurons, batches())
    assert [site for _, site, _ in spiking.neuron_sites()] == ["in_proj", "down_proj"] * 2
    weights = dense.state_dict()
    for name, weight in spiking.state_dict().items():
        assert name.endswith(".a") if name not in weights else torch.equal(weight, weights[name]), name
    assert weights.keys() <= spiking.state_dict().keys()
    assert spiking.generation_config.eos_token_id == [2, 5]
    assert not spiking.training
    assert dense.config.neurons is None
    assert {**spiking.config.to_dict(), "neurons": None} == dense.config.to_dict()
    assert not any(module._forward_pre_hooks for module in dense.modules())


def test_thresholds_are_calibrated_per_channel_on_the_dense_models_activations():
    """A channel that is three times as large gets a threshold three times as large."""
    dense = mar_model()
    for layer in dense.model.layers:
        layer.input_layernorm.weight.data[5] = 3 * layer.input_layernorm.weight.data[6].abs()
    spiking = insert_neurons(dense, site_neurons(NeuronConfig()), batches())
    for layer, site, neuron in spiking.neuron_sites():
        assert neuron.a.shape == (neuron.channels,)
        assert neuron.a.std() > 0.01, (layer, site)
        block: Any = dense.model.layers[layer]
        place = block.mixer.in_neuron if site == "in_proj" else dense.neuron_linears(layer, site)[0]
        with captured([place], inputs=True) as inputs, torch.no_grad():
            for batch in batches():
                dense(**batch)
        current = torch.cat([part.flatten(0, 1) for part in inputs]).detach()

        def error(factor: float, neuron=neuron, current=current) -> float:
            moved = build_neuron(neuron.config, neuron.channels)
            moved.a.data = neuron.a.detach() + math.log(factor)
            return rms_ratio(moved(current), current)

        assert error(1) < min(error(0.6), error(1.6)), (layer, site)


@pytest.mark.parametrize("precharge", [0.0, 0.25])
def test_within_a_budget_weights_make_good_for_what_truncation_takes(precharge):
    dense = mar_model()
    neurons = site_neurons(NeuronConfig(time_steps=8, precharge=precharge))
    spiking = insert_neurons(dense, neurons, batches(), tokens=96, spike_budget=0.5)
    current = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(next(iter(batches()))["input_ids"]))
    neuron = spiking.model.layers[0].mixer.in_neuron
    (own,), (scaled,) = (model.neuron_linears(0, "in_proj") for model in (dense, spiking))
    wanted = own(current)
    assert rms_ratio(scaled(neuron(current)), wanted) < rms_ratio(own(neuron(current)), wanted)


def test_a_budget_of_spikes_is_kept_on_the_text_it_was_set_on():
    dense = mar_model()
    neurons = site_neurons(NeuronConfig(time_steps=8, precharge=0.5))
    rates = {}
    for budget in (None, 0.8, 0.3):
        spiking = insert_neurons(dense, neurons, batches(), tokens=96, spike_budget=budget)
        with SpikeMonitor(spiking) as monitor, torch.no_grad():
            spiking(**next(iter(batches())))
        rates[budget] = monitor.summary().totals.spikes_per_mac
    assert rates[None] > rates[0.8] > rates[0.3]
    # The neurons were set on the dense model's activations, which the codes of earlier layers move.
    assert rates[0.3] == pytest.approx(0.3, rel=0.3)
    with pytest.raises(ValueError, match="layer 0, site in_proj: a budget of spikes needs"):
        insert_neurons(dense, site_neurons(NeuronConfig(tau=2.0)), batches(), spike_budget=1.0)


def test_a_scalar_threshold_per_site():
    spiking = insert_neurons(mar_model(), site_neurons(NeuronConfig(threshold="scalar")), batches())
    thresholds = [neuron.a for _, _, neuron in spiking.neuron_sites()]
    assert {a.shape for a in thresholds} == {(1,)}
    assert len({a.item() for a in thresholds}) == len(thresholds)


def test_only_as_much_text_is_read_as_calibration_needs():
    read = []

    def rows():
        for batch in batches(10):
            read.append(batch)
            yield batch

    insert_neurons(mar_model(), site_neurons(NeuronConfig()), rows(), tokens=200)
    assert len(read) == 2


def test_inserting_neurons_needs_text_and_a_dense_model():
    neurons = site_neurons(NeuronConfig())
    with pytest.raises(ValueError, match="no text to calibrate thresholds on; give at least one batch"):
        insert_neurons(mar_model(), neurons, [])
    for tokens in (0, -1):
        with pytest.raises(ValueError, match=f"thresholds on are {tokens}; use at least 1"):
            insert_neurons(mar_model(), neurons, [], tokens)
    with pytest.raises(ValueError, match="already has neurons; use `retune_neurons`, or insert"):
        insert_neurons(mar_model(neurons=neurons), neurons, batches())


def test_activations_that_are_not_finite_name_their_site():
    dense = mar_model()
    dense.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"neuron of layer 1, site down_proj: .*not finite"):
        insert_neurons(dense, site_neurons(NeuronConfig()), batches())
    spiking = spiking_model()
    spiking.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"neuron of layer 1, site down_proj: .*not finite"):
        retune_neurons(spiking, {}, batches())


EIGHT = NeuronConfig(time_steps=8, precharge=0.25)


def spiking_model(config: NeuronConfig = EIGHT, sites: tuple[str, ...] = SITES) -> MarForCausalLM:
    return insert_neurons(mar_model(), site_neurons(config, sites=sites), batches(), tokens=96)


def spikes_per_mac(model: MarForCausalLM) -> float:
    with SpikeMonitor(model) as monitor, torch.no_grad():
        model(**next(iter(batches())))
    return monitor.summary().totals.spikes_per_mac


def first_input(model: MarForCausalLM) -> Tensor:
    """What the neurons before layer 0's in_proj see, whatever these are."""
    with captured([model.model.layers[0].mixer.in_neuron], inputs=True) as inputs, torch.no_grad():
        model(**next(iter(batches())))
    return inputs[0].detach()


@pytest.mark.parametrize("budget", [None, 10.0])
def test_neurons_retuned_to_what_they_are_leave_a_model_as_it_is(budget):
    model = spiking_model()
    tuned = retune_neurons(model, {}, batches(), spike_budget=budget)
    assert tuned is not model
    assert tuned.config.to_dict() == model.config.to_dict()
    for (name, new), (_, old) in zip(tuned.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(new, old), name
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["atmn", "binary"])
@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_retuned_neurons_fire_where_they_did_and_weights_keep_what_they_stood_for(kind, threshold):
    config = NeuronConfig(kind, time_steps=8, precharge=0.5, threshold=threshold)
    model = spiking_model(config, ("in_proj", "down_proj"))
    model.generation_config.eos_token_id = [2, 5]
    changes = {"in_proj": {"time_steps": 12, "precharge": 0.25}, "down_proj": {"time_steps": 16}}
    tuned = retune_neurons(model, changes, batches(), tokens=96)
    assert tuned.generation_config.eos_token_id == [2, 5]
    assert tuned.config.neurons == {site: {**own, **changes[site]} for site, own in model.config.neurons.items()}
    for (layer, site, new), (_, _, old) in zip(tuned.neuron_sites(), model.neuron_sites(), strict=True):
        fires = [(1 - neuron.config.precharge) * neuron.threshold for neuron in (old, new)]
        assert torch.allclose(*fires, rtol=1e-6), (layer, site)
    current, (old, new) = first_input(model), (each.model.layers[0].mixer for each in (model, tuned))
    with torch.no_grad():
        wanted = F.linear(old.in_neuron(current), old.in_proj.weight)
        distances = [
            rms_ratio(F.linear(new.in_neuron(current), weight), wanted)
            for weight in (new.in_proj.weight, old.in_proj.weight)
        ]
    assert distances[0] < distances[1]
    assert torch.equal(new.out_proj.weight, old.out_proj.weight)
    # Both of these round.
    down, before = (each.model.layers[0].mlp.down_proj.weight for each in (tuned, model))
    assert torch.equal(down, before)


def test_weights_of_channels_that_are_silent_before_or_after_stay():
    model = spiking_model()
    model.model.layers[0].mixer.in_neuron.a.data[:3] += torch.tensor([0.0, 20.0, 20.0])
    current = first_input(model)
    peak = (current.abs().amax((0, 1)) / model.model.layers[0].mixer.in_neuron.threshold).log()
    tuned = retune_neurons(model, {}, batches(), tokens=96, spike_budget=0.2)
    raised = (tuned.model.layers[0].mixer.in_neuron.a - model.model.layers[0].mixer.in_neuron.a).detach()
    silent = (peak - raised).exp() < 1 - EIGHT.precharge
    assert silent[1:3].all()
    assert not silent.all()
    new, old = (each.model.layers[0].mixer.in_proj.weight for each in (tuned, model))
    assert torch.equal(new[:, silent], old[:, silent])
    assert not torch.equal(new[:, ~silent], old[:, ~silent])


def test_a_spiking_model_can_do_with_fewer_spikes():
    model = spiking_model()
    tuned = retune_neurons(model, {"down_proj": {"time_steps": 16}}, batches(), tokens=96, spike_budget=0.3)
    assert spikes_per_mac(model) > 0.6
    # By what the old neurons saw, which the codes of earlier layers move.
    assert spikes_per_mac(tuned) == pytest.approx(0.3, rel=0.3)
    raised = [new.a - old.a for (*_, new), (*_, old) in zip(tuned.neuron_sites(), model.neuron_sites(), strict=True)]
    assert torch.cat(raised).std() < 1e-5
    assert raised[0][0] > 0.1


@pytest.mark.parametrize(
    ("model", "changes", "problem"),
    [
        (mar_model, {}, "has no neurons to retune; insert some first"),
        (
            lambda: spiking_model(sites=("in_proj",)),
            {"gate_up": {"time_steps": 4}},
            "no neurons at 'gate_up' to retune; the model has them at in_proj",
        ),
        (
            spiking_model,
            {"out_proj": {"threshold": "scalar"}},
            "threshold at out_proj cannot change while",
        ),
        (spiking_model, {"in_proj": {"time_steps": 200}}, "time_steps is 200; a code has 8 bits"),
        (
            lambda: spiking_model(NeuronConfig(kind="ternary")),
            {},
            "kind 'ternary' with tau 1.0 at in_proj have no",
        ),
        (lambda: spiking_model(NeuronConfig(tau=2.0)), {}, "kind 'atmn' with tau 2.0 at in_proj have no closed"),
    ],
)
def test_neurons_that_cannot_be_retuned_say_why(model, changes, problem):
    with pytest.raises(ValueError, match=problem):
        retune_neurons(model(), changes, batches())


@pytest.mark.parametrize("budget", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match=f"the budget is {budget} spikes per MAC; use a number above 0"):
        retune_neurons(spiking_model(), {}, [], spike_budget=budget)


@pytest.mark.parametrize("threshold", ["channel", "scalar"])
def test_folded_weights_take_codes_where_weights_take_spikes(threshold):
    spiking = insert_neurons(
        mar_model(), site_neurons(NeuronConfig(threshold=threshold), {"down_proj": {"time_steps": 16}}), batches()
    )
    folded = fold_thresholds(spiking)
    names = {id(parameter): name for name, parameter in spiking.named_parameters()}
    used = []
    for layer, site, neuron in spiking.neuron_sites():
        current = torch.randn(7, neuron.channels)
        for linear in spiking.neuron_linears(layer, site):
            name = names[id(linear.weight)]
            used.append(name)
            expected = F.linear(neuron(current), linear.weight)
            assert rms_ratio(neuron.encode(current).float() @ folded[name].T, expected) < 1e-6
    assert sorted(used) == sorted(folded)
    assert len(used) == 2 * (len(SITES) + 1)


def test_a_dense_model_has_nothing_to_fold():
    assert fold_thresholds(mar_model()) == {}
