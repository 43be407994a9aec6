"""Conversions: LLaMA attention to mixers, published Llamba folders, dense models to spiking ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mar.config import MIXER_PRESETS
from mar.conversion import calibrate_mixers, convert_llama, convert_llamba
from mar.model import MarForCausalLM
from mar.stages import Align
from tiny_models import llama_model, packed_rows, rms_ratio

SHAPES: dict[str, dict[str, Any]] = {
    "4 to 1": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "2 to 1": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "1 to 1": {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "mlp_bias": True},
    "one narrow head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 512},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def align_error(student: MarForCausalLM, teacher: LlamaForCausalLM, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return Align(student, teacher).accumulate(batch, lambda _: None)["relative_mse_to_llama"]


# From LLaMA


@every_shape
def test_any_llama_shape_converts_and_learns(shape):
    teacher = llama_model(**shape)
    student = convert_llama(teacher)
    assert student(packed_rows()["input_ids"]).logits.shape == (2, 24, teacher.config.vocab_size)
    stage = Align(student, teacher)
    parameters = [p for group in stage.parameter_groups() for p in group.parameters.values()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    errors = []
    for _ in range(15):
        optimizer.zero_grad()
        errors.append(stage.accumulate(packed_rows(), lambda loss: loss.backward())["relative_mse_to_llama"])
        optimizer.step()
    assert errors[-1] < 0.7 * errors[0]


@every_shape
def test_everything_but_attention_is_copied(shape):
    teacher = llama_model(**shape)
    student = convert_llama(teacher)
    source = teacher.state_dict()
    kept = {name: weight for name, weight in student.state_dict().items() if ".mixer." not in name}
    assert set(kept) == {name for name in source if ".self_attn." not in name}
    for name, weight in kept.items():
        assert torch.equal(weight, source[name]), name
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == teacher.config.tie_word_embeddings
    assert student.config.rms_norm_eps == teacher.config.rms_norm_eps


def test_rows_of_the_projections_come_from_attention():
    """Head h reads x from W_v and B from W_k of KV head h // 2, C from its own W_q / sqrt(8)."""
    teacher = llama_model(num_attention_heads=4, num_key_value_heads=2)
    mixer: Any = convert_llama(teacher).model.layers[1].mixer
    attention = teacher.model.layers[1].self_attn
    x, b, c, z, _ = _parts(mixer)
    for head in range(4):
        own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
        assert torch.equal(x[own], attention.v_proj.weight[shared])
        assert torch.equal(b[own], attention.k_proj.weight[shared])
        torch.testing.assert_close(c[own], attention.q_proj.weight[own] / math.sqrt(8))
    assert not z.any()
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)


def _parts(mixer: Any) -> tuple[Tensor, ...]:
    config = mixer.config
    sizes = [config.inner_size, config.inner_size, config.inner_size, config.inner_size, config.num_heads]
    return mixer.in_proj.weight.split(sizes)


@every_shape
def test_llamba_preset_is_the_teachers_linear_attention_at_decay_1(shape):
    """Without gain, normalisation and bias: y_t = W_o sum_s (q_t . k_s / sqrt(dim)) v_s, no softmax, no rotation.

    The decay logits are the only rows that attention does not define. One feature that every token shares, as a large
    embedding channel would make it, drives them so far down that the decay is 1.
    """
    teacher = llama_model(**shape)
    student = convert_llama(teacher, preset="llamba")
    hidden = torch.randn(2, 11, 32)
    hidden[..., 0] = 10
    for layer, block in zip(teacher.model.layers, student.model.layers, strict=True):
        mixer, attention = block.mixer, layer.self_attn
        mixer.in_proj.weight.data[-mixer.config.num_heads :] = F.one_hot(torch.tensor(0), 32) * -5.0
        heads, groups = teacher.config.num_attention_heads, teacher.config.num_key_value_heads
        q = attention.q_proj(hidden).view(2, 11, heads, -1)
        k = attention.k_proj(hidden).view(2, 11, groups, -1).repeat_interleave(heads // groups, 2)
        v = attention.v_proj(hidden).view(2, 11, groups, -1).repeat_interleave(heads // groups, 2)
        scores = torch.einsum("bthn,bshn->bhts", q, k).tril() / math.sqrt(teacher.config.head_dim)
        expected = attention.o_proj(torch.einsum("bhts,bshp->bthp", scores, v).flatten(2))
        assert rms_ratio(mixer(hidden)[0], expected) < 1e-5
        _, log_decay, _, _, _, _ = mixer.ssm_inputs(hidden, None, None, None)
        assert (log_decay.exp() == 1).all()


def test_llamba_init_draws_the_projections_and_opens_the_gate():
    teacher = llama_model()
    student = convert_llama(teacher, preset="llamba", init="llamba")
    for layer in student.model.layers:
        x, b, c, z, decay = _parts(layer.mixer)
        for part in (x, b, c, decay, layer.mixer.out_proj.weight):
            assert 0.1 < part.std() < 0.3
        assert not z.any()
    attention = convert_llama(teacher, preset="llamba").model.layers[0].mixer
    assert not torch.equal(student.model.layers[0].mixer.out_proj.weight, attention.out_proj.weight)


def test_presets_and_choices():
    teacher = llama_model()
    for preset, choices in MIXER_PRESETS.items():
        config = convert_llama(teacher, preset).config
        assert {name: getattr(config, name) for name in choices} == choices
    config = convert_llama(teacher, "llamba", decay_bias=True, chunk_size=16).config
    assert (config.decay_bias, config.chunk_size, config.input_gain) == (True, 16, "none")


def test_conversion_is_repeatable_and_leaves_the_generator_alone():
    teacher = llama_model()
    before = torch.get_rng_state()
    first, second, other = (convert_llama(teacher, init="llamba", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_teacher_in_16_bits_gives_a_student_in_32():
    student = convert_llama(llama_model().bfloat16())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_a_student_is_made_where_its_teacher_is():
    assert {p.device.type for p in convert_llama(llama_model().to("meta")).parameters()} == {"meta"}


def test_the_end_token_of_chat_models_is_kept(tiny_llama):
    tiny_llama.generation_config.eos_token_id = [2, 5]
    student = convert_llama(tiny_llama)
    assert student.generation_config.eos_token_id == [2, 5]
    assert student.config.eos_token_id == tiny_llama.config.eos_token_id
    assert student.model.embed_tokens.padding_idx == 2


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (lambda: llama_model(attention_bias=True), "attention_bias=true.*has no place"),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, intermediate_size=48)), "'mistral'; only LLaMA checkpoints"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)), "'gpt2'; only LLaMA"),
    ],
    ids=["attention biases", "Mistral", "GPT-2"],
)
def test_other_architectures_are_refused(teacher, words):
    with pytest.raises(ValueError, match=words):
        convert_llama(teacher())


def test_a_damaged_head_count_is_refused():
    teacher = llama_model()
    teacher.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="4 query and 3 key-value heads, which do not divide evenly"):
        convert_llama(teacher)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"preset": "mamba"}, "mixer preset is 'mamba'; use one of 'llamba', 'fast', 'hybrid'"),
        ({"init": "zeros"}, "init is 'zeros'; use 'attention' or 'llamba'"),
        ({"inputgain": "none"}, "'inputgain' is no choice of a mixer; use one of 'input_gain'"),
        ({"num_heads": 2}, "'num_heads' is no choice of a mixer"),
    ],
    ids=["preset", "init", "misspelt", "given by the teacher"],
)
def test_unknown_choices_are_refused(choices, words):
    with pytest.raises(ValueError, match=words):
        convert_llama(llama_model(), **choices)


# Calibrated mixers


@pytest.mark.parametrize("shape", [SHAPES["4 to 1"], SHAPES["wide heads"]], ids=["4 to 1", "wide heads"])
@pytest.mark.parametrize("preset", MIXER_PRESETS)
def test_calibration_lowers_the_error_on_other_text(preset, shape):
    teacher = llama_model(**shape)
    student = convert_llama(teacher, preset, decay_bias=True)
    other = packed_rows(((40,), (25, 15)), seed=1)
    before = align_error(student, teacher, other)
    calibrate_mixers(student, teacher, packed_rows(((60, 40), (100,), (30, 70)), seed=2))
    assert align_error(student, teacher, other) < min(0.9 * before, 1.0)
    for layer in student.model.layers:
        assert ((F.softplus(layer.mixer.decay_bias) > 0.002) & (F.softplus(layer.mixer.decay_bias) < 1.7)).all()


def test_a_window_of_all_tokens_is_the_teacher():
    """Before any training: attention as it was, and a scan that is left next to nothing to add."""
    teacher = llama_model(num_key_value_heads=2)
    student = convert_llama(teacher, window=128)
    assert student.config.rotary_base == teacher.config.rope_parameters["rope_theta"]
    calibrate_mixers(student, teacher, packed_rows(((60, 40), (100,), (30, 70)), seed=2))
    assert align_error(student, teacher, packed_rows(((40,), (25, 15)), seed=1)) < 1e-3


def test_scaled_positions_have_no_window():
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    teacher = llama_model(rope_parameters=scaled)
    assert convert_llama(teacher).config.window == 0
    with pytest.raises(ValueError, match=r"scaled \(rope_type 'linear'\).* convert it without one"):
        convert_llama(teacher, "hybrid")


@pytest.mark.parametrize("window", [0, 8])
def test_calibration_survives_a_pruned_head(window: int):
    teacher = llama_model()
    teacher.model.layers[0].self_attn.o_proj.weight.data[:, 8:16] = 0
    student = convert_llama(teacher, window=window)
    calibrate_mixers(student, teacher, packed_rows())
    for name, parameter in student.named_parameters():
        assert parameter.isfinite().all(), name
    assert align_error(student, teacher, packed_rows(seed=1)) < 1.5


def test_calibration_takes_each_row_for_a_document_where_none_are_given():
    teacher, ids = llama_model(), packed_rows(((100,), (100,)))["input_ids"]
    found = []
    for batch in ({"input_ids": ids}, {"input_ids": ids, "document_ids": torch.zeros_like(ids)}):
        calibrate_mixers(student := convert_llama(teacher), teacher, batch)
        found.append(student.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_calibration_needs_decay_biases():
    teacher = llama_model()
    with pytest.raises(ValueError, match="convert with decay_bias=True"):
        calibrate_mixers(convert_llama(teacher, "llamba"), teacher, packed_rows())


# From Llamba

LLAMBA: dict[str, Any] = {
    "vocab_size": 90,
    "d_model": 32,
    "tie_embeddings": False,
    "pad_vocab_size_multiple": 8,
    "lm_head_bias": False,
    "n_layer": 2,
    "resid_dropout": 0.0,
    "norm_epsilon": 1e-5,
    "mlp_cfg": {"intermediate_size": 48, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": 6,
        "n_v_heads": 4,
        "n_qk_heads": 4,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    },
}


def write_llamba(folder: Path, config: dict[str, Any], leave_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A random checkpoint in the layout of cartesia-ai/Llamba-1B: 4 heads of 8, states of 6, 96 padded words."""
    sizes = {"backbone.embedding.weight": (96, 32), "backbone.final_layernorm.weight": (32,)}
    if not config["tie_embeddings"]:
        sizes["lm_head.weight"] = (96, 32)
    conv = 32 + 2 * 4 * 6
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        sizes |= {
            f"{prefix}mixer.in_proj.weight": (conv + 32 + 4, 32),
            f"{prefix}mixer.conv1d.weight": (conv, 1, 4),
            f"{prefix}mixer.conv1d.bias": (conv,),
            f"{prefix}mixer.z_bias": (32,),
            f"{prefix}mixer.D": (4,),
            f"{prefix}mixer.out_proj.weight": (32, 32),
            f"{prefix}input_layernorm.weight": (32,),
            f"{prefix}post_attention_layernorm.weight": (32,),
            f"{prefix}mlp.gate_proj.weight": (48, 32),
            f"{prefix}mlp.up_proj.weight": (48, 32),
            f"{prefix}mlp.down_proj.weight": (32, 48),
        }
    weights = {name: (0.3 * torch.randn(size)).bfloat16() for name, size in sizes.items() if name not in leave_out}
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def llamba_logits(weights: dict[str, Tensor], ids: Tensor, layers: int = 2) -> Tensor:
    """What Llamba computes for one sequence (l,), written from its description in fp64, token by token."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def silu(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v))

    hidden = w["backbone.embedding.weight"][ids]
    for layer in range(layers):
        p = {name.removeprefix(f"backbone.layers.{layer}."): tensor for name, tensor in w.items()}
        projected = norm(hidden, p["input_layernorm.weight"]) @ p["mixer.in_proj.weight"].T
        xbc, z, a_log = projected[:, :80], projected[:, 80:112], projected[:, 112:]
        state, outputs = torch.zeros(4, 8, 6, dtype=torch.float64), []
        for t in range(len(ids)):
            mixed = p["mixer.conv1d.bias"].clone()
            for tap in range(4):
                if t - 3 + tap >= 0:
                    mixed += p["mixer.conv1d.weight"][:, 0, tap] * xbc[t - 3 + tap]
            x, b, c = mixed[:32].view(4, 8), mixed[32:56].view(4, 6), mixed[56:].view(4, 6)
            decay = 1 / (1 + a_log[t].exp())  # exp(-softplus(a))
            state = decay[:, None, None] * state + x[:, :, None] * b[:, None, :]
            y = (state * c[:, None, :]).sum(-1) + p["mixer.D"][:, None] * x
            outputs.append(y.flatten() * silu(z[t] + p["mixer.z_bias"]))
        hidden = hidden + torch.stack(outputs) @ p["mixer.out_proj.weight"].T
        s = norm(hidden, p["post_attention_layernorm.weight"])
        inner = silu(s @ p["mlp.gate_proj.weight"].T) * (s @ p["mlp.up_proj.weight"].T)
        hidden = hidden + inner @ p["mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["backbone.embedding.weight"])
    return norm(hidden, w["backbone.final_layernorm.weight"]) @ head.T


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llamba_folder_computes_what_llamba_does(tied, tmp_path):
    weights = write_llamba(tmp_path, {**LLAMBA, "tie_embeddings": tied})
    model = convert_llamba(tmp_path)
    ids = torch.randint(0, 90, (2, 70))
    for row in range(2):
        assert rms_ratio(model(ids).logits[row], llamba_logits(weights, ids[row])) < 1e-5
    assert model.config.vocab_size == 96  # 90, padded to a multiple of 8
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_converted_llamba_saves_and_loads(tmp_path):
    write_llamba(tmp_path / "llamba", LLAMBA)
    model = convert_llamba(tmp_path / "llamba")
    model.save_pretrained(tmp_path / "mar")
    loaded, ids = MarForCausalLM.from_pretrained(tmp_path / "mar"), torch.randint(0, 90, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_llamba_folder_without_its_files(missing, tmp_path):
    write_llamba(tmp_path, LLAMBA)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {missing}; a Llamba folder has config.json"):
        convert_llamba(tmp_path)


@pytest.mark.parametrize("kept", [100, -50], ids=["in the header", "in the weights"])
def test_truncated_llamba_weights(kept, tmp_path):
    write_llamba(tmp_path, LLAMBA)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .*; fetch it again"):
        convert_llamba(tmp_path)


def test_truncated_llamba_config(tmp_path):
    write_llamba(tmp_path, LLAMBA)
    (tmp_path / "config.json").write_text('{"d_model": 32, ')
    with pytest.raises(ValueError, match=r"config\.json is no whole JSON file .*; fetch it again"):
        convert_llamba(tmp_path)


def test_llamba_tensors_that_are_missing_unknown_or_too_many(tmp_path):
    write_llamba(tmp_path, LLAMBA, leave_out=("backbone.layers.1.mixer.D",))
    with pytest.raises(ValueError, match=r"lacks a tensor for 'model\.layers\.1\.mixer\.D'"):
        convert_llamba(tmp_path)
    write_llamba(tmp_path, LLAMBA, leave_out=("lm_head.weight",))
    with pytest.raises(ValueError, match=r"lacks a tensor for 'lm_head\.weight'"):
        convert_llamba(tmp_path)
    weights = write_llamba(tmp_path, LLAMBA)
    save_file({**weights, "backbone.layers.0.mixer.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'backbone\.layers\.0\.mixer\.norm\.weight' that this .* know; give the"):
        convert_llamba(tmp_path)
    write_llamba(tmp_path, {**LLAMBA, "n_layer": 3})
    (tmp_path / "config.json").write_text(json.dumps(LLAMBA))
    with pytest.raises(ValueError, match=r"has more layers than config\.json says: .*; .* fetch both again"):
        convert_llamba(tmp_path)


def test_llamba_config_and_weights_of_different_models(tmp_path):
    write_llamba(tmp_path, LLAMBA)
    weights = load_file(tmp_path / "model.safetensors")
    weights["backbone.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.weight' has shape \(40, 32\) .* asks for \(48, 32\)"):
        convert_llamba(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_qk_heads": 2}, "ssm_cfg.n_qk_heads is 2; only 4 can be converted"),
        ({"expand": 2}, "ssm_cfg.expand is 2; only 1"),
        ({"activation": "silu"}, "ssm_cfg.activation is 'silu'; only 'identity'"),
        ({"bias": True}, "ssm_cfg.bias is True; only False"),
    ],
    ids=["grouped heads", "expansion", "activation", "bias"],
)
def test_llamba_settings_that_do_not_fit(changes, words, tmp_path):
    write_llamba(tmp_path, {**LLAMBA, "ssm_cfg": {**LLAMBA["ssm_cfg"], **changes}})
    with pytest.raises(ValueError, match=words):
        convert_llamba(tmp_path)


def test_a_config_that_is_not_llambas(tmp_path):
    write_llamba(tmp_path, LLAMBA)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"config\.json has no 'ssm_cfg', which says .*; fetch it again"):
        convert_llamba(tmp_path)
