"""The model as transformers sees it: state, generation, caches, Auto classes; and the config that makes it."""

import copy
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

from mar import kernels
from mar.config import SITES, MarConfig, NeuronConfig, site_neurons
from mar.layers import captured
from mar.model import MarCache, MarForCausalLM, MarModel, identity_conv, spread_decay_bias
from mar.neurons import Neuron
from tiny_models import VOCABULARY, documents, mar_config, mar_model, packed_rows, rms_ratio

SPIKING = site_neurons(NeuronConfig(), {"down_proj": {"time_steps": 9, "precharge": 0.5}})
TOKENS = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def greedy(model: MarForCausalLM, ids: Tensor, count: int) -> Tensor:
    """By hand and without a cache: the whole sequence anew for every token."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture(scope="module")
def model() -> MarForCausalLM:
    return mar_model()


# State


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 29), max_size=6, unique=True))
@torch.no_grad()
def test_any_split_gives_the_same_logits_and_state(cuts):
    model = mar_model().double()
    ids = tokens(2, 30)
    whole = model(ids)
    cache, pieces = None, []
    for start, stop in pairwise([0, *sorted(cuts), 30]):
        output = model(ids[:, start:stop], past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits)
    assert cache.get_seq_length() == 30
    for layer, expected in zip(cache.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.recurrent_states[0], expected.recurrent_states[0])
        torch.testing.assert_close(layer.conv_states[0], expected.conv_states[0])


@torch.no_grad()
def test_packed_documents_are_separate_inputs(model):
    batch = packed_rows()
    logits = model(**batch).logits
    for row, place in documents(batch["document_ids"]):
        alone = model(batch["input_ids"][row : row + 1, place]).logits
        torch.testing.assert_close(logits[row, place], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pads", [[7], [7, 0, 2]], ids=["batch of 1", "batch of 3"])
@torch.no_grad()
def test_left_padding_leaves_no_trace(model, pads):
    ids = tokens(len(pads), 20)
    mask = torch.stack([torch.arange(20) >= pad for pad in pads]).long()
    logits = model(ids, attention_mask=mask).logits
    for row, pad in enumerate(pads):
        torch.testing.assert_close(logits[row, pad:], model(ids[row : row + 1, pad:]).logits[0], rtol=1e-4, atol=1e-4)


def test_padding_of_a_mask_that_covers_the_past_too(model):
    """As `generate` hands it over: (b, past + current)."""
    ids, mask = tokens(2, 12), torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    with torch.no_grad():
        whole = model(ids, attention_mask=mask)
        first = model(ids[:, :4], attention_mask=mask[:, :4])
        then = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, whole.logits[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_padding_between_tokens_is_refused(model, cached):
    ids, mask = tokens(2, 9), torch.tensor([[1] * 9, [1] * 4 + [0] * 2 + [1] * 3])
    cache = model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values if cached else None
    with pytest.raises(ValueError, match=r"padding between the tokens of row 1, .*; pad on the left"):
        model(ids[:, 6:] if cached else ids, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("later", [None, [[1] * 3] * 2, [[1] * 6 + [0] * 3, [1] * 4 + [0] * 2 + [1] * 3]])
@torch.no_grad()
def test_padding_between_the_tokens_of_two_calls_is_refused(model, later):
    ids, mask = tokens(2, 9), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    cache = model(ids[:, :6], attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match=r"padding between the tokens of row 1, .*; pad on the left"):
        model(ids[:, 6:], attention_mask=None if later is None else torch.tensor(later), past_key_values=cache)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (None, [[0] + [1] * 8, [1] * 9]),
        ([[0] + [1] * 5, [1] * 6], [[1] * 9] * 2),
        ([[1] * 6, [1] * 4 + [0] * 2], [[1] * 9] * 2),
    ],
    ids=["none before", "none now", "none now after tokens"],
)
@torch.no_grad()
def test_a_mask_that_denies_what_the_cache_has_seen_is_refused(model, then, now):
    ids = tokens(2, 9)
    cache = model(ids[:, :6], attention_mask=None if then is None else torch.tensor(then)).past_key_values
    with pytest.raises(ValueError, match=r"other padding among the 6 tokens that the cache has seen .*; give those"):
        model(ids[:, 6:], attention_mask=torch.tensor(now), past_key_values=cache)


@pytest.mark.parametrize("whole", [False, True], ids=["masks of calls", "masks of all tokens"])
@torch.no_grad()
def test_padding_at_both_ends_may_be_spread_over_calls(model, whole):
    ids, mask = tokens(3, 12), torch.tensor([[0] * 5 + [1] * 7, [1] * 6 + [0] * 6, [1] * 12])
    expected = model(ids, attention_mask=mask).logits
    cache = MarCache(model.config)
    pieces = [
        model(ids[:, start:stop], attention_mask=mask[:, 0 if whole else start : stop], past_key_values=cache).logits
        for start, stop in ((0, 3), (3, 7), (7, 8), (8, 12))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1)[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_take_their_padding_along(model):
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    cache = model(ids, attention_mask=mask).past_key_values
    cache.reorder_cache(torch.tensor([0, 0]))
    following = ids[:1, :1].expand(2, 1)
    whole = model(torch.cat([ids[:1].expand(2, 6), following], dim=1)).logits
    step = model(following, past_key_values=cache).logits
    torch.testing.assert_close(step, whole[:, -1:], rtol=1e-4, atol=1e-4)
    cache.reset()
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_between_the_tokens_of_a_document_is_refused(model):
    ids, mask = tokens(1, 9), torch.tensor([[1] * 4 + [0] * 2 + [1] * 3])
    with pytest.raises(ValueError, match="padding between the tokens of row 0"):
        model(ids, attention_mask=mask, document_ids=torch.zeros_like(ids))
    apart = model(ids, attention_mask=mask, document_ids=torch.tensor([[0] * 4 + [1] * 5])).logits
    torch.testing.assert_close(apart[:, 6:], model(ids[:, 6:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9), (2, 1, 9, 9)])
def test_masks_of_other_shapes_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*; give \(2, 9\)"):
        model(tokens(2, 9), attention_mask=torch.ones(shape, dtype=torch.long))


def test_a_cache_can_be_emptied_and_used_again(model):
    ids = tokens(1, 8)
    with torch.no_grad():
        fresh = model(ids)
        cache = fresh.past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(ids, past_key_values=cache)
    assert torch.equal(again.logits, fresh.logits)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"num_hidden_layers": 1}, 2), ({"state_size": 16}, 2), ({"conv_kernel": 3}, 2), ({"window": 8}, 2), ({}, 1)],
    ids=["layers", "state size", "convolution", "window", "rows"],
)
def test_caches_of_other_models_and_rows_are_refused(model, changes, rows):
    cache = mar_model(**changes)(tokens(rows, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values h(as|olds) .*; give"):
        model(tokens(2, 5), past_key_values=cache)


# Generation


def test_greedy_generation_is_the_argmax_by_hand(model):
    ids = tokens(3, 9)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0), greedy(model, ids, 12))


@pytest.mark.parametrize(
    "changes",
    [{"conv_kernel": 1}, {"neurons": SPIKING}, {"tie_word_embeddings": True}],
    ids=["no convolution", "spiking", "tied"],
)
def test_other_models_generate_too(changes):
    model, ids = mar_model(**changes), tokens(2, 9)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), greedy(model, ids, 6))


def test_a_batch_with_left_padding_generates_as_each_row_alone(model):
    ids, pads = tokens(3, 10), [6, 0, 9]
    mask = torch.stack([torch.arange(10) >= pad for pad in pads]).long()
    ids[mask == 0] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, pad in enumerate(pads):
        assert torch.equal(together[row : row + 1, pad:], greedy(model, ids[row : row + 1, pad:], 8))


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4, "num_return_sequences": 2, "do_sample": False}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beam search", "sampling"],
)
def test_cached_states_follow_their_sequences(model, settings):
    """Beams change places at every token; the same search without a cache has no states to mix up."""
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        given = {"max_new_tokens": 10, "pad_token_id": 0, "use_cache": use_cache, **settings}
        found.append(model.generate(TOKENS, **given))
    assert torch.equal(*found)


def test_generation_goes_on_from_a_kept_cache(model):
    """A conversation: the second turn reads only what is new, given the whole text or the new tokens alone."""
    first = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    text = torch.cat([first.sequences, tokens(1, 4)], 1)
    expected = greedy(model, text, 5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    seen = first.past_key_values.get_seq_length()
    assert seen == 7 + 4  # the last token was given out, not read
    kept = copy.deepcopy(first.past_key_values)
    with captured([model.model.embed_tokens], inputs=True) as read:
        assert torch.equal(model.generate(text, past_key_values=first.past_key_values, **settings), expected)
        new = model.generate(text[:, seen:], attention_mask=torch.ones_like(text), past_key_values=kept, **settings)
    assert torch.equal(new[:, -5:], expected[:, -5:])
    assert [ids.shape[1] for ids in read] == [text.shape[1] - seen, 1, 1, 1, 1] * 2


def test_prompt_read_in_chunks(model):
    cache = MarCache(model.config)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 3}
    assert torch.equal(model.generate(TOKENS, past_key_values=cache, **settings), greedy(model, TOKENS, 5))


def test_generation_from_embeddings(model):
    ids = tokens(1, 6)
    found = model.generate(
        inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found, greedy(model, ids, 5)[:, 6:])


def test_generation_in_training_mode(model):
    """Samples are taken in the middle of training; nothing of the model depends on the mode."""
    training = copy.deepcopy(model).train()
    assert torch.equal(
        training.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0), greedy(model, TOKENS, 5)
    )


def test_text_generation_pipeline(tiny_tokenizer):
    model = mar_model(vocab_size=len(tiny_tokenizer), eos_token_id=tiny_tokenizer.eos_token_id)
    write = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = ["The river rose", "A good recipe names every"]
    alone = [write(text, **settings)[0]["generated_text"] for text in texts]
    together = [found[0]["generated_text"] for found in write(texts, batch_size=2, **settings)]
    assert together == alone
    ids = tiny_tokenizer(texts[0], return_tensors="pt").input_ids
    expected = greedy(model, ids, 6)[0, ids.shape[1] :].tolist()
    if 2 in expected:
        expected = expected[: expected.index(2)]
    assert alone[0] == tiny_tokenizer.decode(expected)


# What forward takes and gives


def test_loss_is_next_token_cross_entropy(model):
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    assert model(ids).loss is None


def test_hidden_states_are_layer_inputs_and_the_normed_end(model):
    ids = tokens(2, 9)
    with captured(list(model.model.layers), inputs=True) as kept:
        output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    for found, expected in zip(output.hidden_states, kept, strict=False):
        assert torch.equal(found, expected)
    assert torch.equal(output.logits, model.lm_head(output.hidden_states[-1]))
    assert model(ids).hidden_states is None


def test_embeddings_in_place_of_ids(model):
    ids = tokens(2, 9)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


def test_only_the_logits_that_are_asked_for(model):
    ids = tokens(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    assert logits.shape == (2, 9, VOCABULARY)


def test_caches_are_made_in_evaluation_and_on_demand(model):
    ids = tokens(1, 4)
    assert isinstance(model(ids).past_key_values, MarCache)
    assert model(ids, use_cache=False).past_key_values is None
    training = copy.deepcopy(model).train()
    assert training(ids).past_key_values is None
    assert isinstance(training(ids, use_cache=True).past_key_values, MarCache)


@pytest.mark.parametrize("neurons", [None, SPIKING], ids=["dense", "spiking"])
def test_gradient_checkpointing_gives_the_same_gradients(neurons):
    batch = packed_rows()
    model = mar_model(neurons=neurons).train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    runs = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert len(runs) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_gets_a_gradient():
    model, batch = mar_model(neurons=SPIKING), packed_rows()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_16_bits(model):
    """Autocast and a model wholly in bf16 both stay near fp32."""
    ids = tokens(2, 20)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_ratio(model(ids).logits, expected) < 0.05
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).logits.dtype == torch.bfloat16
    assert rms_ratio(half(ids).logits, expected) < 0.1
    assert half.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (2, 23)


# Parts


def test_a_fresh_model_has_an_open_gate_and_an_identity_convolution():
    model = MarForCausalLM(mar_config())
    mixer = model.model.layers[0].mixer
    torch.testing.assert_close(F.silu(mixer.z_bias), torch.ones_like(mixer.z_bias))
    assert torch.equal(mixer.conv_weight, identity_conv(model.config))
    xbc = torch.randn(2, 5, model.config.conv_size)
    torch.testing.assert_close(kernels.causal_conv(xbc, mixer.conv_weight, mixer.conv_bias), xbc)
    assert not mixer.D.any()
    assert 0.15 < mixer.in_proj.weight.std() < 0.25
    assert (model.model.norm.weight == 1).all()


def test_decay_biases_spread_from_long_to_short_memory():
    rates = F.softplus(spread_decay_bias(5))
    torch.testing.assert_close(rates[[0, -1]], torch.tensor([0.0025, 1.0]))
    torch.testing.assert_close(rates[1:] / rates[:-1], torch.full((4,), 400**0.25))


def test_neuron_sites_and_the_linears_they_feed():
    model = mar_model(neurons=SPIKING)
    found = list(model.neuron_sites())
    assert [(layer, site) for layer, site, _ in found] == [(layer, site) for layer in (0, 1) for site in SITES]
    for layer, site, neuron in found:
        assert isinstance(neuron, Neuron)
        assert neuron.config.time_steps == (9 if site == "down_proj" else 4)
        linears = model.neuron_linears(layer, site)
        # in_proj's weight is used in two precisions, without its module being called
        called = [] if site == "in_proj" else linears
        with captured([neuron]) as spikes, captured(called, inputs=True) as inputs:
            model(tokens(1, 5))
        assert len(inputs) == len(called)
        assert all(given is spikes[0] for given in inputs)
        assert len(linears) == (2 if site == "gate_up" else 1)
        assert all(linear.in_features == neuron.channels for linear in linears)
    assert not list(mar_model().neuron_sites())


def test_some_sites_only():
    model = mar_model(neurons=site_neurons(NeuronConfig(), sites=("gate_up",)))
    assert [site for _, site, _ in model.neuron_sites()] == ["gate_up"] * 2
    assert sum(isinstance(module, Neuron) for module in model.modules()) == 2


# On disk


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_and_load(tied, tmp_path):
    model = mar_model(tie_word_embeddings=tied, neurons=SPIKING, bc_norm="none", mlp_bias=True)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MarForCausalLM)
    assert not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = tokens(1, 5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_loading_does_not_keep_initial_values(tmp_path):
    """No parameter is at its initial value, and loading twice with other seeds gives the same model."""
    mar_model(neurons=SPIKING).save_pretrained(tmp_path)
    torch.manual_seed(1)
    first = MarForCausalLM.from_pretrained(tmp_path)
    torch.manual_seed(2)
    second = MarForCausalLM.from_pretrained(tmp_path)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.std() > 0.05, name


LOADING = """
import sys
{imports}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
body = AutoModel.from_pretrained(sys.argv[1])
import torch
ids = torch.arange(6)[None]
hidden = body(ids).last_hidden_state
assert torch.equal(model.lm_head(hidden), model(ids).logits)
print(type(config).__name__, type(model).__name__, type(body).__name__, config.head_dim)
print(*model(ids).logits[0, -1, :3].tolist())
"""


@pytest.mark.parametrize(
    "imports",
    ["import mar", "from mar.config import MarConfig"],
    ids=["the package", "a module"],
)
def test_auto_classes_know_mar_in_a_new_process(model, imports, tmp_path):
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOADING.format(imports=imports), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, logits = done.stdout.splitlines()[-2:]
    assert names == "MarConfig MarForCausalLM MarModel 8"
    expected = model(torch.arange(6)[None]).logits[0, -1, :3]
    torch.testing.assert_close(torch.tensor([float(word) for word in logits.split()]), expected)


# Config


def test_config_round_trip(tmp_path):
    config = mar_config(neurons=SPIKING, input_gain="none", bc_norm="none", decay_bias=False, conv_kernel=3)
    config.save_pretrained(tmp_path)
    loaded = MarConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    for site in SITES:
        assert loaded.neuron(site) == config.neuron(site)
    assert loaded.neuron("down_proj") == NeuronConfig(time_steps=9, precharge=0.5)
    assert loaded.neuron("in_proj") == NeuronConfig()
    assert mar_config().neuron("in_proj") is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_heads": 0}, "^num_heads is 0; it must be an integer of at least 1"),
        ({"chunk_size": -3}, "^chunk_size is -3; it must be an integer of at least 1"),
        ({"hidden_size": "x"}, "^hidden_size is 'x'; it must be an integer of at least 1"),
        ({"num_hidden_layers": 2.0}, r"^num_hidden_layers is 2\.0; it must be an integer"),
        ({"head_dim": True}, "^head_dim is True; it must be an integer"),
        ({"vocab_size": None}, "^vocab_size is None; it must be an integer"),
        ({"max_position_embeddings": "many"}, "^max_position_embeddings is 'many'; it must be an integer"),
        ({"rms_norm_eps": "small"}, "^rms_norm_eps is 'small'; it must be a number from 0 up"),
        ({"initializer_range": float("nan")}, "^initializer_range is nan; it must be a number from 0 up"),
        ({"decay_bias": 1}, "^decay_bias is 1; use one of True, False"),
        ({"tie_word_embeddings": "no"}, "^tie_word_embeddings is 'no'; use one of True, False"),
        ({"hidden_act": "silo"}, "^hidden_act is 'silo'; use one of .*'silu'"),
        ({"pad_token_id": "<pad>"}, "^pad_token_id is '<pad>'; it must be a token's integer id, or None"),
        ({"eos_token_id": [1, 2.0]}, r"^eos_token_id is \[1, 2\.0\]; it must be a token's integer id"),
        ({"bos_token_id": [1]}, r"^bos_token_id is \[1\]; it must be a token's integer id"),
        ({"neurons": ["in_proj"]}, r"^neurons is \['in_proj'\]; use None, or what `mar\.config\.site_neurons` gives"),
        ({"neurons": {"in_proj": 4}}, r"^neurons\.in_proj is 4; use a mapping of the fields \['kind'"),
        ({"neurons": {"in_proj": {"time_steps": 2.5}}}, r"^neurons\.in_proj: time_steps is 2\.5; .* an integer from 1"),
        ({"neurons": {"in_proj": {"time_steps": "4"}}}, r"^neurons\.in_proj: time_steps is '4'"),
        ({"neurons": {"in_proj": {"tau": "1"}}}, r"^neurons\.in_proj: tau is '1'; .* use a number above 0"),
        (
            {"neurons": {"in_proj": {"precharge": True}}},
            r"^neurons\.in_proj: precharge is True; it is a part of V: 0 truncates, 0.5 rounds",
        ),
        ({"input_gain": "decay"}, "input_gain is 'decay'; use one of 'none', 'one_minus_decay'"),
        ({"bc_norm": "rms"}, "bc_norm is 'rms'; use one of 'none', 'l2'"),
        ({"neurons": {"q_proj": {}}}, "site is 'q_proj'; use one of 'in_proj', 'out_proj', 'gate_up', 'down_proj'"),
        (
            {"neurons": {"in_proj": {"steps": 4}}},
            r"neurons\.in_proj has unknown keys \['steps'\]; known are .*tau",
        ),
        ({"neurons": {"in_proj": {"kind": "lif"}}}, "neuron kind is 'lif'; use one of 'atmn', 'ternary', 'binary'"),
        (
            {"neurons": {"in_proj": {"time_steps": 128}}},
            "time_steps is 128; a code has 8 bits, so use an integer",
        ),
        ({"neurons": {"in_proj": {"tau": 0.0}}}, "tau is 0.0; it divides the membrane potential"),
        ({"neurons": {"in_proj": {"merge": "mean"}}}, "merge is 'mean'; use one of 'weighted', 'sum'"),
        ({"neurons": {"in_proj": {"threshold": "token"}}}, "threshold is 'token'; use one of 'channel', 'scalar'"),
    ],
    ids=str,
)
def test_config_refuses(wrong, words):
    with pytest.raises(ValueError, match=words) as caught:
        mar_config(**wrong)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_as_integers():
    assert mar_config(rms_norm_eps=0, neurons={"in_proj": {"tau": 2}}).neuron("in_proj") == NeuronConfig(tau=2.0)


def test_an_unknown_surrogate_is_refused_by_the_model():
    config = mar_config(neurons={"in_proj": {"surrogate": "step"}})
    with pytest.raises(ValueError, match="surrogate is 'step'; use one of 'ste'"):
        MarModel(config)


def test_neuron_settings_for_sites():
    placed = site_neurons(NeuronConfig(time_steps=2), {"down_proj": {"tau": 2.0}}, ("in_proj", "down_proj"))
    assert mar_config(neurons=placed).neuron("down_proj") == NeuronConfig(time_steps=2, tau=2.0)
    assert mar_config(neurons=placed).neuron("in_proj") == NeuronConfig(time_steps=2)
    assert mar_config(neurons=placed).neuron("gate_up") is None
    with pytest.raises(ValueError, match=r"site 'down_proj', which is not among .* \['in_proj'\]; place neurons"):
        site_neurons(NeuronConfig(), {"down_proj": {"tau": 2.0}}, ("in_proj",))
    with pytest.raises(ValueError, match="site is 'attention'"):
        site_neurons(NeuronConfig(), sites=("attention",))


def test_sizes():
    config = mar_config(num_heads=3, head_dim=8, state_size=6)
    assert (config.inner_size, config.conv_size, config.in_proj_size) == (24, 24 + 36, 60 + 24 + 3)
    assert MarModel(config).layers[0].mixer.in_proj.weight.shape == (87, 32)
