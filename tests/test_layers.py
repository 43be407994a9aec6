"""Walking a model layer by layer gives what running it gives, with documents of a packed row apart."""

import pytest
import torch
from torch import Tensor, nn

from mar.config import NeuronConfig, site_neurons
from mar.layers import captured, document_positions, last_hidden, llama_layers, mar_layers
from tiny_models import documents, llama_model, mar_model, packed_rows

BATCH = packed_rows()


def one_document(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "document_ids": torch.zeros_like(batch["document_ids"])}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_positions_by_hand():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 4, 4], [7, 7, 7, 7, 7, 7]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert document_positions(ids).tolist() == expected
    assert document_positions(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 4, "head_dim": 12, "mlp_bias": True}], ids=["GQA", "wide"]
)
def test_llama_layers_are_the_llama(shape, attention):
    teacher, batch = llama_model(attn_implementation=attention, **shape), one_document(BATCH)
    with captured([layer.self_attn for layer in teacher.model.layers]) as attentions:
        output = teacher(batch["input_ids"], output_hidden_states=True)
    traces = list(llama_layers(teacher, batch))
    assert len(traces) == 2
    for trace, hidden, (mixed, _), layer in zip(
        traces, output.hidden_states, attentions[:2], teacher.model.layers, strict=False
    ):
        close(trace.hidden, hidden)
        close(trace.mixed, mixed)
        close(trace.middle, hidden + mixed)
        assert trace.heads is not None
        assert trace.heads.shape == (2, 24, 4, teacher.config.head_dim)
        close(layer.self_attn.o_proj(trace.heads.flatten(2)), mixed)
    assert traces[0].ffn is not None
    close(traces[0].middle + traces[0].ffn, output.hidden_states[1])
    assert traces[1].ffn is None  # nothing after it is of use to anyone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_layers_keep_documents_apart(attention):
    teacher = llama_model(attn_implementation=attention)
    together = list(llama_layers(teacher, BATCH))
    for row, place in documents(BATCH["document_ids"]):
        alone = {"input_ids": BATCH["input_ids"][row : row + 1, place]}
        alone["document_ids"] = torch.zeros_like(alone["input_ids"])
        for trace, own in zip(together, llama_layers(teacher, alone), strict=True):
            close(trace.hidden[row, place], own.hidden[0])
            close(trace.mixed[row, place], own.mixed[0])
            assert trace.heads is not None
            assert own.heads is not None
            close(trace.heads[row, place], own.heads[0])


@pytest.mark.parametrize("neurons", [None, site_neurons(NeuronConfig())], ids=["dense", "spiking"])
def test_mar_layers_are_the_model(neurons):
    model = mar_model(neurons=neurons)
    output = model.model(**BATCH, output_hidden_states=True)
    traces = list(mar_layers(model, BATCH))
    assert len(traces) == 2
    for trace, hidden in zip(traces, output.hidden_states, strict=False):
        close(trace.hidden, hidden)
        close(trace.middle, trace.hidden + trace.mixed)
        assert trace.heads is None
    assert traces[-1].ffn is not None
    close(model.model.norm(traces[-1].middle + traces[-1].ffn), output.last_hidden_state)


@pytest.mark.parametrize("build", [llama_model, mar_model])
def test_last_hidden_states_of_packed_rows_are_those_of_their_documents(build):
    model = build()
    hidden = last_hidden(model, BATCH)
    for row, place in documents(BATCH["document_ids"]):
        alone = model.model(BATCH["input_ids"][row : row + 1, place], use_cache=False).last_hidden_state
        close(hidden[row, place], alone[0])
    assert hidden.requires_grad


@pytest.mark.parametrize(("walk", "build"), [(llama_layers, llama_model), (mar_layers, mar_model)])
def test_walking_makes_no_graph_and_leaves_the_callers_mode_alone(walk, build):
    for trace in walk(build(), BATCH):
        assert torch.is_grad_enabled()
        assert not trace.hidden.requires_grad
        assert not trace.mixed.requires_grad
        assert not trace.middle.requires_grad
    assert torch.is_grad_enabled()


def test_captured_keeps_outputs_or_inputs_only_inside_its_block():
    first, second = nn.Linear(3, 4), nn.Linear(4, 5)
    x = torch.randn(2, 3)
    with captured([first, second]) as outputs, captured([second], inputs=True) as inputs:
        y = second(first(x))
    second(first(x))
    assert len(outputs) == 2
    assert outputs[1] is y
    assert len(inputs) == 1
    assert inputs[0] is outputs[0]


def test_captured_lets_go_when_the_block_fails():
    linear = nn.Linear(3, 4)
    with pytest.raises(KeyError), captured([linear]) as outputs:
        raise KeyError
    linear(torch.randn(2, 3))
    assert outputs == []
