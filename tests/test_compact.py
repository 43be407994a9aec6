"""Compact folders: what quantising keeps, the same codes for transformers and the engine, and damage refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from mar import compact
from mar.config import NeuronConfig, site_neurons
from mar.engine import Engine, layout, pack
from mar.folder import digest, load_student, load_tokenizer, save_student
from mar.model import MarForCausalLM
from mar.steps import pack_to_folder
from mar.weights import weight_files
from tiny_engine import RAGGED, run_torch, spiking_model, tokens
from tiny_models import mar_model
from tiny_recipes import files_of, provenance

VOCAB = 320
CARD: dict[str, Any] = {"step": "spike", "teacher": {"kind": "folder", "name": "a teacher"}, "tokens": 7, "metrics": {}}
COMBINATIONS = [("int8", "int8"), ("int4", "int8"), ("int4", "int4"), ("int8", "bf16")]


@pytest.fixture(scope="module")
def folders(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spiking student with untied head and a dense one with tied head, both of ragged sizes."""
    base = tmp_path_factory.mktemp("students")
    spiking = spiking_model(vocab_size=VOCAB)
    dense = mar_model(**{**RAGGED, "vocab_size": VOCAB, "mlp_bias": False, "tie_word_embeddings": True})
    for name, student in (("spiking", spiking), ("dense", dense)):
        student.generation_config.eos_token_id = 7
        save_student(student, tiny_tokenizer, base / name, CARD)
    for name in ("spiking", "dense"):
        for precision, head in COMBINATIONS:
            pack_to_folder(base / name, base / f"{name}-{precision}-{head}", precision, head)
    return base


def stored_size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def float_weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 150), st.floats(0, 9))
def test_int4_is_stored_without_loss(seed: int, outputs: int, inputs: int, spread: float) -> None:
    """Its bytes are read here as the module's docstring has them, whatever the sizes of the rows."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((outputs, inputs)) * np.exp(random.normal(0, spread, (outputs, 1)))
    weight[random.random(outputs) < 0.1] = 0
    weight = weight.astype(np.float32)
    made = compact.quantise(weight, "int4", short=True)
    codes, scales, base = compact._stored("x", made).values()
    assert codes.dtype == scales.dtype == np.uint8
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(outputs, -1)[:, :inputs].astype(float) - 8
    size = (scales & 127) + base.astype(float)
    value = np.where(scales & 128, -1, 1) * 2.0 ** (size // 8 - 127) * (1 + size % 8 / 8) * (scales & 127 > 0)
    values = nibbles * value.repeat(compact.GROUP, axis=1)[:, :inputs]
    assert np.array_equal(values, made.values())
    for start in range(0, inputs, compact.GROUP):
        part = slice(start, start + compact.GROUP)
        largest = np.abs(weight[:, part]).max(1)
        error = np.sqrt(np.square(values - weight)[:, part].mean(1))
        near = largest > np.abs(weight).max() / 2**13  # what is smaller may find no scale, and is zero then
        # Of the scales tried, one meets the largest weight to half a level and half a step of the scale.
        assert (error[near] <= 0.1 * largest[near]).all()
        assert (error <= largest).all()


def check(arrays: dict[str, np.ndarray], linear: str, parts: list[compact.Quantised]) -> None:
    """The linear's arrays are those of its parts."""
    for kind, array in layout.pack_codes(*parts).items():
        assert np.array_equal(arrays[f"{linear}.{kind}"], np.ascontiguousarray(array).reshape(-1).view(np.uint8)), kind


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("name", ["spiking", "dense"])
def test_the_engine_packs_the_very_codes(folders: Path, name: str, combination: tuple[str, str]) -> None:
    """Of the float folder, folded by hand and quantised; bytes of all linears and of the head are compared."""
    precision, head = combination
    folder = folders / f"{name}-{precision}-{head}"
    wanted = pack.pack_settings(folder, None, None, True)
    assert (wanted.precision, wanted.head) == (precision, pack.TWO_STEP if head == "int8" else head)
    assert pack.pack_settings(folder, precision, None, True) == wanted
    assert pack.pack_settings(folder, "fp32", None, True).head is None
    config, weights, _ = pack.read_folder(folder)
    arrays = pack.pack(config, weights, wanted)
    floats = float_weights(folders / name)

    def folded(layer: int, linear: str, neuron: str, steps: int) -> compact.Quantised:
        weight = floats[f"model.layers.{layer}.{linear}.weight"]
        if linear == "mixer.in_proj":
            weight = weight[: -RAGGED["num_heads"]]
        if name == "spiking":
            a = floats[f"model.layers.{layer}.{neuron}.a"].astype(np.float16).astype(np.float32)
            v = np.broadcast_to(np.exp(a), weight.shape[1])
            weight = weight * (v / compact.row_multipliers(v, steps))
        return compact.quantise(weight, precision, short=True)

    for layer in range(2):
        at = f"layers.{layer}."
        expected = {
            f"{at}in_proj": [folded(layer, "mixer.in_proj", "mixer.in_neuron", 4)],
            f"{at}out_proj": [folded(layer, "mixer.out_proj", "mixer.out_neuron", 3)],
            f"{at}gate_up": [folded(layer, f"mlp.{half}_proj", "mlp.in_neuron", 16) for half in ("gate", "up")],
            f"{at}down_proj": [folded(layer, "mlp.down_proj", "mlp.down_neuron", 2)],
        }
        for linear, parts in expected.items():
            check(arrays, linear, parts)
    if head != "bf16":
        source = floats["lm_head.weight" if name == "spiking" else "model.embed_tokens.weight"]
        check(arrays, "head", [compact.quantise(source, head, short=True)])


def test_weights_in_several_files_are_the_same_weights(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mar.folder.MOST_BYTES", 20_000)
    pack_to_folder(folders / "spiking", tmp_path / "split", "int4", "int8")
    whole, split = folders / "spiking-int4-int8", tmp_path / "split"
    files = weight_files(split, "")
    assert len(files) > 2
    assert not (split / "model.safetensors").exists()
    assert all(file.stat().st_size < 30_000 for file in files)
    for read in (lambda folder: pack.read_folder(folder)[1], lambda folder: dict(load_student(folder).state_dict())):
        one, several = read(whole), read(split)
        assert set(one) == set(several)
        assert all(np.array_equal(one[name], several[name]) for name in one)
    assert digest(split) == pack.folder_digest(split) == pack.read_folder(split)[2]
    files[1].write_bytes(files[1].read_bytes()[:-9])
    for read in (load_student, pack.read_folder):
        with pytest.raises(ValueError, match=f"split/{files[1].name} is truncated or damaged"):
            read(split)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {files[1].name}, which its .* names; restore it"):
        load_student(split)


@pytest.mark.parametrize("names", [{}, {"x": "../model.safetensors"}])
def test_an_index_names_files_beside_it(tmp_path: Path, names: dict[str, str]) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="not files beside it; restore it"):
        weight_files(tmp_path, "")


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("name", ["spiking", "dense"])
def test_transformers_loads_what_the_codes_stand_for(folders: Path, name: str, combination: tuple[str, str]) -> None:
    folder = folders / "-".join([name, *combination])
    student = load_student(folder)
    original = dict(load_student(folders / name).named_parameters())
    _, weights, _ = pack.read_folder(folder)
    assert set(weights) == set(original)
    for parameter, value in student.named_parameters():
        assert value.dtype == torch.float32
        assert np.array_equal(value.detach().numpy(), weights[parameter])
        if parameter.endswith((".D", ".decay_bias")):
            assert value.equal(original[parameter])
        if parameter.endswith(".a"):
            assert value.equal(original[parameter].half().float())
        difference = (value - original[parameter]).norm() / original[parameter].norm()
        assert difference < {"int8": 0.05, "int4": 0.3}["int4" if "int4" in combination else "int8"]
    assert student.generation_config.eos_token_id == 7


def test_both_loaders_predict_the_same(folders: Path) -> None:
    """The dense student, whose codes cannot flip, with the stored weights as floats in the engine."""
    folder = folders / "dense-int4-int8"
    engine = Engine.from_pretrained(folder, "fp32", threads=1)
    ids = tokens(40, vocabulary=VOCAB)
    with torch.no_grad():
        expected = load_student(folder)(ids[None]).logits[0].numpy()
    assert np.abs(engine.logits(engine.new_state(), ids.numpy()) - expected).max() < 1e-3


def test_whole_number_weights_beside_a_window_give_torchs_codes(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Free-running: had a window rounded its keys or values, codes would flip."""
    save_student(spiking_model(vocab_size=VOCAB, window=7, rotary_base=50.0), tiny_tokenizer, tmp_path / "a", CARD)
    pack_to_folder(tmp_path / "a", tmp_path / "b", "int8", "int8")
    expected, codes, _ = run_torch(load_student(tmp_path / "b"), ids := tokens(40, vocabulary=VOCAB))
    engine = Engine.from_pretrained(tmp_path / "b", threads=1)
    state = engine.new_state()
    for token, logits, row in zip(ids.tolist(), expected, codes, strict=True):
        found, taken = engine.step_codes(state, token)
        assert np.array_equal(taken, row)
        assert np.abs(found - logits).max() < 0.05 * np.abs(logits).max()  # the head rounds its inputs


def test_neurons_can_be_left_out(folders: Path) -> None:
    """The stored codes have thresholds folded in, which dense inputs must not meet."""
    folder = folders / "spiking-int4-int8"
    ids = tokens(20, vocabulary=VOCAB)
    dense = MarForCausalLM(AutoConfig.from_pretrained(folder, neurons=None)).eval()
    weights = {name: value for name, value in load_student(folder).state_dict().items() if not name.endswith(".a")}
    dense.load_state_dict(weights)
    with torch.no_grad():
        expected = dense(ids[None]).logits[0].numpy()
    engine = Engine.from_pretrained(folder, "fp32", neurons=False, threads=1)
    assert np.abs(engine.logits(engine.new_state(), ids.numpy()) - expected).max() < 1e-3
    config, found, _ = pack.read_folder(folder)
    arrays = pack.pack(config, found, pack.pack_settings(folder, None, None, False))
    assert not [name for name in arrays if name.endswith((".threshold", ".multiplier"))]
    assert Engine.from_pretrained(folder, neurons=False, threads=1).settings["precision"] == "int4"


def test_auto_classes_and_dtypes(folders: Path) -> None:
    folder = folders / "spiking-int4-int8"
    student = load_student(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is MarForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(value.equal(model.state_dict()[name]) for name, value in student.state_dict().items())
    given = AutoConfig.from_pretrained(folder)
    for _ in range(2):  # the config that is given stays as it is
        body = AutoModel.from_pretrained(folder, config=given)
        assert body.state_dict()["norm.weight"].equal(student.model.norm.weight)
    narrow = MarForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in narrow.parameters()} == {torch.bfloat16}


def test_a_loaded_model_saves_floats(folders: Path, tmp_path: Path) -> None:
    student = load_student(folders / "spiking-int4-int8")
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["compact"] is None
    again = load_student(tmp_path)
    assert all(value.equal(again.state_dict()[name]) for name, value in student.state_dict().items())
    MarForCausalLM(AutoConfig.from_pretrained(folders / "spiking-int4-int8")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["compact"] is None


def test_every_folder_is_smaller_than_the_one_before(folders: Path) -> None:
    """At the tiny sizes of the tests scales and what is not quantised weigh much."""
    for name in ("spiking", "dense"):
        wide, narrow, narrowest = (folders / f"{name}-{kind}" for kind in ("int8-int8", "int4-int8", "int4-int4"))
        assert stored_size(folders / name) > 2 * stored_size(wide)
        assert stored_size(wide) > 1.15 * stored_size(narrow)
        assert stored_size(narrow) > stored_size(narrowest)


def test_the_folder_is_whole(folders: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder = folders / "spiking-int4-int8"
    kept = provenance(folder)
    assert (kept["step"], kept["settings"]) == ("pack", {"precision": "int4", "head": "int8"})
    assert (kept["teacher"], kept["parent"]["name"]) == (CARD["teacher"], str(folders / "spiking"))
    assert "in int4, embedding and head in int8" in (folder / "README.md").read_text()
    text = "The river rose é→ during the night."
    assert load_tokenizer(folder)(text).input_ids == tiny_tokenizer(text).input_ids
    assert (folder / "tokenizer.json").stat().st_size < (folders / "spiking" / "tokenizer.json").stat().st_size
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("source", "target", "precision", "head", "problem"),
    [
        ("spiking-int4-int8", "new", "int4", "int8", "spiking-int4-int8 is compact already; give the folder that it"),
        ("spiking", "dense", "int4", "int8", "dense already holds a model; give another folder"),
        ("spiking", "spiking/config.json/new", "int4", "int8", "config.json is no folder to write in; name another"),
        ("spiking", "new", "int2", "int8", "precision is 'int2'; use one of int8, int4"),
        ("spiking", "new", "int4", "fp32", "head is 'fp32'; use one of int8, int4, bf16"),
        ("nothing", "new", "int4", "int8", r"nothing holds no config\.json"),
    ],
)
def test_what_cannot_be_packed(
    folders: Path, source: str, target: str, precision: str, head: str, problem: str
) -> None:
    before = files_of(folders)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        pack_to_folder(folders / source, folders / target, precision, head)
    assert files_of(folders) == before


def refused(folder: Path, problem: str) -> None:
    """By transformers' way and by the engine's."""
    with pytest.raises(ValueError, match=problem):
        load_student(folder)
    with pytest.raises(ValueError, match=problem):
        Engine.from_pretrained(folder, threads=1)


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    """A folder to spoil."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / "spiking-int4-int8" / name).read_bytes())
    return tmp_path


def test_a_truncated_file_is_refused(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    for length in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        (copied / "model.safetensors").write_bytes(whole[:length])
        refused(copied, r"model\.safetensors is truncated or damaged")


LINEAR, NEURON = "model.layers.1.mixer.in_proj", "model.layers.1.mixer.in_neuron"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(f"{LINEAR}.scales"), rf"{LINEAR}\.scales is missing \(\) and not U8 \(\d+, 1\)"),
        (lambda t: t.pop(f"{LINEAR}.decay"), rf"{LINEAR}\.decay is missing"),
        (lambda t: t.pop(f"{NEURON}.a"), rf"{NEURON}\.a is missing"),
        (lambda t: t.update({f"{LINEAR}.codes": t[f"{LINEAR}.codes"][:, :-1].clone()}), rf"{LINEAR}\.codes is U8"),
        (lambda t: t.update({f"{LINEAR}.codes": t[f"{LINEAR}.codes"].view(torch.int8)}), r"codes is I8 .* and not U8"),
        (lambda t: t[f"{LINEAR}.base"].fill_(-5), rf"{LINEAR}\.base is -5"),
        (lambda t: t[f"{LINEAR}.base"].fill_(0x7F0), rf"{LINEAR}\.base is 2032"),
        (lambda t: t[f"{NEURON}.multipliers"].fill_(0), "multipliers takes codes beyond 8 bits"),
        (lambda t: t[f"{NEURON}.multipliers"].fill_(99), "multipliers takes codes beyond 8 bits"),
        (lambda t: t.update({f"{NEURON}.a": torch.zeros(3).half()}), r"in_neuron\.a has 3 elements for 40 inputs"),
        (lambda t: t["lm_head.scales"].fill_(float("inf")), r"lm_head\.weight has NaN or infinite elements"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight has NaN or infinite elements"),
    ],
)
def test_wrong_tensors_are_refused(copied: Path, change: Any, problem: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    refused(copied, rf"model\.safetensors is truncated or damaged \(.*{problem}")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"compact": {"precision": "int2", "head": "int8"}}, "'int2'"),
        ({"compact": "int4"}, "its config calls it compact with 'int4'"),
        ({"compact": {"precision": "int8", "head": "int8"}}, "codes is U8"),
        ({"hidden_size": 32}, "codes is U8"),
        ({"neurons": None}, "neuron"),
    ],
)
def test_configs_of_another_model_are_refused(copied: Path, changes: dict[str, Any], problem: str) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | changes))
    refused(copied, problem)


def test_thresholds_out_of_range_are_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    student = mar_model(vocab_size=VOCAB, neurons=site_neurons(NeuronConfig()))
    student.model.layers[1].mlp.in_neuron.a.data[3] = 100.0  # type: ignore[union-attr]
    save_student(student, tiny_tokenizer, tmp_path / "wild", CARD)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.in_neuron\.a has elements beyond ±80"):
        pack_to_folder(tmp_path / "wild", tmp_path / "new", "int8", "int8")
    assert not (tmp_path / "new").exists()
