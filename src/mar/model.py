"""The MAR language model as transformers classes: generate, Auto classes, caches and save/load work as for any other.

Does: embed, stack of (norm, mixer, norm, FFN) with optional neurons before the four linears, head. Does not: convert
checkpoints (mar.conversion) or compute distillation losses (mar.losses).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from mar import kernels
from mar.compact import expand
from mar.config import SITES, MarConfig, Site
from mar.kernels.reference import segments
from mar.mixer import DiscreteMamba2, MixerState
from mar.neurons import Neuron, build_neuron
from mar.weights import INDEX

WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of from_pretrained that say where a model's files are."""

OPEN_GATE = 1.278464542761
"""silu(1.278464542761) = 1: with zero gate rows this bias lets the mixer's output through unchanged (Llamba)."""


class MarMLP(nn.Module):
    """LLaMA's gated FFN, down(act(gate(s)) * up(s)), with one neuron before gate and up and one before down."""

    def __init__(self, config: MarConfig):
        super().__init__()
        wide = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, wide, bias=config.mlp_bias)
        self.down_proj = nn.Linear(wide, config.hidden_size, bias=config.mlp_bias)
        self.act = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]
        in_neuron, down_neuron = config.neuron("gate_up"), config.neuron("down_proj")
        self.in_neuron = build_neuron(in_neuron, config.hidden_size) if in_neuron else nn.Identity()
        self.down_neuron = build_neuron(down_neuron, wide) if down_neuron else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d)."""
        spikes = self.in_neuron(hidden)
        gate, up = self.gate_proj(spikes), self.up_proj(spikes)
        unit = kernels.silu_product(gate, up) if self.act is None else self.act(gate) * up
        return self.down_proj(self.down_neuron(unit))


class RMSNorm(nn.RMSNorm):
    """torch's, saving less for backward."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d)."""
        return kernels.rms_norm(x, self.weight, cast(float, self.eps))


class MarDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer: h + mixer(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: MarConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = DiscreteMamba2(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MarMLP(config)

    def forward(
        self,
        hidden: Tensor,
        state: MixerState | None = None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, MixerState]:
        """(b, l, d) and what precedes it to (b, l, d) and the state after it."""
        mixed, after = self.mixer(self.input_layernorm(hidden), state, mask, document_ids)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), after


class MarPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the capabilities that transformers asks about."""

    config: MarConfig
    config_class = MarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MarDecoderLayer"]
    _is_stateful = True

    def __init__(self, config: MarConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        config.compact = None  # that is about a folder; a model holds floats, and saves them

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Self:
        """As in transformers; the weights of a compact folder (`mar pack`) become floats.

        Raises mar.compact.DamagedWeights, a ValueError, where they are not what the config says.
        """
        name, settings = pretrained_model_name_or_path, config
        where = {key: kwargs[key] for key in WHERE if key in kwargs}
        if name is not None and not isinstance(config, PreTrainedConfig):
            settings = MarConfig.from_pretrained(config or name, **where)
        if name is None or getattr(settings, "compact", None) is None:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **where)
        index = None if single else cached_file(name, INDEX, **where)
        files: Any = [single] if single else get_checkpoint_shard_files(name, index, **where)[0]
        weights = expand(settings.to_dict(), *(Path(file).read_bytes() for file in files))
        tensors = {key: torch.from_numpy(np.require(value, requirements="W")) for key, value in weights.items()}
        with suppress(OSError):
            kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(name, **where))
        return super().from_pretrained(None, *model_args, config=config or name, state_dict=tensors, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, DiscreteMamba2):
            init.copy_(module.conv_weight, identity_conv(module.config))
            init.zeros_(module.conv_bias)
            init.constant_(module.z_bias, OPEN_GATE)
            init.zeros_(module.D)
            if module.decay_bias is not None:
                init.copy_(module.decay_bias, spread_decay_bias(module.config.num_heads))
        elif isinstance(module, Neuron):
            init.zeros_(module.a)


def identity_conv(config: MarConfig) -> Tensor:
    """Convolution weights (conv_size, K) that pass the current token through."""
    weight = torch.zeros(config.conv_size, config.conv_kernel)
    weight[:, -1] = 1.0
    return weight


def spread_decay_bias(heads: int) -> Tensor:
    """Decay biases (heads,) whose softplus runs geometrically from 0.0025 (a memory of 400 tokens) to 1."""
    rates = torch.logspace(torch.log10(torch.tensor(0.0025)).item(), 0.0, heads)
    return torch.log(torch.expm1(rates))


class MarCache(DynamicCache):
    """A DynamicCache of convolution and recurrent states that also counts tokens, which `generate` asks for.

    mask: (b, tokens), False at padding; None as long as there was none. A row that ended in padding cannot go on.
    """

    def __init__(self, config: MarConfig):
        super().__init__(config=config)
        self.tokens = 0
        self.mask: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.tokens

    @property
    def is_compileable(self) -> bool:
        """No: for a cache that is, `generate` replaces the 2-D padding mask."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens = 0
        self.mask = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, as beam search does."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.mask = None if self.mask is None else self.mask[beam_idx]


class MarModel(MarPreTrainedModel):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, config: MarConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MarDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Hidden states (b, l, d) after the final norm.

        attention_mask: (b, l) or (b, past + l), zero at padding; ValueError where tokens follow padding that follows
        tokens, in one call or over several, as when right-padded rows are continued: pad on the left. document_ids:
        (b, l) for packed rows; convolution, state and window restart where it changes. past_key_values: a MarCache
        made for this config.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give the model exactly one of input_ids and inputs_embeds.")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and kernels.int8_entered():
            raise ValueError(
                "The model has gradient checkpointing on, and int8 products do not reach what that computes again; "
                "call its gradient_checkpointing_disable(), or set precision to 'fp32' or 'bf16'."
            )
        hidden = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = MarCache(self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        states = [
            None if past_key_values is None else _load_state(past_key_values, index, len(hidden), self.config)
            for index in range(len(self.layers))
        ]
        whole = _whole_mask(attention_mask, document_ids, hidden.shape, past, getattr(past_key_values, "mask", None))
        mask = None if whole is None or bool(whole[:, past:].all()) else whole[:, past:]
        kept = [hidden] if output_hidden_states else None
        for index, layer in enumerate(self.layers):
            hidden, state = layer(hidden, states[index], mask, document_ids)
            if past_key_values is not None:
                _store_state(past_key_values, index, state)
            if kept is not None:
                kept.append(hidden)
        if isinstance(past_key_values, MarCache):
            past_key_values.tokens += hidden.shape[1]
            past_key_values.mask = whole
        hidden = self.norm(hidden)
        if kept is not None:
            kept[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(kept) if kept is not None else None,  # type: ignore[arg-type]
        )


def _whole_mask(
    attention_mask: Tensor | None, document_ids: Tensor | None, shape: torch.Size, past: int, seen: Tensor | None
) -> Tensor | None:
    """(b, past + l) bool, False at padding, or None where nothing is padded.

    shape: (b, l, d) of the new tokens. seen: (b, past), what this gave for the tokens in the cache. Raises ValueError
    for masks of other shapes, for those that deny `seen`, and for padding between the tokens of a document: it would
    take the place of what precedes it in convolution and window.
    """
    rows, length = shape[:2]
    if attention_mask is None:
        if seen is None:
            return None
        attention_mask = seen.new_ones(rows, length)
    if attention_mask.dim() != 2 or attention_mask.shape not in ((rows, length), (rows, past + length)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give ({rows}, {length}), "
            f"or ({rows}, {past + length}) with the tokens that the cache has seen."
        )
    given = attention_mask.bool()
    if seen is None and bool(given.all()):
        return None
    before = given.new_ones(rows, past) if seen is None else seen
    if given.shape[1] > length and not torch.equal(given[:, :past], before):
        raise ValueError(
            f"attention_mask has other padding among the {past} tokens that the cache has seen than the calls that it "
            "saw them in; give those the same mask, or read the rows again without that cache."
        )
    new = given[:, given.shape[1] - length :]
    whole = torch.cat([before, new], dim=1)
    if not bool(whole[:, max(0, past - 1) :].all()):
        # Of what the cache has seen it only matters whether a row has begun and whether it has ended.
        ends = torch.cat([before.any(1, keepdim=True), before[:, -1:]], dim=1)
        documents = None if document_ids is None else segments(document_ids)
        if documents is not None:
            documents = torch.cat([documents[:, :1].expand(ends.shape), documents], dim=1)
        _check_padding(torch.cat([ends, new], dim=1), documents)
    return whole


def _check_padding(mask: Tensor, documents: Tensor | None) -> None:
    for row, real in enumerate(mask):
        index = real.nonzero()[:, 0]
        apart = index.diff() > 1
        if documents is not None:
            apart &= documents[row, index].diff() == 0
        if bool(apart.any()):
            raise ValueError(
                f"attention_mask has padding between the tokens of row {row}, those in the cache included; pad on the "
                "left (tokenizer.padding_side = 'left')."
            )


def _load_state(cache: Cache, index: int, rows: int, config: MarConfig) -> MixerState | None:
    """What a layer left behind, or None before any token. Raises ValueError for another model's, or other rows'."""
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers and this model {config.num_hidden_layers}; "
            "give it a MarCache of its own config."
        )
    if not cache.has_previous_state(index):
        return None
    layer: Any = cache.layers[index]
    state = MixerState(layer.conv_states[0].transpose(1, 2), layer.recurrent_states[0])
    carried = (config.window, config.conv_size + 1) if config.window else (config.conv_kernel - 1, config.conv_size)
    expected = (rows, *carried), (rows, config.num_heads, config.head_dim, config.state_size)
    found = tuple(state.conv.shape), tuple(state.ssm.shape)
    if found != expected:
        raise ValueError(
            f"past_key_values holds states of shapes {found} where these rows and this model need {expected}; "
            "give the cache that these rows left behind."
        )
    return state


def _store_state(cache: Cache, index: int, state: MixerState) -> None:
    # The cache layer appends what it is given and keeps as many columns as it saw first: a whole new tail replaces it.
    cache.update_conv_state(state.conv.transpose(1, 2), index)
    cache.update_recurrent_state(state.ssm.detach(), index)


class MarForCausalLM(MarPreTrainedModel, GenerationMixin):
    """MarModel with a language-model head; the head sees dense values, never spikes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MarConfig):
        super().__init__(config)
        self.model = MarModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits (b, kept, V), and the mean next-token loss if `labels` (b, l) are given (-100 is ignored)."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            document_ids=document_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.lm_head(hidden[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward of `generate` makes a MarCache

    def neuron_sites(self) -> Iterator[tuple[int, Site, Neuron]]:
        """Each neuron with its layer and site, in the order in which a token meets them."""
        for index, layer in enumerate(self.model.layers):
            layer = cast(MarDecoderLayer, layer)
            neurons = (layer.mixer.in_neuron, layer.mixer.out_neuron, layer.mlp.in_neuron, layer.mlp.down_neuron)
            for site, neuron in zip(SITES, neurons, strict=True):
                if isinstance(neuron, Neuron):
                    yield index, site, neuron

    def neuron_linears(self, layer: int, site: Site) -> list[nn.Linear]:
        """The linears that one site's spikes feed."""
        block = cast(MarDecoderLayer, self.model.layers[layer])
        return {
            "in_proj": [block.mixer.in_proj],
            "out_proj": [block.mixer.out_proj],
            "gate_up": [block.mlp.gate_proj, block.mlp.up_proj],
            "down_proj": [block.mlp.down_proj],
        }[site]


AutoModel.register(MarConfig, MarModel)
AutoModelForCausalLM.register(MarConfig, MarForCausalLM)
