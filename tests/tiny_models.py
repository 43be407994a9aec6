"""Tiny models, packed rows and the measure of closeness that several test files share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mar.config import MarConfig
from mar.model import MarForCausalLM

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 6,
    "chunk_size": 8,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected, in fp64; NaN if either holds one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def mar_config(**changes: Any) -> MarConfig:
    return MarConfig(**{**SHAPE, **changes})


def mar_model(seed: int = 0, **changes: Any) -> MarForCausalLM:
    """A MAR model in eval mode none of whose parameters is zero or one, so that leaving any of them out shows."""
    torch.manual_seed(seed)
    model = MarForCausalLM(mar_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def llama_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A LLaMA in eval mode with 4 query heads, 2 KV heads and weights large enough for uneven attention."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def packed_rows(
    lengths: tuple[tuple[int, ...], ...] = ((5, 11, 8), (14, 1, 9)), seed: int = 0, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    """Rows of random tokens; `lengths` says how long the documents of each row are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    return {"input_ids": torch.randint(0, vocabulary, ids.shape, generator=generator), "document_ids": ids}


def documents(document_ids: Tensor) -> Iterator[tuple[int, slice]]:
    """Row and place of each document of packed rows."""
    for row, ids in enumerate(document_ids):
        starts = [t for t in range(len(ids)) if t == 0 or ids[t] != ids[t - 1]]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield row, slice(start, stop)
