"""Configuration of a MAR model: the LLaMA fields that survive, the mixer's choices, and the neurons.

Does: hold every choice that the paper leaves open as a field with a documented default, and refuse values that make no
model. Does not: build modules or read checkpoints.
"""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, no_type_check

from transformers import AutoConfig, PreTrainedConfig

Site = Literal["in_proj", "out_proj", "gate_up", "down_proj"]
SITES: tuple[Site, ...] = ("in_proj", "out_proj", "gate_up", "down_proj")
"""The four places of a decoder layer that take a neuron, each named after the linear it feeds (paper, section 2.2)."""

NEURON_KINDS = ("atmn", "ternary", "binary")
MIXER_PRESETS: dict[str, dict[str, Any]] = {
    "llamba": {"input_gain": "none", "bc_norm": "none", "decay_bias": False},
    "fast": {"input_gain": "one_minus_decay", "bc_norm": "l2", "decay_bias": True},
    "hybrid": {"input_gain": "one_minus_decay", "bc_norm": "l2", "decay_bias": True, "window": 64},
}
"""`llamba` is the mixer as published; `fast`, the default, learned fastest from attention weights (docs/lab-log.md);
`hybrid` keeps attention over the last 64 tokens and the first one beside it, which is no longer the paper's model."""


MOST_WINDOW = 1 << 20
"""Tokens; the engine has as many at most."""


@dataclass(frozen=True)
class NeuronConfig:
    """One site's spiking neuron.

    kind: `atmn` (eq. 1-4, soft reset), `ternary` (hard reset, after Guo et al., AAAI 2024) or `binary` ({0, 1}).
    time_steps: T, inner steps per token. tau: leak of the membrane between steps (undisclosed; 1 keeps it whole).
    threshold: one trainable log-threshold per `channel` or one `scalar` for the site.
    precharge: start the membrane at precharge * tau * V with the current's sign, so that the first spike comes at
        (1 - precharge) V (ours). 0 truncates, as published; 0.5 rounds, and is the most.
    merge: how T spikes become the linear's input: `weighted` is V * sum tau^t s_t, `sum` is V * sum s_t.
    surrogate: name of the backward shape, see `mar.surrogate.SURROGATES`.
    """

    kind: str = "atmn"
    time_steps: int = 4
    tau: float = 1.0
    threshold: str = "channel"
    precharge: float = 0.0
    merge: str = "weighted"
    surrogate: str = "ste"

    def __post_init__(self) -> None:
        _one_of("neuron kind", self.kind, NEURON_KINDS)
        _one_of("threshold", self.threshold, ("channel", "scalar"))
        _one_of("merge", self.merge, ("weighted", "sum"))
        if not _is_integer(self.time_steps) or not 1 <= self.time_steps <= 127:
            raise ValueError(f"time_steps is {self.time_steps!r}; a code has 8 bits, so use an integer from 1 to 127.")
        if not _is_number(self.tau) or not 0 < self.tau < math.inf:
            raise ValueError(f"tau is {self.tau!r}; it divides the membrane potential, so use a number above 0.")
        if not _is_number(self.precharge) or not 0 <= self.precharge <= 0.5:
            raise ValueError(f"precharge is {self.precharge!r}; it is a part of V: 0 truncates, 0.5 rounds, no more.")


def site_neurons(
    default: NeuronConfig, per_site: dict[str, dict[str, Any]] | None = None, sites: tuple[str, ...] = SITES
) -> dict[str, dict[str, Any]]:
    """The value of `MarConfig.neurons`: `default` at each of `sites`, with `per_site` changes (e.g. T at down_proj)."""
    changes = per_site or {}
    for site in (*sites, *changes):
        _one_of("site", site, SITES)
    for site in changes:
        if site not in sites:
            raise ValueError(
                f"neuron settings name site {site!r}, which is not among the placed sites {list(sites)}; place neurons "
                "there too, or leave its settings out."
            )
    return {site: asdict(replace(default, **changes.get(site, {}))) for site in sites}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # By type too, because 1 equals True.
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise ValueError(f"{what} is {value!r}; use one of {', '.join(map(repr, allowed))}.")


# Runtime shape checkers would wrap the generated __init__ and lose the fields that transformers passes on. Values are
# checked here and not by huggingface_hub's `strict`, whose errors are no ValueErrors and name no remedy.
@no_type_check
class MarConfig(PreTrainedConfig):
    """A LLaMA-shaped decoder whose attention is a Discrete Mamba-2 mixer, with optional neurons before its linears.

    num_heads (H), head_dim (P) and state_size (N) shape the mixer: d_inner = H * P, and B, C have H heads of N.
    conv_kernel: taps of the causal depthwise convolution. chunk_size: tokens per block of the chunked scan.
    input_gain: `none` (as published) or `one_minus_decay` (zero-order hold: x is scaled by 1 - decay).
    bc_norm: `none` (as published) or `l2` (B and C of unit length per head, C then times sqrt(N)).
    decay_bias: whether the decay logits have a trainable bias per head (off as published).
    window: tokens that attention beside the scan looks at, the current one counted and the first one of all besides; 0
        (as published) for no attention. rotary_base: of its positions. Ours, see `mar.window`.
    neurons: None for a dense model, else a mapping from site to the fields of `NeuronConfig` (see `site_neurons`).
    compact: how a compact folder holds its weights (see `mar.compact`); None for any other, and in a model once loaded.
    """

    model_type = "mar"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_heads: int = 9
    head_dim: int = 64
    state_size: int = 64
    conv_kernel: int = 4
    chunk_size: int = 64
    input_gain: str = "one_minus_decay"
    bc_norm: str = "l2"
    decay_bias: bool = True
    window: int = 0
    rotary_base: float = 10000.0
    neurons: dict[str, Any] | None = None
    compact: dict[str, Any] | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.validate_architecture()
        super().__post_init__(**kwargs)
        # The Auto classes find a model by its config's class: registering the models no later than the first config
        # is made lets `import mar` stay free of torch. By name, because the model lies above its config.
        importlib.import_module("mar.model")

    def validate_architecture(self) -> None:
        """Refuse shapes and choices that make no model, with a ValueError naming field, value and remedy."""
        _one_of("input_gain", self.input_gain, ("none", "one_minus_decay"))
        _one_of("bc_norm", self.bc_norm, ("none", "l2"))
        _one_of("hidden_act", self.hidden_act, tuple(importlib.import_module("transformers.activations").ACT2FN))
        for name in ("decay_bias", "use_cache", "mlp_bias", "tie_word_embeddings"):
            _one_of(name, getattr(self, name), (True, False))
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_heads", "head_dim")
        for name in (*sizes, "state_size", "conv_kernel", "chunk_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1.")
        least = max(2, self.conv_kernel)  # what is carried over holds the convolution's inputs and a position
        if not _is_integer(self.window) or not (self.window == 0 or least <= self.window <= MOST_WINDOW):
            raise ValueError(
                f"window is {self.window!r}; use 0 for none, or {least} (conv_kernel, and never 1) to {MOST_WINDOW}."
            )
        if self.window and self.state_size % 2:
            raise ValueError(f"state_size is {self.state_size}; a window turns pairs of channels, so it must be even.")
        if not _is_number(self.rotary_base) or not 0 < self.rotary_base < sys.float_info.max:
            raise ValueError(f"rotary_base is {self.rotary_base!r}; it must be a number above 0.")
        for name in ("initializer_range", "rms_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; it must be a number from 0 up.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if value is not None and not all(map(_is_integer, several)):
                raise ValueError(f"{name} is {value!r}; it must be a token's integer id, or None where there is none.")
        self._validate_neurons()

    def _validate_neurons(self) -> None:
        if self.neurons is None:
            return
        if not isinstance(self.neurons, dict):
            raise ValueError(f"neurons is {self.neurons!r}; use None, or what `mar.config.site_neurons` gives.")
        known = {field.name for field in fields(NeuronConfig)}
        for site, settings in self.neurons.items():
            _one_of("site", site, SITES)
            if not isinstance(settings, dict):
                raise ValueError(f"neurons.{site} is {settings!r}; use a mapping of the fields {sorted(known)}.")
            if unknown := set(settings) - known:
                raise ValueError(f"neurons.{site} has unknown keys {sorted(unknown)}; known are {sorted(known)}.")
            try:
                NeuronConfig(**settings)
            except ValueError as error:
                raise ValueError(f"neurons.{site}: {error}") from error

    @property
    def inner_size(self) -> int:
        """d_inner = H * P, the width of x, z and y."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.inner_size + 2 * self.num_heads * self.state_size

    @property
    def in_proj_size(self) -> int:
        """Rows of in_proj: [x, B, C | z | A_log]."""
        return self.conv_size + self.inner_size + self.num_heads

    @property
    def layer_types(self) -> list[str]:
        """Tells transformers' caches that each layer keeps a convolution state and a recurrent state."""
        return ["linear_attention"] * self.num_hidden_layers

    def neuron(self, site: Site) -> NeuronConfig | None:
        """The neuron of one site, or None where the linear sees dense values."""
        if self.neurons is None or site not in self.neurons:
            return None
        return NeuronConfig(**self.neurons[site])


AutoConfig.register("mar", MarConfig)
