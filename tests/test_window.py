"""Attention over a window and the first token: against one softmax a token, in any division of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mar.config import MarConfig
from mar.mixer import DiscreteMamba2
from mar.model import MarForCausalLM
from mar.window import rotary

HEADS, WIDTH, SIZE, WINDOW = 2, 4, 6, 5


def mixer_of() -> DiscreteMamba2:
    torch.manual_seed(0)
    config = MarConfig(
        hidden_size=12, num_heads=HEADS, head_dim=WIDTH, state_size=SIZE, window=WINDOW, rotary_base=100.0
    )
    mixer = DiscreteMamba2(config).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def plain(mixer: DiscreteMamba2, hidden: Tensor) -> Tensor:
    """One sequence (l, d): what its window adds to y, token by token."""
    config = mixer.config
    projected = hidden @ mixer.in_proj.weight.T
    x, b, c = projected[:, : config.conv_size].split([HEADS * WIDTH, HEADS * SIZE, HEADS * SIZE], dim=-1)
    x, b, c = x.view(-1, HEADS, WIDTH), b.view(-1, HEADS, SIZE), c.view(-1, HEADS, SIZE)
    half, outputs = SIZE // 2, []
    rates = config.rotary_base ** (-torch.arange(half).double() / half)

    def turned(vector: Tensor, position: int) -> Tensor:
        turn = torch.polar(torch.ones(half).double(), position * rates)
        return torch.view_as_real(torch.complex(vector[:, :half], vector[:, half:]) * turn).transpose(1, 2).flatten(1)

    for t in range(len(hidden)):
        looked_at = sorted({0, *range(max(0, t - config.window + 1), t + 1)})
        scores = torch.stack([(turned(c[t], t) * turned(b[s], s)).sum(-1) for s in looked_at])
        outputs.append((scores.softmax(0)[..., None] * x[looked_at]).sum(0))
    return torch.stack(outputs)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 23])
def test_it_is_one_softmax_over_the_last_tokens_and_the_first(length: int) -> None:
    mixer = mixer_of()
    hidden = torch.randn(3, length, 12, dtype=torch.float64)
    expected = torch.stack([plain(mixer, row) for row in hidden])
    torch.testing.assert_close(mixer.windowed(hidden), expected)


def test_rotary_positions_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 50.0}
    )
    vectors, positions = torch.randn(1, 9, 2, 8), torch.arange(9)[None]
    cos, sin = LlamaRotaryEmbedding(config)(vectors, positions)
    expected, _ = apply_rotary_pos_emb(vectors.transpose(1, 2), vectors.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotary(vectors, positions, 50.0), expected.transpose(1, 2))


@pytest.mark.parametrize("parts", [[1] * 17, [3, 1, 9, 4], [16, 1], [2, 15]])
def test_a_state_continues_a_sequence_exactly(parts: list[int]) -> None:
    mixer = mixer_of()
    hidden = torch.randn(2, sum(parts), 12, dtype=torch.float64)
    whole, last = mixer(hidden)
    outputs, state = [], None
    for part in hidden.split(parts, dim=1):
        out, state = mixer(part, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert state is not None
    for one, other in zip(state, last, strict=True):
        torch.testing.assert_close(one, other)


def test_documents_of_a_row_are_apart() -> None:
    mixer = mixer_of()
    hidden = torch.randn(1, 29, 12, dtype=torch.float64)
    ids = torch.tensor([[4] * 3 + [1] * 12 + [4] * 2 + [7] * 12])
    expected, state = zip(*(mixer(part) for part in hidden.split([3, 12, 2, 12], dim=1)), strict=True)
    found, last = mixer(hidden, None, None, ids)
    torch.testing.assert_close(found, torch.cat(expected, 1))
    for one, other in zip(last, state[-1], strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_document_continues_what_precedes_the_row() -> None:
    mixer = mixer_of()
    hidden = torch.randn(1, 20, 12, dtype=torch.float64)
    _, state = mixer(hidden[:, :8])
    ids = torch.tensor([[0] * 7 + [1] * 5])
    expected = torch.cat([mixer(hidden[:, :15])[0][:, 8:], mixer(hidden[:, 15:])[0]], 1)
    torch.testing.assert_close(mixer(hidden[:, 8:], state, None, ids)[0], expected)


@pytest.mark.parametrize("padding", [1, 4, 9])
def test_padding_on_the_left_leaves_no_trace(padding: int) -> None:
    mixer = mixer_of()
    hidden = torch.randn(2, 12, 12, dtype=torch.float64)
    padded = torch.cat([torch.randn(2, padding, 12, dtype=torch.float64), hidden], dim=1)
    mask = torch.ones(2, padding + 12, dtype=torch.bool)
    mask[:, :padding] = False
    found, state = mixer(padded, None, mask)
    expected, alone = mixer(hidden)
    torch.testing.assert_close(found[:, padding:], expected)
    more = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(more, state)[0], mixer(more, alone)[0])


def test_padding_before_a_later_document_leaves_no_trace() -> None:
    mixer = mixer_of()
    hidden = torch.randn(1, 14, 12, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 10])
    mask = torch.ones(1, 14, dtype=torch.bool)
    mask[:, 4:7] = False
    found, last = mixer(hidden, None, mask, ids)
    expected, state = mixer(hidden[:, 7:])
    torch.testing.assert_close(found[:, 7:], expected)
    for one, other in zip(last, state, strict=True):
        torch.testing.assert_close(one, other)


def test_a_document_of_padding_only_leaves_nothing() -> None:
    mixer = mixer_of()
    hidden = torch.randn(1, 15, 12, dtype=torch.float64)
    ids = torch.tensor([[0] * 9 + [1] * 3])
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, 9:] = False
    _, state = mixer(hidden[:, :12], None, mask, ids)
    torch.testing.assert_close(mixer(hidden[:, 12:], state)[0], mixer(hidden[:, 12:])[0])


def test_no_tokens_change_nothing() -> None:
    mixer = mixer_of()
    hidden = torch.randn(2, 9, 12, dtype=torch.float64)
    _, state = mixer(hidden[:, :6])
    nothing, same = mixer(hidden[:, :0], state)
    assert nothing.shape == (2, 0, 12)
    torch.testing.assert_close(mixer(hidden[:, 6:], same)[0], mixer(hidden[:, 6:], state)[0])


def test_gradients_are_right() -> None:
    mixer = mixer_of()
    hidden = torch.randn(1, 11, 12, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0] * 3 + [1] * 8])
    assert torch.autograd.gradcheck(lambda x: mixer.windowed(x, ids), (hidden,))


def test_generation_with_a_cache_is_generation_without() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
    model = MarForCausalLM(MarConfig(**sizes, num_heads=2, head_dim=4, state_size=6, window=5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    prompt = torch.randint(3, 50, (2, 4))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **options))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), mask], 1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 3:], cached)


def test_a_mixer_with_a_window_has_no_one_matrix() -> None:
    with pytest.raises(ValueError, match="window is 5"):
        mixer_of().matrix(torch.randn(1, 3, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"window": 3}, "window is 3"), ({"window": 1, "conv_kernel": 1}, "window is 1"),
     ({"window": -1}, "window is -1"), ({"window": 1 << 40}, f"window is {1 << 40}"),
     ({"window": 8, "rotary_base": 10**400}, "rotary_base is 1000"), ({"window": 8.0}, "window is 8.0"),
     ({"window": 8, "state_size": 5}, "state_size is 5"), ({"window": 8, "rotary_base": 0}, "rotary_base is 0")],
)  # fmt: skip
def test_settings_that_make_no_window_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarConfig(**choices)
