"""Census of operations: what one token costs a LLaMA, a dense MAR or a spiking MAR, from config and spike rates alone.

Does: count MACs, spike-driven accumulates, multiplies, additions and moved values per token at any context. Does not:
price them (mar.costs) or measure spike rates (mar.spikes).

A figure is for one token decoded at a context of L tokens (itself included), or averaged over a causal prefill of L
tokens, in which a token sees (L + 1) / 2 keys on average.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers import LlamaConfig, PreTrainedConfig

from mar.config import SITES, MarConfig, NeuronConfig, Site
from mar.spikes import SiteRate, SpikeReport

Op = Literal["mac", "ac", "multiply", "add", "special", "move"]
"""`ac` is a spike-driven accumulate. `special` is an exp, softplus, sigmoid or reciprocal root: counted, but no table
prices it, so it is free in every total. `move` computes nothing and only reads or writes."""

Number = int | float
"""Spelled out, because a runtime type checker does not take an int for a float."""

AVERAGINGS = ("decode", "prefill")
Rates = SpikeReport | Mapping[Any, SiteRate]
"""A report, or rates by (layer, site), by site for all layers, or both mixed (the pair wins)."""

COMPONENTS: dict[str, tuple[str, str]] = {
    "embedding": ("elementwise", "element"),
    "q_proj": ("projections", "linear"),
    "k_proj": ("projections", "linear"),
    "v_proj": ("projections", "linear"),
    "o_proj": ("projections", "linear"),
    "in_proj": ("projections", "linear"),
    "out_proj": ("projections", "linear"),
    "rope": ("elementwise", "element"),
    "scores": ("scores", "attention"),
    "softmax": ("elementwise", "element"),
    "conv": ("scan", "element"),
    "scan": ("scan", "state"),
    "decay": ("elementwise", "state"),
    "bc_norm": ("elementwise", "element"),
    "mixer_gate": ("elementwise", "element"),
    "gate_proj": ("ffn", "linear"),
    "up_proj": ("ffn", "linear"),
    "down_proj": ("ffn", "linear"),
    "ffn_gate": ("elementwise", "element"),
    "norm": ("elementwise", "element"),
    "residual": ("elementwise", "element"),
    "neuron": ("neuron", "state"),
    "head": ("head", "linear"),
}
"""Component -> (group for tables and plots, class of arithmetic). Class `state` is computed in fp32 under every table,
because decay, state and thresholds are."""


class Row(NamedTuple):
    """`count` operations of one kind and `words` moved values of one kind of memory, per token."""

    component: str
    op: Op
    count: Number
    words: Number = 0
    memory: Literal["weight", "cache", "state"] = "weight"


@dataclass(frozen=True)
class Census:
    """All operations per token of one model at one context. label says where the spike rates come from."""

    rows: list[Row]
    context: Number
    averaging: str
    label: str

    def count(self, op: Op | None = None, group: str | None = None) -> Number:
        """Operations of one kind (default: all) in one group of COMPONENTS (default: everywhere)."""
        return sum(row.count for row in self._select(group) if op in (None, row.op))

    def moved(self, memory: str | None = None, group: str | None = None) -> Number:
        """Values read or written in one kind of memory (default: all) by one group (default: everywhere)."""
        return sum(row.words for row in self._select(group) if memory in (None, row.memory))

    def _select(self, group: str | None) -> list[Row]:
        return [row for row in self.rows if group in (None, COMPONENTS[row.component][0])]


def census(config: PreTrainedConfig, context: Number, rates: Rates | None = None, averaging: str = "decode") -> Census:
    """Count what one token costs.

    context: L in tokens, at least 1, fractions allowed. rates: spikes and non-zero share per (layer, site) or per site,
    from a SpikeReport (then labelled measured) or given (assumed); needed exactly where the config has neurons.

    Decoding reads every weight, the whole KV cache or the state for each token (batch 1). A prefill is given ideal
    reuse: each weight, key, value and state moves once per prefill, and a spiking weight row at most as often as its
    input fires. The scan is charged as the recurrence, the head for every token.
    Raises ValueError for another architecture, a context below 1, and rates that do not fit the neurons.
    """
    if not 1 <= context < math.inf:
        raise ValueError(f"context is {context}; it counts the token itself, so use 1 or more.")
    if averaging not in AVERAGINGS:
        raise ValueError(f"averaging is {averaging!r}; use 'decode' or 'prefill'.")
    if isinstance(config, MarConfig):
        rows = _mar_rows(config, _rate_table(config, rates), context, averaging)
    elif isinstance(config, LlamaConfig):
        if rates:
            raise ValueError("Spike rates were given for a LLaMA, which has no neurons; leave them out.")
        rows = _llama_rows(config, context, averaging)
    else:
        raise ValueError(f"There is no census for {config.model_type!r}; give a LlamaConfig or a MarConfig.")
    label = "modelled"
    if rates:
        found = f"measured on {rates.text}" if isinstance(rates, SpikeReport) else "assumed"
        label = f"modelled, spike rates {found}"
    merged: dict[tuple[str, Op, Any], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        sums = merged[row.component, row.op, row.memory]
        sums[0] += row.count
        sums[1] += row.words
    summed = [Row(name, op, count, words, memory) for (name, op, memory), (count, words) in merged.items()]
    return Census(summed, context, averaging, label)


def parameters(config: PreTrainedConfig) -> int:
    """Trainable parameters, from the weights that the census says a token needs, plus the embedding table if untied."""
    firing = {site: SiteRate(1.0, 1.0) for site in getattr(config, "neurons", None) or {}}
    rows = census(config, 1, firing or None).rows
    words = sum(row.words for row in rows if row.memory == "weight" and row.component != "embedding")
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # type: ignore[attr-defined]
    return round(words) + table


def _rate_table(config: MarConfig, rates: Rates | None) -> dict[tuple[int, Site], SiteRate]:
    """Check rates against the neurons and spread them to (layer, site)."""
    given: dict[Any, SiteRate] = dict(rates.rates() if isinstance(rates, SpikeReport) else rates or {})
    neurons = {site: neuron for site in SITES if (neuron := config.neuron(site))}
    placed = [(layer, site) for layer in range(config.num_hidden_layers) for site in neurons]
    if unknown := [key for key in given if key not in neurons and key not in placed]:
        raise ValueError(f"Spike rates name {unknown[0]!r}, where this model has no neuron; leave it out.")
    spread = {}
    for layer, site in placed:
        rate = given.get((layer, site), given.get(site))
        if rate is None:
            raise ValueError(
                f"There is no spike rate for {site} of layer {layer}; measure with SpikeMonitor and pass rates."
            )
        spikes, nonzero = rate
        steps = neurons[site].time_steps
        # Each non-zero code takes between one spike and T; the slack is for rounding of measured means.
        if not (0 <= nonzero <= min(1.0, spikes + 1e-9) and spikes <= steps * nonzero + 1e-9):
            raise ValueError(
                f"The rate of {site} is {spikes} spikes and {nonzero} non-zero codes per element, which {steps} steps "
                f"cannot give; use nonzero from 0 to 1 and spikes from nonzero to {steps} * nonzero."
            )
        spread[layer, site] = SiteRate(spikes, nonzero)
    return spread


def _linear(
    component: str, d_in: int, d_out: int, share: Number, rate: SiteRate | None = None, bias: bool = False
) -> Iterator[Row]:
    weights = d_in * d_out
    if rate is None:
        yield Row(component, "mac", weights, weights * share)
    else:
        yield Row(component, "ac", rate.spikes * weights, min(rate.nonzero, share) * weights)
    if bias:
        yield Row(component, "add", d_out, d_out * share)


def _neuron(neuron: NeuronConfig | None, channels: int, outputs: int, share: Number) -> Iterator[Row]:
    """T comparisons of |h| with V and T subtractions per channel, both at the price of an addition; T - 1 leaks."""
    if neuron is None:
        return
    steps, thresholds = neuron.time_steps, channels if neuron.threshold == "channel" else 1
    yield Row("neuron", "add", (2 * steps + (neuron.precharge > 0)) * channels, thresholds * share)
    if neuron.tau != 1 or neuron.kind == "ternary":
        yield Row("neuron", "multiply", (steps - 1) * channels)
    if neuron.tau != 1 and neuron.merge == "weighted":
        # The steps weigh differently, so the sums of each step must be kept apart and then combined.
        yield Row("neuron", "mac", (steps - 1) * outputs)


def _ffn(
    d: int, wide: int, bias: bool, share: Number, gate_up: SiteRate | None = None, down: SiteRate | None = None
) -> Iterator[Row]:
    yield from _linear("gate_proj", d, wide, share, gate_up, bias)
    yield from _linear("up_proj", d, wide, share, gate_up, bias)
    yield from _linear("down_proj", wide, d, share, down, bias)
    yield from _gate("ffn_gate", wide)


def _gate(component: str, wide: int) -> Iterator[Row]:
    """silu(z) * y: one sigmoid and two multiplies a channel."""
    yield Row(component, "special", wide)
    yield Row(component, "multiply", 2 * wide)


def _norm(d: int, share: Number) -> Iterator[Row]:
    """RMSNorm: sum of squares, reciprocal root, two multiplies a channel."""
    yield Row("norm", "mac", d)
    yield Row("norm", "special", 1)
    yield Row("norm", "multiply", 2 * d, d * share)


def _around(config: Any, share: Number) -> Iterator[Row]:
    """What every decoder has beside its mixers and FFNs."""
    d, layers = config.hidden_size, config.num_hidden_layers
    yield Row("embedding", "move", 0, d)
    yield from _times(2 * layers + 1, _norm(d, share))
    yield Row("residual", "add", 2 * layers * d)
    yield from _linear("head", d, config.vocab_size, share)


def _times(times: int, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        yield row._replace(count=times * row.count, words=times * row.words)


def _llama_rows(config: LlamaConfig, context: Number, averaging: str) -> Iterator[Row]:
    prefill = averaging == "prefill"
    share, keys = (1 / context, (context + 1) / 2) if prefill else (1.0, context)
    # Earlier keys are read back; a prefill with ideal reuse reads each once, however many queries need it.
    earlier = min(keys - 1, 1.0) if prefill else keys - 1
    yield from _around(config, share)
    yield from _times(config.num_hidden_layers, _llama_layer(config, share, keys, earlier))


def _llama_layer(config: LlamaConfig, share: Number, keys: Number, earlier: Number) -> Iterator[Row]:
    d, heads = config.hidden_size, config.num_attention_heads
    head = config.head_dim or d // heads
    queries, kv, bias = heads * head, (config.num_key_value_heads or heads) * head, config.attention_bias
    yield from _linear("q_proj", d, queries, share, bias=bias)
    yield from _linear("k_proj", d, kv, share, bias=bias)
    yield from _linear("v_proj", d, kv, share, bias=bias)
    yield from _linear("o_proj", queries, d, share, bias=bias)
    yield from _attention(heads, queries + kv, 2 * queries, 2 * kv, keys, earlier, queries)
    yield from _ffn(d, config.intermediate_size, config.mlp_bias, share)


def _attention(
    heads: int, turned: int, products: int, kept: int, keys: Number, earlier: Number, outputs: int
) -> Iterator[Row]:
    """Softmax attention to `keys` tokens: products with each, values kept of each token, of how many others read."""
    yield Row("rope", "multiply", 2 * turned)
    yield Row("rope", "add", turned)
    yield Row("scores", "mac", keys * products, kept * (1 + earlier), "cache")
    # The sum of exponentials divides the weighted values once per channel, not every score.
    yield Row("softmax", "special", keys * heads)
    yield Row("softmax", "add", keys * heads)
    yield Row("softmax", "multiply", outputs)


def _mar_rows(
    config: MarConfig, rates: Mapping[tuple[int, Site], SiteRate], context: Number, averaging: str
) -> Iterator[Row]:
    prefill = averaging == "prefill"
    share = 1.0 / context if prefill else 1.0
    yield from _around(config, share)
    layers = Counter(tuple(rates.get((layer, site)) for site in SITES) for layer in range(config.num_hidden_layers))
    for local, times in layers.items():
        yield from _times(times, _mar_layer(config, dict(zip(SITES, local, strict=True)), share))
    if config.window:
        yield from _times(config.num_hidden_layers, _window(config, context, prefill))


def _window(config: MarConfig, context: Number, prefill: bool) -> Iterator[Row]:
    """Attention to the last tokens and the first one, whose values are added to the scan's before the gate."""
    heads, inner, state = config.num_heads, config.inner_size, config.num_heads * config.state_size
    most = config.window + 1
    keys = min(context, most)
    if prefill:  # the mean over its tokens
        keys = (keys * (keys + 1) / 2 + (context - keys) * most) / context
    earlier = min(keys - 1, 1.0) if prefill else keys - 1
    yield from _attention(heads, 2 * state, state + inner, state + inner, keys, earlier, inner)
    yield Row("mixer_gate", "add", inner)


def _mar_layer(config: MarConfig, rates: Mapping[Site, SiteRate | None], share: Number) -> Iterator[Row]:
    d, inner, heads = config.hidden_size, config.inner_size, config.num_heads
    state, wide = inner * config.state_size, config.intermediate_size
    yield from _neuron(config.neuron("in_proj"), d, config.in_proj_size, share)
    yield from _neuron(config.neuron("out_proj"), inner, d, share)
    yield from _neuron(config.neuron("gate_up"), d, 2 * wide, share)
    yield from _neuron(config.neuron("down_proj"), wide, d, share)
    yield from _linear("in_proj", d, config.in_proj_size, share, rates["in_proj"])
    taps, channels = config.conv_kernel, config.conv_size
    yield Row("conv", "mac", taps * channels, taps * channels * share)
    yield Row("conv", "move", 0, taps * channels * share, "state")
    yield Row("conv", "add", channels, channels * share)
    yield Row("scan", "multiply", state, 2 * state * share, "state")
    yield Row("scan", "mac", 2 * state)
    yield Row("scan", "mac", inner, heads * share)
    yield Row("decay", "special", 2 * heads)
    if config.decay_bias:
        yield Row("decay", "add", heads, heads * share)
    if config.input_gain == "one_minus_decay":
        yield Row("decay", "add", heads)
        yield Row("decay", "multiply", inner)
    if config.bc_norm == "l2":
        vectors = 2 * heads * config.state_size
        yield Row("bc_norm", "mac", vectors)
        yield Row("bc_norm", "special", 2 * heads)
        yield Row("bc_norm", "multiply", vectors + heads)
    yield Row("mixer_gate", "add", inner, inner * share)
    yield from _gate("mixer_gate", inner)
    yield from _linear("out_proj", inner, d, share, rates["out_proj"])
    yield from _ffn(d, wide, config.mlp_bias, share, rates["gate_up"], rates["down_proj"])
