"""The census reproduces the published lengths, counts what the real modules hold, and the counter reader is exact."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from mar.census import COMPONENTS, Census, census, parameters
from mar.config import MIXER_PRESETS, SITES, MarConfig, NeuronConfig, site_neurons
from mar.costs import (
    MEMORIES,
    TABLES,
    break_even,
    compare,
    cost,
    crossing,
    curve,
    energy,
    measured_energy,
)
from mar.model import MarForCausalLM
from mar.spikes import SiteRate

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "energy_crossings.py"

LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
LLAMA_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
TINY = {"vocab_size": 64, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
TINY_LLAMA = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)


def mar_of(llama: LlamaConfig, preset: str = "llamba", **changes) -> MarConfig:
    head = llama.hidden_size // llama.num_attention_heads
    return MarConfig(
        vocab_size=llama.vocab_size,
        hidden_size=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        num_hidden_layers=llama.num_hidden_layers,
        num_heads=llama.num_attention_heads,
        head_dim=head,
        state_size=head,
        tie_word_embeddings=True,
        **MIXER_PRESETS[preset],
        **changes,
    )


def tiny_mar(preset: str = "llamba", **changes) -> MarConfig:
    sizes = {**TINY, "num_heads": 3, "head_dim": 4, "state_size": 5, "conv_kernel": 4}
    return MarConfig(**{**sizes, **MIXER_PRESETS[preset], **changes})


def spiking(neuron: NeuronConfig | None = None, **changes) -> MarConfig:
    return tiny_mar(neurons=site_neurons(neuron or NeuronConfig(time_steps=4)), **changes)


def by_component(counted: Census, op: str, component: str) -> float:
    return sum(row.count for row in counted.rows if (row.op, row.component) == (op, component))


# What the method page quotes, each from the census.


def macs(config, group, averaging="decode"):
    return lambda length: census(config, length, averaging=averaging).count("mac", group)


def attention(averaging="decode"):
    return lambda length: sum(macs(LLAMA_1B, group, averaging)(length) for group in ("scores", "projections"))


def test_scores_equal_the_projections_at_2560_and_attention_equals_the_ffn_at_9728():
    assert crossing(macs(LLAMA_1B, "scores"), macs(LLAMA_1B, "projections")) == pytest.approx(2560)
    assert crossing(attention(), macs(LLAMA_1B, "ffn")) == pytest.approx(9728)


def test_the_lengths_double_less_one_when_averaged_over_a_causal_prefill():
    # A causal prefill of L tokens sees (L + 1) / 2 keys on average, so L = 2 · 2560 - 1.
    scores, projections = (macs(LLAMA_1B, group, "prefill") for group in ("scores", "projections"))
    assert crossing(scores, projections) == pytest.approx(2 * 2560 - 1)
    assert crossing(attention("prefill"), macs(LLAMA_1B, "ffn", "prefill")) == pytest.approx(2 * 9728 - 1)


@pytest.mark.parametrize(("llama", "share"), [(LLAMA_1B, 0.008), (LLAMA_135M, 0.04)])
@pytest.mark.parametrize("context", [1, 512, 100_000])
def test_conv_and_scan_are_a_small_share_of_the_dense_ffn_at_every_length(llama, share, context):
    groups = cost(census(mar_of(llama), context)).by_group
    assert groups["scan"] / groups["ffn"] == pytest.approx(share, rel=0.06)


def test_conv_and_scan_are_a_third_of_the_spiking_ffn_of_the_135m():
    config = mar_of(LLAMA_135M, neurons=site_neurons(NeuronConfig(time_steps=4)))
    groups = cost(census(config, 512, dict.fromkeys(SITES, SiteRate(0.64, 0.36)))).by_group
    assert groups["scan"] / groups["ffn"] == pytest.approx(1 / 3, rel=0.02)


@pytest.mark.parametrize(("llama", "length"), [(LLAMA_1B, 2670), (LLAMA_135M, 770)])
@pytest.mark.parametrize("preset", ["llamba", "fast"])
def test_the_dense_student_costs_more_than_llama_below_some_length(llama, length, preset):
    student = mar_of(llama, preset)
    found = crossing(lambda at: cost(census(student, at)).decoder, lambda at: cost(census(llama, at)).decoder)
    assert found == pytest.approx(length, rel=0.005)
    assert cost(census(student, 0.9 * length)).decoder > cost(census(llama, 0.9 * length)).decoder


@pytest.mark.parametrize(("table", "spikes"), [("45nm-fp32", 5.11), ("45nm-fp16", 3.75), ("45nm-int8", 3.0)])
def test_break_even_spike_count(table, spikes):
    config = mar_of(LLAMA_135M)
    assert break_even(config, table) == pytest.approx(spikes, abs=0.005)
    assert config.neurons is None


def test_head_of_the_135m_costs_130_microjoules_whatever_the_decoder_is():
    config = mar_of(LLAMA_135M, neurons=site_neurons(NeuronConfig()))
    rates = dict.fromkeys(SITES, SiteRate(0.64, 0.36))
    reports = [cost(census(LLAMA_135M, 512)), cost(census(mar_of(LLAMA_135M), 512)), cost(census(config, 512, rates))]
    for report in reports:
        assert report.head == pytest.approx(130, abs=0.5)
        assert report.with_head == report.decoder + report.head
    spikes = reports[-1].by_group
    assert spikes["projections"] + spikes["ffn"] < reports[-1].head


def test_a_mar_of_the_1b_shape_has_1405_million_parameters():
    assert parameters(mar_of(LLAMA_1B)) == pytest.approx(1.405e9, rel=2e-4)


# The census against the real modules.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_llama_parameters_are_those_of_the_real_model(tied, bias):
    config = LlamaConfig(
        **TINY,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    assert parameters(config) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


@pytest.mark.parametrize("preset", MIXER_PRESETS)
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"mlp_bias": True},
        {"neurons": site_neurons(NeuronConfig())},
        {"neurons": site_neurons(NeuronConfig(threshold="scalar"), sites=("in_proj", "down_proj"))},
    ],
)
def test_mar_parameters_are_those_of_the_real_model(preset, changes):
    config = tiny_mar(preset, **{"state_size": 6, **changes})
    assert parameters(config) == sum(p.numel() for p in MarForCausalLM(config).parameters())


# By hand: d = 12, ff = 20, 2 layers; LLaMA with 4 query and 2 key heads of 8; MAR with H = 3, P = 4, N = 5.


def test_llama_counts_by_hand():
    counted = census(TINY_LLAMA, 10)
    assert counted.count("mac", "projections") == 2 * (12 * 32 + 2 * 12 * 16 + 32 * 12)
    assert counted.count("mac", "scores") == 2 * (2 * 10 * 32)
    assert counted.count("mac", "ffn") == 2 * 3 * 12 * 20
    assert counted.count("mac", "head") == 12 * 64
    assert by_component(counted, "multiply", "ffn_gate") == 2 * 2 * 20
    assert by_component(counted, "multiply", "norm") == 5 * 2 * 12
    assert counted.count("ac") == 0


def test_mar_counts_by_hand():
    counted = census(tiny_mar(), 10)
    inner, conv = 12, 12 + 2 * 15
    assert counted.count("mac", "projections") == 2 * (12 * (conv + inner + 3) + inner * 12)
    assert by_component(counted, "mac", "conv") == 2 * 4 * conv
    assert by_component(counted, "multiply", "scan") == 2 * 3 * 4 * 5
    assert by_component(counted, "mac", "scan") == 2 * (2 * 3 * 4 * 5 + inner)
    assert by_component(counted, "multiply", "mixer_gate") == 2 * 2 * inner
    assert counted.count(group="scores") == counted.count(group="neuron") == 0


def test_spiking_linears_charge_every_spike_and_dense_sites_stay_macs():
    config = tiny_mar(neurons=site_neurons(NeuronConfig(time_steps=4), sites=("in_proj", "gate_up")))
    rates = {(0, "in_proj"): SiteRate(0.5, 0.25), (1, "in_proj"): SiteRate(1.5, 0.5), "gate_up": SiteRate(2.0, 0.75)}
    counted, dense = census(config, 7, rates), census(tiny_mar(), 7)
    in_proj, gate_up = 12 * config.in_proj_size, 2 * 12 * 20
    assert counted.count("ac") == (0.5 + 1.5) * in_proj + 2 * 2.0 * gate_up
    assert dense.count("mac") - counted.count("mac") == 2 * in_proj + 2 * gate_up
    saved = 2 * in_proj + 2 * gate_up - (0.25 + 0.5) * in_proj - 2 * 0.75 * gate_up
    thresholds = 2 * (12 + 12)
    assert dense.moved("weight") - counted.moved("weight") == pytest.approx(saved - thresholds)
    energy = cost(counted).by_component
    assert energy["in_proj"] == pytest.approx(0.9e-6 * 2.0 * in_proj)
    assert energy["down_proj"] == pytest.approx(4.6e-6 * 2 * 12 * 20)


@pytest.mark.parametrize(
    ("neuron", "adds", "multiplies", "macs"),
    [
        (NeuronConfig(time_steps=4), 8, 0, 0),
        (NeuronConfig(time_steps=4, precharge=0.5), 9, 0, 0),
        (NeuronConfig(time_steps=4, tau=2.0), 8, 3, 3),
        (NeuronConfig(time_steps=4, tau=2.0, merge="sum"), 8, 3, 0),
        (NeuronConfig(kind="ternary", time_steps=2), 4, 1, 0),
        (NeuronConfig(kind="binary", time_steps=2), 4, 0, 0),
    ],
)
def test_neurons_are_a_line_of_their_own(neuron, adds, multiplies, macs):
    config = spiking(neuron)
    counted = census(config, 1, dict.fromkeys(SITES, SiteRate(1.0, 1.0)))
    channels, outputs = 2 * (12 + 12 + 12 + 20), 2 * (config.in_proj_size + 12 + 40 + 12)
    assert counted.count("add", "neuron") == adds * channels
    assert counted.count("multiply", "neuron") == multiplies * channels
    assert counted.count("mac", "neuron") == macs * outputs
    report = cost(counted)
    priced = 0.9 * adds * channels + 3.7 * multiplies * channels + 4.6 * macs * outputs
    assert report.neuron == pytest.approx(priced * 1e-6)
    assert report.decoder + report.head + report.neuron == pytest.approx(sum(report.by_component.values()))


def test_a_window_costs_what_its_tokens_do_and_no_more_beyond_it():
    plain, windowed = tiny_mar(state_size=6), tiny_mar(state_size=6, window=5)
    short, full, long = (census(windowed, length) for length in (3, 6, 500))
    # Of 2 layers and 3 heads: products with N of B and P of x, for each token looked at.
    assert [one.count("mac", "scores") for one in (short, full, long)] == [2 * 3 * (6 + 4) * keys for keys in (3, 6, 6)]
    assert by_component(long, "special", "softmax") == 2 * 3 * 6
    assert by_component(long, "multiply", "rope") == 2 * 2 * (2 * 3 * 6)
    assert long.moved("cache") == 2 * 6 * 3 * (6 + 4)
    assert long.count() == full.count() > short.count() > census(plain, 3).count()
    assert {row.component for row in long.rows} - {row.component for row in census(plain, 3).rows} == {
        "rope", "scores", "softmax"
    }  # fmt: skip


@pytest.mark.parametrize("length", [1, 5, 6, 9])
def test_prefill_is_the_mean_of_its_tokens(length: int):
    for config in (TINY_LLAMA, tiny_mar("fast"), tiny_mar(state_size=6, window=5)):
        for op in ("mac", "multiply", "add", "special"):
            tokens = [census(config, at).count(op) for at in range(1, length + 1)]
            assert census(config, length, averaging="prefill").count(op) == pytest.approx(sum(tokens) / length)


# Traffic.


def test_decode_traffic_by_hand():
    llama, mar = ([census(config, length) for length in (10, 11)] for config in (TINY_LLAMA, tiny_mar()))
    keys_and_values = 2 * 2 * 16
    assert llama[0].moved("cache") == 10 * keys_and_values
    assert llama[1].moved("cache") == 11 * keys_and_values
    assert mar[0].moved("state") == mar[1].moved("state") == 2 * (2 * 3 * 4 * 5 + 4 * (12 + 2 * 15))
    # Every weight once, and of the untied embedding table one row.
    assert llama[0].moved("weight") == parameters(TINY_LLAMA) - 64 * 12 + 12
    plain, loaded = cost(llama[0], "45nm-int8"), cost(llama[0], "45nm-int8", traffic=True, memory="dram-high")
    moved = llama[0].moved("weight") + llama[0].moved("cache")
    assert loaded.with_head - plain.with_head == pytest.approx(moved * 2.6e-3 / 8)
    mixed = cost(mar[0], "45nm-fp16", traffic=True).with_head - cost(mar[0], "45nm-fp16").with_head
    assert mixed == pytest.approx((2 * mar[0].moved("weight") + 4 * mar[0].moved("state")) * 1.3e-3 / 8)


def test_a_prefill_moves_everything_once():
    llama, mar = (census(config, 100, averaging="prefill") for config in (TINY_LLAMA, tiny_mar()))
    assert llama.moved("weight") == pytest.approx((parameters(TINY_LLAMA) - 64 * 12) / 100 + 12)
    assert llama.moved("cache") == pytest.approx(2 * 2 * 2 * 16)
    assert mar.moved("state") == pytest.approx(census(tiny_mar(), 100).moved("state") / 100)
    rates = dict.fromkeys(SITES, SiteRate(0.5, 0.4))
    linear = [census(spiking(), length, rates, "prefill").moved("weight", "ffn") for length in (2, 100)]
    assert linear == pytest.approx([2 * 3 * 12 * 20 * 0.4, 2 * 3 * 12 * 20 / 100])


# Properties.

RATES = st.tuples(st.floats(0, 1), st.floats(1, 4)).map(lambda pair: SiteRate(pair[0] * pair[1], pair[0]))


@settings(max_examples=30, deadline=None)
@given(rate=RATES, context=st.integers(1, 5000), table=st.sampled_from(sorted(TABLES)), traffic=st.booleans())
def test_energy_grows_with_the_rate_and_a_spiking_student_does_not_care_for_context(rate, context, table, traffic):
    def energy(spikes, length):
        return cost(census(spiking(), length, dict.fromkeys(SITES, spikes)), table, traffic)

    report = energy(rate, context)
    assert report.decoder == energy(rate, 1).decoder
    assert report.head == energy(SiteRate(0.0, 0.0), 1).head
    assert energy(SiteRate(0.0, 0.0), 1).decoder <= report.decoder <= energy(SiteRate(4.0, 1.0), 1).decoder
    assert set(report.by_component) <= set(COMPONENTS)


def test_llama_energy_is_a_straight_line_in_the_context():
    reports = curve(TINY_LLAMA, [1, 11, 21], table="45nm-int8", traffic=True)
    assert reports[1] == energy(TINY_LLAMA, 11, table="45nm-int8", traffic=True)
    at = [report.decoder for report in reports]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1])
    assert at[1] > at[0]


def test_crossing_finds_the_root_from_either_side_and_says_none():
    assert crossing(lambda x: x * x, lambda _: 50.0) == pytest.approx(50**0.5)
    assert crossing(lambda _: 50.0, lambda x: x * x) == pytest.approx(50**0.5)
    assert crossing(lambda x: x**9, lambda _: 0.5, 0, 1) == pytest.approx(0.5 ** (1 / 9))
    assert crossing(lambda x: x, lambda _: 3, 3, 5) == 3
    assert crossing(lambda x: x + 1, lambda x: x) is None
    assert crossing(lambda x: x, lambda x: x) is None


# Labels, side by side and errors.


def test_labels_say_modelled_and_where_the_rates_come_from():
    rates = dict.fromkeys(SITES, SiteRate(0.5, 0.5))
    assert cost(census(TINY_LLAMA, 5)).label == "modelled, compute only"
    assert cost(census(spiking(), 5, rates)).label == "modelled, spike rates assumed, compute only"
    assert cost(census(tiny_mar(), 5), traffic=True).label == "modelled, compute and dram-low traffic"


def test_side_by_side_has_every_column_for_every_model_and_table():
    rates = dict.fromkeys(SITES, SiteRate(0.5, 0.5))
    models = {"llama": (TINY_LLAMA, None), "spiking": (spiking(), rates)}
    rows = json.loads(json.dumps(compare(models, 64, measured={("spiking", "45nm-int8"): 3.0})))
    assert [(row["model"], row["table"], row["measured_uj"]) for row in rows] == [
        ("llama", "45nm-fp32", None),
        ("llama", "45nm-int8", None),
        ("spiking", "45nm-fp32", None),
        ("spiking", "45nm-int8", 3.0),
    ]
    for row in rows:
        assert row["compute"]["with_head_uj"] < row["compute_and_memory"]["with_head_uj"]
        assert row["compute"]["decoder_uj"] < row["compute"]["with_head_uj"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: census(TINY_LLAMA, 0), "context is 0"),
        (lambda: census(TINY_LLAMA, math.nan), "context is nan"),
        (lambda: census(TINY_LLAMA, 5, averaging="mean"), "averaging is 'mean'"),
        (lambda: census(TINY_LLAMA, 5, {"in_proj": SiteRate(0.5, 0.5)}), "LLaMA, which has no neurons"),
        (lambda: census(GPT2Config(), 5), "no census for 'gpt2'"),
        (lambda: census(spiking(), 5), "no spike rate for in_proj of layer 0"),
        (lambda: census(tiny_mar(), 5, {"in_proj": SiteRate(0.5, 0.5)}), "name 'in_proj', where"),
        (lambda: census(spiking(), 5, {(2, "in_proj"): SiteRate(0.5, 0.5)}), r"name \(2, 'in_proj'\), where"),
        (lambda: census(spiking(), 5, dict.fromkeys(SITES, SiteRate(0.2, 0.5))), "0.2 spikes and 0.5 non-zero"),
        (lambda: census(spiking(), 5, dict.fromkeys(SITES, SiteRate(2.1, 0.5))), "which 4 steps cannot give"),
        (lambda: census(spiking(), 5, dict.fromkeys(SITES, SiteRate(1.5, 1.5))), "nonzero from 0 to 1"),
        (lambda: cost(census(TINY_LLAMA, 5), "7nm"), "table is '7nm'"),
        (lambda: cost(census(TINY_LLAMA, 5), memory="tape"), "memory is 'tape'"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_prices_are_horowitzs():
    macs = {name: table.linear.price("mac") for name, table in TABLES.items()}
    assert macs == pytest.approx({"45nm-fp32": 4.6, "45nm-fp16": 1.5, "45nm-int8": 0.3})
    assert all(table.state.price("mac") == pytest.approx(4.6) for table in TABLES.values())
    assert MEMORIES["dram-high"] / MEMORIES["sram-8KB"] == 260
    assert all("Horowitz" in table.source for table in TABLES.values())


# The counter, on a folder laid out like Linux powercap.


def write_domain(powercap: Path, folder: str, name: str, energy: int, span: int = 1_000_000) -> None:
    (powercap / folder).mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", span)):
        (powercap / folder / file).write_text(f"{value}\n")


def test_measured_energy_sums_packages_and_survives_a_wrap(tmp_path):
    (tmp_path / "intel-rapl").mkdir()
    write_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    write_domain(tmp_path, "intel-rapl:0:0", "core", 50)
    write_domain(tmp_path, "intel-rapl:1", "package-1", 999_990)
    write_domain(tmp_path, "intel-rapl:2", "psys", 0)
    with measured_energy(tmp_path) as result:
        assert result.joules is None
        write_domain(tmp_path, "intel-rapl:0", "package-0", 350)
        write_domain(tmp_path, "intel-rapl:0:0", "core", 900)
        write_domain(tmp_path, "intel-rapl:1", "package-1", 29)
        write_domain(tmp_path, "intel-rapl:2", "psys", 70_000)
    # package-0: 250; package-1: 10 to its top, one to come round to zero, 29 more.
    assert result.joules == pytest.approx((250 + 40) * 1e-6)
    assert result.per_token(29) == pytest.approx(10)
    assert result.seconds is not None
    assert result.seconds >= 0
    assert result.reason.startswith("measured")


def test_measured_energy_says_why_there_is_none(tmp_path):
    with measured_energy(tmp_path / "absent") as absent:
        pass
    assert (absent.joules, absent.per_token(5)) == (None, None)
    assert absent.reason == "no energy counter on this machine"

    write_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not a number")
    with measured_energy(tmp_path) as unreadable:
        pass
    assert unreadable.joules is None
    assert "cannot be read" in unreadable.reason

    write_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    with measured_energy(tmp_path) as lost:
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert lost.joules is None
    assert "disappeared" in lost.reason


def test_an_error_inside_the_measured_block_is_not_swallowed(tmp_path):
    with pytest.raises(KeyError, match="inside"), measured_energy(tmp_path):
        raise KeyError("inside")


def test_the_benchmark_prints_one_json_object(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--json"])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["LLaMA-3.2-1B"]["decode"]["scores_equal_projections"] == pytest.approx(2560)
    assert found["LLaMA-3.2-1B"]["decode"]["attention_equals_ffn"] == pytest.approx(9728)
