"""The monitor counts what a pass by hand counts, leaves padding out, changes nothing and goes away."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar.census import census
from mar.config import SITES, MarConfig, NeuronConfig, site_neurons
from mar.costs import cost
from mar.model import MarForCausalLM
from mar.neurons import build_neuron
from mar.spikes import SiteSpikes, SpikeMonitor, totals

FED = {"in_proj": 1, "out_proj": 1, "gate_up": 2, "down_proj": 1}


def config(neurons, hidden=12, layers=2) -> MarConfig:
    return MarConfig(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=20,
        num_hidden_layers=layers,
        num_heads=3,
        head_dim=4,
        state_size=4,
        chunk_size=4,
        neurons=neurons,
    )


def spiking_model(neuron: NeuronConfig | None = None, sites=SITES, threshold=0.2, **shape) -> MarForCausalLM:
    torch.manual_seed(0)
    model = MarForCausalLM(config(site_neurons(neuron or NeuronConfig(time_steps=3), sites=sites), **shape)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim == 2):
            parameter.normal_(std=0.5)
        for _, _, site in model.neuron_sites():
            site.a.fill_(threshold).log_()
    return model


@pytest.fixture(scope="module")
def model() -> MarForCausalLM:
    return spiking_model()


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))


def currents(model: MarForCausalLM, *args, **kwargs) -> dict:
    """The input of each site during one call, caught without the monitor."""
    caught = {}

    def catch(key):
        return lambda _, inputs: caught.update({key: inputs[0].detach().clone()})

    sites = [((layer, site), neuron) for layer, site, neuron in model.neuron_sites()]
    handles = [neuron.register_forward_pre_hook(catch(key)) for key, neuron in sites]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return caught


def watched(model: MarForCausalLM, *args, **kwargs):
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        model(*args, **kwargs)
    return monitor.summary()


# By hand.


def test_counts_of_two_channels_by_hand():
    model = spiking_model(NeuronConfig(time_steps=4), sites=("in_proj",), threshold=1.0, hidden=2, layers=1)
    neuron = model.model.layers[0].mixer.in_neuron
    # V = 1, T = 4: codes (0, 3), (-2, 4), (0, 0); the 9 has fired at every step.
    with SpikeMonitor(model) as monitor:
        neuron(torch.tensor([[[0.5, 3.2], [-2.5, 9.0]]]))
        neuron(torch.tensor([[[0.0, -0.99]]]))
    (site,) = monitor.summary().sites
    assert (site.layer, site.site, site.tokens, site.channels, site.time_steps) == (0, "in_proj", 3, 2, 4)
    assert site.channel_spikes.tolist() == [2, 7]
    assert site.channel_nonzero.tolist() == [1, 2]
    assert site.channel_saturated.tolist() == [0, 1]
    assert (site.spikes, site.nonzero, site.logical_rows, site.silent_channels) == (9, 3, 3, 0)
    assert (site.spikes_per_element, site.nonzero_share, site.saturated_share) == (9 / 6, 3 / 6, 1 / 6)
    assert site.spikes_per_nonzero == 3
    assert site.macs == 2 * model.config.in_proj_size


def site_spikes(site, linears, macs, spikes, nonzero) -> SiteSpikes:
    channel = [torch.tensor(counts) for counts in (spikes, nonzero, [0] * len(spikes))]
    return SiteSpikes(0, site, 4, len(spikes), linears, macs, 10, *channel)


def test_mac_weighting_by_hand():
    # 20 elements with mean 1 spike before 600 MACs, 30 with mean 0.2 before 200.
    sites = [
        site_spikes("gate_up", 2, 600, [20, 0], [10, 0]),
        site_spikes("down_proj", 1, 200, [3, 2, 1], [3, 2, 1]),
    ]
    sums = totals(sites)
    assert (sums.tokens, sums.elements, sums.macs, sums.spikes, sums.nonzero) == (10, 50, 800, 26, 16)
    assert sums.logical_rows == 2 * 10 + 6
    assert sums.spikes_per_element == pytest.approx(26 / 50)
    assert sums.nonzero_per_element == pytest.approx(16 / 50)
    assert sums.spikes_per_mac == pytest.approx((600 * 1.0 + 200 * 0.2) / 800)
    assert sums.nonzero_per_mac == pytest.approx((600 * 0.5 + 200 * 0.2) / 800)
    assert sums.silent_share == pytest.approx(1 / 5)


# Against a pass by hand.

NEURONS = {
    "published": NeuronConfig(time_steps=3),
    "one step": NeuronConfig(time_steps=1),
    "pre-charged": NeuronConfig(time_steps=3, precharge=0.5),
    "leaky": NeuronConfig(time_steps=3, tau=2.0),
    "growing": NeuronConfig(time_steps=3, tau=0.5, merge="sum"),
    "scalar": NeuronConfig(time_steps=3, threshold="scalar"),
    "ternary": NeuronConfig(kind="ternary", time_steps=3),
    "binary": NeuronConfig(kind="binary", time_steps=3),
}


@pytest.mark.parametrize("kind", NEURONS)
def test_every_count_equals_the_spike_trains_of_a_pass_by_hand(kind, rows):
    model = spiking_model(NEURONS[kind])
    inputs = currents(model, rows)
    report = watched(model, rows)
    assert [(site.layer, site.site) for site in report.sites] == [(layer, site) for layer in (0, 1) for site in SITES]
    neurons = {(layer, site): neuron for layer, site, neuron in model.neuron_sites()}
    for site in report.sites:
        key = (site.layer, site.site)
        spikes = neurons[key].spike_train(inputs[key]).flatten(1, -2).long()
        assert site.tokens == spikes.shape[1] == rows.numel()
        assert site.channel_spikes.tolist() == spikes.abs().sum((0, 1)).tolist()
        assert site.channel_nonzero.tolist() == (spikes.sum(0) != 0).sum(0).tolist()
        assert site.channel_saturated.tolist() == spikes.all(0).sum(0).tolist()
        assert site.logical_rows == site.nonzero * FED[site.site]
        assert site.macs == sum(linear.weight.numel() for linear in model.neuron_linears(*key))
    assert 0 < report.totals.nonzero < report.totals.elements


@settings(max_examples=50, deadline=None)
@given(
    current=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8),
    kind=st.sampled_from(sorted(NEURONS)),
    steps=st.integers(1, 6),
    tau=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_spikes_of_a_token_never_cancel(current, kind, steps, tau):
    # The monitor takes Σ|s| from the code Σs; this is why it may.
    settings = NEURONS[kind].__dict__ | {"time_steps": steps, "tau": 1.0 if kind == "ternary" else tau}
    neuron = build_neuron(NeuronConfig(**settings), len(current))
    train = neuron.spike_train(torch.tensor([current])).long()
    assert torch.equal(train.abs().sum(0), train.sum(0).abs())
    assert torch.equal(train.sum(0), neuron.encode(torch.tensor([current])).long())


def test_counts_add_up_over_calls_and_reset_forgets_them(model, rows):
    with torch.no_grad(), SpikeMonitor(model, rasters=[(0, "in_proj")]) as monitor:
        model(rows)
        once = monitor.summary()
        model(rows)
        twice = monitor.summary()
        monitor.reset()
        model(rows)
        again = monitor.summary()
    assert again.to_dict() == once.to_dict()
    assert (twice.totals.tokens, twice.totals.spikes) == (2 * once.totals.tokens, 2 * once.totals.spikes)
    assert twice.totals.spikes_per_mac == pytest.approx(once.totals.spikes_per_mac)
    assert torch.equal(again.rasters[0, "in_proj"], once.rasters[0, "in_proj"])


def test_sites_without_a_neuron_are_left_out(rows):
    report = watched(spiking_model(sites=("gate_up", "out_proj")), rows)
    assert {site.site for site in report.sites} == {"out_proj", "gate_up"}
    assert list(report.by_site()) == ["out_proj", "gate_up"]
    grid = report.grid("nonzero_share")
    assert [[cell is None for cell in layer] for layer in grid] == [[True, False, False, True]] * 2
    assert grid[1][2] == next(s.nonzero_share for s in report.sites if (s.layer, s.site) == (1, "gate_up"))


# Padding, decoding, autocast.


def test_padding_is_left_out(model, rows):
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    inputs = currents(model, rows, attention_mask=mask)
    neurons = {(layer, site): neuron for layer, site, neuron in model.neuron_sites()}
    for report in (watched(model, input_ids=rows, attention_mask=mask), watched(model, rows, mask)):
        for site in report.sites:
            codes = neurons[site.layer, site.site].encode(inputs[site.layer, site.site])
            assert site.tokens == 11
            assert site.spikes == int(codes.long()[mask.bool()].abs().sum())


def test_a_call_without_mask_after_one_with_mask_counts_all(model, rows):
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        model(rows, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]))
        model(inputs_embeds=model.model.embed_tokens(rows))
        model(rows[:, :4])
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(attention_mask=torch.ones_like(rows))
    assert monitor.summary().totals.tokens == 12 + 14 + 8


def test_decoding_counts_each_real_token_once_although_its_mask_covers_the_past(model, rows):
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    with torch.no_grad(), SpikeMonitor(model) as monitor:
        past = model(rows, attention_mask=mask, use_cache=True).past_key_values
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            model(rows[:, :1], attention_mask=mask, past_key_values=past, use_cache=True)
    assert monitor.summary().totals.tokens == 11 + 2 * 3


def test_a_mask_of_another_shape_is_refused(model, rows):
    neuron = model.model.layers[0].mixer.in_neuron
    with torch.no_grad(), SpikeMonitor(model):
        model(rows, attention_mask=torch.ones_like(rows))
        with pytest.raises(ValueError, match="attention mask has shape"):
            neuron(torch.zeros(1, 3, 12))


def test_autocast_counts_the_codes_of_the_cast_inputs(model, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = currents(model, rows)
        report = watched(model, rows)
    neurons = {(layer, site): neuron for layer, site, neuron in model.neuron_sites()}
    for site in report.sites:
        codes = neurons[site.layer, site.site].encode(inputs[site.layer, site.site])
        assert site.spikes == int(codes.long().abs().sum())


# It changes nothing and goes away.


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_watching_changes_neither_outputs_nor_gradients(rows):
    found = []
    for watch in (False, True):
        model = spiking_model()
        monitor = SpikeMonitor(model)
        if watch:
            monitor.__enter__()
        output = model(rows, labels=rows)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(plain, seen) for plain, seen in zip(*found, strict=True))


def test_hooks_go_away_also_after_an_error_and_monitors_nest(model, rows):
    assert hooks(model) == 0
    with torch.no_grad(), SpikeMonitor(model) as outer:
        with SpikeMonitor(model, text="inner") as inner:
            model(rows)
        model(rows)
    assert (outer.summary().totals.tokens, inner.summary().totals.tokens) == (28, 14)
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="stop"), SpikeMonitor(model):
        raise KeyError("stop")
    assert hooks(model) == 0


# Rasters, reports, errors.


def test_raster_is_the_spike_train_of_the_first_tokens(model, rows):
    inputs = currents(model, rows)
    with torch.no_grad(), SpikeMonitor(model, rasters=[(1, "down_proj"), (0, "in_proj")], raster_tokens=20) as monitor:
        model(rows)
        model(rows)
    report = monitor.summary()
    assert set(report.rasters) == {(1, "down_proj"), (0, "in_proj")}
    raster = report.rasters[1, "down_proj"]
    assert raster.dtype == torch.int8
    assert raster.shape == (3, 20, 20)
    train = model.model.layers[1].mlp.down_neuron.spike_train(inputs[1, "down_proj"].flatten(0, 1))
    assert torch.equal(raster[:, :, :14], train.transpose(1, 2))
    assert torch.equal(raster[:, :, 14:], raster[:, :, :6])


def test_report_is_json_and_feeds_the_energy_model(model, rows):
    with torch.no_grad(), SpikeMonitor(model, text="fourteen random tokens") as monitor:
        model(rows)
    report = monitor.summary()
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["text"] == "fourteen random tokens"
    assert len(plain["sites"]) == 8
    assert plain["totals"]["spikes"] == sum(site["spikes"] for site in plain["sites"])
    counted = census(model.config, 100, report)
    outputs = {
        (s.layer, s.site): sum(x.out_features for x in model.neuron_linears(s.layer, s.site)) for s in report.sites
    }
    charged = sum(site.spikes * outputs[site.layer, site.site] for site in report.sites)
    assert counted.count("ac") == pytest.approx(charged / 14)
    assert counted.count("ac") == pytest.approx(report.totals.spikes_per_mac * report.totals.macs)
    assert cost(counted).label == "modelled, spike rates measured on fourteen random tokens, compute only"


def test_a_silent_model_is_reported_as_silent(rows):
    sums = watched(spiking_model(threshold=1e6), rows).totals
    assert (sums.spikes, sums.nonzero_per_mac, sums.silent_share) == (0, 0.0, 1.0)


def test_bad_use_is_one_sentence(model, rows):
    with pytest.raises(ValueError, match="no neurons to watch"):
        SpikeMonitor(MarForCausalLM(config(None)))
    with pytest.raises(ValueError, match=r"No neuron at \(5, 'in_proj'\)"):
        SpikeMonitor(model, rasters=[(5, "in_proj")])
    with SpikeMonitor(model) as monitor:
        with pytest.raises(ValueError, match="saw no tokens"):
            monitor.summary()
        with pytest.raises(RuntimeError, match="already watching"):
            monitor.__enter__()
