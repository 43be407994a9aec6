"""Calibrated rounding: less error in what a linear gives than rounding to the nearest, in the same format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mar import compact, rounding
from mar.config import NeuronConfig, site_neurons
from mar.engine.pack import read_folder
from mar.folder import load_student, save_student
from mar.layers import NEURON_PLACES, input_moments
from mar.model import MarForCausalLM
from mar.steps import pack_to_folder
from tiny_models import mar_config, mar_model, packed_rows

PRECISIONS = ("int8", "int4")
CARD: dict[str, Any] = {"step": "spike", "teacher": {"kind": "folder", "name": "a teacher"}, "tokens": 7, "metrics": {}}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(inputs: int, samples: int = 1000) -> np.ndarray:
    """The second moment of inputs that a few directions mostly explain, of very different sizes."""
    random = np.random.default_rng(0)
    directions, sizes = random.standard_normal((12, inputs)), np.exp(random.standard_normal(inputs))
    x = random.standard_normal((samples, 12)) @ directions + 0.3 * random.standard_normal((samples, inputs))
    x *= sizes
    return (x.T @ x / samples).astype(np.float32)


def output_error(weight: np.ndarray, made: compact.Quantised, moment: np.ndarray) -> float:
    """E |(W - Q) x|^2."""
    lost = (weight - made.values()).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", lost, moment.astype(np.float64), lost))


@every_precision
@pytest.mark.parametrize("inputs", [64, 100, 192])
def test_inputs_that_know_nothing_of_each_other_go_to_the_nearest(precision: str, inputs: int) -> None:
    """A moment c I, or nothing at all: no error of one can be made up for by another."""
    weight = normal(1, 37, inputs)
    plain = compact.quantise(weight, precision, short=True)
    for moment in (np.eye(inputs), 300 * np.eye(inputs), np.zeros((inputs, inputs))):
        made = compact.quantise(weight, precision, moment=moment.astype(np.float32))
        assert np.array_equal(made.codes, plain.codes)
        assert np.array_equal(made.scales, plain.scales)


def test_two_inputs_by_hand() -> None:
    """With scale 1 (the third weight is 127), inputs one and two always alike: 0.4 + 0.4 is best met by 0 and 1."""
    weight = np.array([[0.4, 0.4, 127.0]], np.float32)
    moment = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 5]], np.float32)
    made = compact.quantise(weight, "int8", moment=moment)
    assert made.scales.item() == 1
    assert sorted(made.codes[0, :2].tolist()) == [0, 1]
    assert made.codes[0, 2] == 127
    assert compact.quantise(weight, "int8").codes.tolist() == [[0, 0, 127]]


@every_precision
@pytest.mark.parametrize("inputs", [64, 100, 320])
def test_correlated_inputs_lose_less(precision: str, inputs: int) -> None:
    weight, moment = normal(2, 50, inputs), correlated(inputs)
    plain = compact.quantise(weight, precision, short=True)
    made = compact.quantise(weight, precision, moment=moment)
    assert output_error(weight, made, moment) < 0.5 * output_error(weight, plain, moment)
    fresh = correlated(inputs, samples=3000)  # the same directions, other samples
    assert output_error(weight, made, fresh) < 0.7 * output_error(weight, plain, fresh)


@every_precision
def test_inputs_that_are_always_zero(precision: str) -> None:
    """Their weights are kept as well as any, and change nothing about the others."""
    weight, moment = normal(4, 20, 128), correlated(128)
    dead = [3, 70, 127]
    moment[dead] = moment[:, dead] = 0
    made = compact.quantise(weight, precision, moment=moment)
    scales = made.scales if precision == "int8" else compact.from_bf16(made.scales)[:, [0, 1, 1]]
    low, high = (-127, 127) if precision == "int8" else (-8, 7)
    nearest = np.rint(weight[:, dead] / scales).clip(low, high)
    assert np.array_equal(made.codes[:, dead], nearest)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.integers(1, 150),
    st.integers(0, 5),
    st.floats(0, 12),
)
def test_any_moment_gives_codes_of_the_format(
    precision: str, seed: int, outputs: int, inputs: int, samples: int, spread: float
) -> None:
    """Singular moments, zero and enormous weights: in range, and stored without loss."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((outputs, inputs)) * np.exp(random.normal(0, spread, (outputs, 1)))
    weight[random.random(outputs) < 0.1] = 0
    weight = weight.astype(np.float32)
    x = random.standard_normal((samples, inputs)) * np.exp(random.normal(0, spread / 4, inputs))
    made = compact.quantise(weight, precision, moment=(x.T @ x).astype(np.float32))
    assert made.codes.shape == weight.shape
    assert made.codes.dtype == np.int8
    assert np.isfinite(made.values()).all()
    assert not made.values()[~weight.any(1)].any()
    if precision == "int8":
        assert np.abs(made.codes.astype(int)).max() <= 127
        assert made.scales.dtype == np.float32
        assert made.scales.shape == (outputs, 1)
    else:
        assert made.codes.min() >= -8
        assert made.codes.max() <= 7
        codes, scales, base = compact._stored("x", made).values()
        assert made.scales.shape == scales.shape == (outputs, -(-inputs // compact.GROUP))
        size = np.where(scales & 127, (scales & 127) + base, 0)
        assert np.array_equal(size, compact.scale_size(made.scales))
        assert np.array_equal(scales & 128 > 0, made.scales >> 15 > 0)
        assert codes.dtype == np.uint8


@pytest.mark.parametrize("least", [0, 900, 1000])
def test_scales_stay_among_those_that_are_stored(least: int) -> None:
    """Others' errors can push a weight beyond the largest one, which decides what 8 bits mean."""
    values = np.exp(np.linspace(-80, 80, 999)).astype(np.float32) * np.where(np.arange(999) % 2, 1, -1)
    bits = rounding._short_bits(values, least)
    size, kept = rounding.scale_size(bits), compact.from_bf16(bits)
    assert size[size > 0].min() > least
    assert size.max() == least + rounding.STEPS
    assert (np.diff(size) >= 0).all()
    assert (np.sign(kept) == np.sign(values) * (size > 0)).all()
    inside = (size > least + 1) & (size < size.max())
    assert (np.abs(kept / values - 1)[inside] <= 1 / 16).all()


def test_moments_are_what_the_linears_multiply() -> None:
    """Compared with a model whose neurons' outputs are kept; each token at length 1, of the first two batches."""
    model = mar_model(neurons=site_neurons(NeuronConfig(), {"down_proj": {"time_steps": 16}}))
    batches = [packed_rows(seed=seed) for seed in range(3)]
    tokens = 2 * batches[0]["input_ids"].numel()
    found = input_moments(model, batches, tokens)
    places = [f"model.layers.{layer}.{place}" for layer in range(2) for place in NEURON_PLACES]
    assert set(found) == {*places, compact.HEAD_PLACE}
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for name, outputs in kept.items():
        neuron: Any = model.get_submodule(name)
        neuron.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output.flatten(0, 1)))
    with torch.no_grad():
        for batch in batches[:2]:
            model(**batch)
    for name, outputs in kept.items():
        x = torch.cat(outputs).double()
        x /= x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        assert found[name].dtype == np.float32
        assert np.allclose(found[name], (x.T @ x / tokens).numpy(), rtol=1e-4, atol=1e-4 * found[name].max())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("inf")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"What passes model\.layers\.1\.mlp\.down_neuron is not finite"):
        input_moments(model, batches, 1)


@every_precision
@pytest.mark.parametrize("spiking", [False, True])
def test_a_model_is_calibrated_linear_by_linear(precision: str, spiking: bool) -> None:
    """Codes of the folded weight, with the moment of the codes that it multiplies; the head too."""
    changes: dict[str, Any] = {"neurons": site_neurons(NeuronConfig())} if spiking else {}
    model = mar_model(**changes)
    config = mar_config(**changes).to_dict()
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    moments = input_moments(model, [packed_rows()], 1)
    plain = compact.compress(config, weights, precision, "int8")
    made = compact.compress(config, weights, precision, "int8", moments)
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {
        name: (value.shape, value.dtype) for name, value in plain.items()
    }
    changed = {name for name in made if not np.array_equal(made[name], plain[name])}
    assert changed
    assert all(name.rpartition(".")[2] in ("codes", "scales", "base") for name in changed)
    assert not [name for name in changed if name.startswith("model.embed")]
    expected = compact.quantise(weights["lm_head.weight"], "int8", moment=moments[compact.HEAD_PLACE])
    assert np.array_equal(made["lm_head.codes"], compact._stored("lm_head", expected)["lm_head.codes"])
    for layer in range(2):
        for linear, place in (("mixer.out_proj", "mixer.out_neuron"), ("mlp.up_proj", "mlp.in_neuron")):
            name, at = f"model.layers.{layer}.{linear}", f"model.layers.{layer}.{place}"
            fold = np.float32(1)
            if spiking:
                a = weights[f"{at}.a"].astype(np.float16).astype(np.float32)
                v = np.broadcast_to(np.exp(a), weights[f"{name}.weight"].shape[1])
                fold = v / compact.row_multipliers(v, 4)
            moment = moments[at] / np.outer(fold, fold)
            expected = compact._stored(
                name, compact.quantise(weights[f"{name}.weight"] * fold, precision, moment=moment)
            )
            same = np.mean([np.mean(made[key] == value) for key, value in expected.items()])
            assert same > 0.98  # the moment is divided in another order here


@pytest.fixture(scope="module")
def student(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a spiking student with a text beside it."""
    folder = tmp_path_factory.mktemp("student")
    model = mar_model(vocab_size=len(tiny_tokenizer), neurons=site_neurons(NeuronConfig()))
    save_student(model, tiny_tokenizer, folder / "spiking", CARD)
    (folder / "text.txt").write_text("The river rose during the night, and nobody saw it. " * 60)
    return folder


@every_precision
def test_a_calibrated_folder_is_like_any_other(student: Path, tmp_path: Path, precision: str) -> None:
    text = str(student / "text.txt")
    pack_to_folder(student / "spiking", tmp_path / "plain", precision, "int8")
    pack_to_folder(student / "spiking", tmp_path / "fit", precision, "int8", text, 600)
    written = json.loads((tmp_path / "fit" / "provenance.json").read_text())["settings"]
    assert written == {"precision": precision, "head": "int8", "text": text, "tokens": 600}
    assert (tmp_path / "fit" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    loaded = load_student(tmp_path / "fit")
    _, weights, _ = read_folder(tmp_path / "fit")
    assert all(np.array_equal(value.detach().numpy(), weights[name]) for name, value in loaded.named_parameters())
    original, plain = load_student(student / "spiking"), load_student(tmp_path / "plain")
    moments = input_moments(original, [packed_rows(vocabulary=original.config.vocab_size)], 1)

    def lost(model: MarForCausalLM, layer: int) -> float:
        name = f"model.layers.{layer}.mlp.down_proj"
        gone = (model.get_parameter(f"{name}.weight") - original.get_parameter(f"{name}.weight")).detach().numpy()
        return float(((gone @ moments[f"model.layers.{layer}.mlp.down_neuron"]) * gone).sum())

    assert all(np.isfinite(lost(loaded, layer)) for layer in range(2))
    assert not loaded.get_parameter("model.layers.0.mlp.down_proj.weight").equal(
        plain.get_parameter("model.layers.0.mlp.down_proj.weight")
    )


def test_a_tied_matrix_is_rounded_for_predicting() -> None:
    model = mar_model(tie_word_embeddings=True)
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    moments = input_moments(model, [packed_rows()], 1)
    made = compact.compress(mar_config(tie_word_embeddings=True).to_dict(), weights, "int8", "int4", moments)
    name = "model.embed_tokens"
    fit = compact.quantise(weights[f"{name}.weight"], "int4", short=True, moment=moments[compact.HEAD_PLACE])
    assert not [key for key in made if key.startswith("lm_head")]
    assert all(np.array_equal(made[key], value) for key, value in compact._stored(name, fit).items())


def test_no_tokens_are_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The tokens to calibrate rounding on are 0; use at least 1"):
        pack_to_folder(student / "spiking", tmp_path / "new", "int4", "int8", str(student / "text.txt"), 0)
    assert not (tmp_path / "new").exists()
