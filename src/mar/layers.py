"""A teacher or student run layer by layer, so that each layer can be compared, calibrated or trained on its own.

Does: walk LLaMA and MAR models without gradients, documents of a packed row apart; sum up what linears are given.
Does not: hold losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from mar.compact import HEAD_PLACE
from mar.model import MarForCausalLM

Batch = dict[str, Tensor]

NEURON_PLACES = ("mixer.in_neuron", "mixer.out_neuron", "mlp.in_neuron", "mlp.down_neuron")
"""The modules of a MAR layer whose outputs its linears multiply, identities in a dense model."""


def document_positions(document_ids: Tensor) -> Tensor:
    """Positions (b, l) that restart at 0 with every document of a packed row."""
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(starts, steps, 0).cummax(1).values


@dataclass
class LayerTrace:
    """One layer on one batch, (b, l, d) each unless said otherwise.

    hidden: its input. mixed: what attention or mixer adds. heads: what attention's heads give before o_proj,
    (b, l, h, p); None for MAR layers. middle: hidden + mixed. ffn: what the FFN adds; None where not run.
    """

    hidden: Tensor
    mixed: Tensor
    heads: Tensor | None
    middle: Tensor
    ffn: Tensor | None


def llama_layers(teacher: Any, batch: Batch) -> Iterator[LayerTrace]:
    """Run a LLaMA layer by layer without gradients, documents of a packed row apart. The last FFN is not run."""
    body = teacher.model
    positions = document_positions(batch["document_ids"])
    # Gradients are switched off around the work and not around the yield, where the caller's own mode must hold.
    with torch.no_grad():
        hidden = body.embed_tokens(batch["input_ids"])
        mask = create_causal_mask(
            config=teacher.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = body.rotary_emb(hidden, position_ids=positions)
    for index, layer in enumerate(body.layers):
        with torch.no_grad():
            normed = layer.input_layernorm(hidden)
            with captured([layer.self_attn.o_proj], inputs=True) as seen:
                mixed, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
            heads = seen[0].unflatten(-1, (-1, teacher.config.head_dim))
            middle = hidden + mixed
            last = index == len(body.layers) - 1
            ffn = None if last else layer.mlp(layer.post_attention_layernorm(middle))
        yield LayerTrace(hidden, mixed, heads, middle, ffn)
        if ffn is not None:
            hidden = middle + ffn


def mar_layers(model: MarForCausalLM, batch: Batch) -> Iterator[LayerTrace]:
    """Run a MAR model layer by layer without gradients."""
    with torch.no_grad():
        hidden = model.model.embed_tokens(batch["input_ids"])
    for layer in model.model.layers:
        block: Any = layer
        with torch.no_grad():
            mixed, _ = block.mixer(block.input_layernorm(hidden), None, None, batch["document_ids"])
            middle = hidden + mixed
            ffn = block.mlp(block.post_attention_layernorm(middle))
        yield LayerTrace(hidden, mixed, None, middle, ffn)
        hidden = middle + ffn


def last_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states (b, l, d) of a LLaMA or MAR model on packed rows."""
    if isinstance(model, MarForCausalLM):
        output = model.model(input_ids=batch["input_ids"], document_ids=batch["document_ids"], use_cache=False)
    else:
        positions = document_positions(batch["document_ids"])
        output = model.model(input_ids=batch["input_ids"], position_ids=positions, use_cache=False)
    return output.last_hidden_state


@torch.no_grad()
def input_moments(model: MarForCausalLM, batches: Iterable[Batch], tokens: int) -> dict[str, np.ndarray]:
    """The mean of x x^T / |x|^2, fp32, of what each linear multiplies, by the name of the neuron's place before it.

    What the head multiplies is there by the final norm's name. All tokens count alike, as some layers give a few
    tokens such sizes that these alone would decide. Of as many batches as hold `tokens` tokens. Raises ValueError if a
    mean is not finite.
    """
    sums: dict[str, Tensor] = {}
    places = [f"model.layers.{layer}.{place}" for layer in range(len(model.model.layers)) for place in NEURON_PLACES]
    places.append(HEAD_PLACE)
    handles = [model.get_submodule(name).register_forward_hook(_add_moment(sums, name)) for name in places]
    seen = 0
    try:
        for batch in batches:
            rows = {name: tensor.to(model.device) for name, tensor in batch.items()}
            last_hidden(model, rows)
            seen += rows["input_ids"].numel()
            if seen >= tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
    found = {name: (total / seen).cpu().numpy() for name, total in sums.items()}
    for name, moment in found.items():
        if not np.isfinite(moment).all():
            raise ValueError(f"What passes {name} is not finite; find the layer that it comes from.")
    return found


def _add_moment(sums: dict[str, Tensor], name: str) -> Any:
    def add(_module: nn.Module, _args: Any, output: Tensor) -> None:
        inputs = nn.functional.normalize(output.flatten(0, -2).float())
        sums[name] = torch.addmm(sums[name], inputs.T, inputs) if name in sums else inputs.T @ inputs

    return add


@contextmanager
def captured(modules: list[nn.Module], inputs: bool = False) -> Iterator[list[Any]]:
    """Outputs of the modules (or their first inputs), in the order they ran, for the duration of the block."""
    kept: list[Any] = []
    handles = [
        module.register_forward_hook(lambda _, args, output: kept.append(args[0] if inputs else output))
        for module in modules
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
