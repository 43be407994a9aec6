import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mar.census import census
from mar.config import SITES
from mar.costs import cost
from mar.data import PackedRows
from mar.evaluate import held_out
from mar.folder import load_student
from mar.model import MarForCausalLM
from mar.refinement import refine
from mar.results import CONTEXTS, evaluation_rows, measure, sample, spike_rates
from mar.sources import DataConfig
from mar.spikes import SpikeMonitor
from mar.teachers import Teacher, load_teacher
from tiny_recipes import LENGTH, tiny_recipe, write_sentences


@pytest.fixture(scope="module")
def teacher(tiny_llama_folder: Path) -> Teacher:
    return load_teacher(tiny_llama_folder)


@pytest.fixture(scope="module")
def run(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of align and spike on the teacher's own text."""
    recipe = tiny_recipe(Path(teacher.source["name"]), "teacher")
    return refine(recipe, tmp_path_factory.mktemp("run"), teacher, progress=False).folder


@pytest.fixture(scope="module")
def students(run: Path) -> dict[str, MarForCausalLM]:
    return {"dense": load_student(run / "1-align"), "spiking": load_student(run / "3-spike")}


@pytest.fixture(scope="module")
def rows(run: Path, teacher: Teacher) -> tuple[dict[str, torch.Tensor], str]:
    recipe = tiny_recipe(Path(teacher.source["name"]), "teacher")
    return evaluation_rows(recipe, run, teacher)


@pytest.fixture(scope="module")
def figures(
    students: dict[str, MarForCausalLM], teacher: Teacher, rows: tuple[dict[str, torch.Tensor], str]
) -> dict[str, Any]:
    return measure(students, teacher, *rows, context=200)


def test_rows_are_the_teacher_s_held_out_text(
    run: Path, teacher: Teacher, rows: tuple[dict[str, torch.Tensor], str]
) -> None:
    found, name = rows
    data = DataConfig(str(run / "text" / "held_out"), length=LENGTH, shuffle=False)
    expected = next(PackedRows(data, teacher.tokenizer, epochs=1).batches(2))
    assert found.keys() == expected.keys() == {"input_ids", "document_ids"}
    assert all(tensor.equal(expected[key]) for key, tensor in found.items())
    assert name == "text written by the teacher from unseen prompts"


def test_figures_are_plain_json(figures: dict[str, Any]) -> None:
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_only_students_are_compared_with_the_teacher(figures: dict[str, Any], teacher: Teacher) -> None:
    assert list(figures["held_out"]) == ["dense", "spiking"]
    assert figures["against"] == teacher.source["name"]
    for figure in figures["held_out"].values():
        assert figure["against"] == teacher.source["name"]
        assert figure["kl"]["value"] > 0
        assert 0 <= figure["agreement"]["value"] <= 1
        assert figure["window"] == LENGTH
        ratio = figure["ppl"]["value"] / figure["teacher_ppl"]["value"]
        assert figure["ppl_ratio"]["value"] == pytest.approx(ratio)
    first, second = figures["held_out"].values()
    assert first["teacher_ppl"] == second["teacher_ppl"]


def test_a_teacher_measured_as_a_student_has_no_divergence(
    teacher: Teacher, rows: tuple[dict[str, torch.Tensor], str]
) -> None:
    found, text = rows
    options: Any = {"document_ids": found["document_ids"], "precision": "bf16", "text": text}
    figure = held_out({"teacher": teacher.model}, teacher.model, found["input_ids"], LENGTH, **options)["teacher"]
    assert figure.kl.value == pytest.approx(0, abs=1e-6)
    assert figure.agreement.value == 1


def test_rates_are_what_the_monitor_counts(
    figures: dict[str, Any], students: dict[str, MarForCausalLM], rows: tuple[dict[str, torch.Tensor], str]
) -> None:
    assert list(figures["spikes"]) == ["spiking"]
    model = students["spiking"]
    with SpikeMonitor(model) as monitor, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=rows[0]["input_ids"], document_ids=rows[0]["document_ids"])
    report = monitor.summary()
    totals = figures["spikes"]["spiking"]["totals"]
    assert totals["tokens"] == rows[0]["input_ids"].numel()
    assert totals["spikes"] == report.totals.spikes
    assert totals["spikes_per_mac"] == report.totals.spikes_per_mac
    assert totals["nonzero_per_mac"] == report.totals.nonzero_per_mac
    assert figures["rate_grids"]["spiking"]["spikes"] == report.grid("spikes_per_element")
    assert [len(layer) for layer in figures["rate_grids"]["spiking"]["nonzero"]] == [len(SITES)] * 2


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_rates_do_not_depend_on_the_batch(
    students: dict[str, MarForCausalLM], rows: tuple[dict[str, torch.Tensor], str], batch: int
) -> None:
    found, text = rows
    one, other = (spike_rates(students["spiking"], found, text, size).totals for size in (2, batch))
    assert (one.tokens, one.elements) == (other.tokens, other.elements)
    # Batches of other shapes round sums in another order, which may flip a code here and there.
    assert other.spikes_per_mac == pytest.approx(one.spikes_per_mac, rel=0.02)


def test_energy_is_the_census_priced(
    figures: dict[str, Any], students: dict[str, MarForCausalLM], teacher: Teacher,
    rows: tuple[dict[str, torch.Tensor], str],
) -> None:  # fmt: skip
    rates = {"spiking": spike_rates(students["spiking"], *rows)}
    for name, model in {"teacher": teacher.model, **students}.items():
        report = cost(census(model.config, 200, rates.get(name)))
        assert figures["energy"][name] == {
            "decoder_uj": pytest.approx(report.decoder),
            "with_head_uj": pytest.approx(report.with_head),
            "context": 200,
        }
        assert figures["energy"][name]["with_head_uj"] > figures["energy"][name]["decoder_uj"] > 0
        curve = figures["energy_curves"][name]
        assert curve["contexts"] == list(CONTEXTS)
        at_64 = cost(census(model.config, 64, rates.get(name))).decoder
        assert curve["decoder_uj"][0] == pytest.approx(at_64)
    assert figures["energy_curves"]["teacher"]["decoder_uj"][-1] > figures["energy"]["teacher"]["decoder_uj"]
    assert len(set(figures["energy_curves"]["dense"]["decoder_uj"])) == 1


def test_parameters_are_counted(figures: dict[str, Any], students: dict[str, MarForCausalLM], teacher: Teacher) -> None:
    models: dict[str, Any] = {"teacher": teacher.model, **students}
    assert figures["parameters"] == {name: model.num_parameters() for name, model in models.items()}


def test_without_a_spiking_student_there_are_no_rates(
    students: dict[str, MarForCausalLM], teacher: Teacher, rows: tuple[dict[str, torch.Tensor], str]
) -> None:
    found = measure({"dense": students["dense"]}, teacher, *rows)
    assert found["spikes"] == found["rate_grids"] == {}
    assert list(found["energy"]) == ["teacher", "dense"]


def test_the_held_out_side_of_the_training_text(teacher: Teacher, tmp_path: Path) -> None:
    text = write_sentences(tmp_path / "sentences.jsonl")
    recipe = tiny_recipe(tmp_path, text)
    recipe.data = replace(recipe.data, split="train", held_out_share=0.3)
    found, name = evaluation_rows(recipe, tmp_path, teacher)
    assert found["input_ids"].shape == (2, LENGTH)
    assert name == f"the documents of {text} held out from training"
    kept_aside = PackedRows(replace(recipe.data, split="held_out", shuffle=False), teacher.tokenizer)
    assert found["input_ids"].equal(next(kept_aside.batches(2))["input_ids"])


def test_text_of_its_own(teacher: Teacher, tmp_path: Path) -> None:
    text = write_sentences(tmp_path / "sentences.jsonl")
    recipe = tiny_recipe(tmp_path, "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"no text to measure on; set evaluation\.data, or set data\.split to 'train'"):
        evaluation_rows(recipe, tmp_path, teacher)
    recipe.evaluation.data = DataConfig(str(text))
    found, name = evaluation_rows(recipe, tmp_path, teacher)
    assert found["input_ids"].shape == (2, LENGTH)
    assert name == str(text)
    recipe.evaluation.tokens = 1
    assert evaluation_rows(recipe, tmp_path, teacher)[0]["input_ids"].shape == (1, LENGTH)


def test_too_little_held_out_text(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short.")
    recipe = tiny_recipe(tmp_path, "elsewhere.jsonl")
    recipe.evaluation.data = DataConfig(str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match=r"only \d+ tokens|no row of 32 tokens"):
        evaluation_rows(recipe, tmp_path, teacher)


def test_a_sample_is_the_same_each_time(students: dict[str, MarForCausalLM], teacher: Teacher) -> None:
    first, again = (sample(students["spiking"], teacher.tokenizer, "What is the answer?", 12) for _ in range(2))
    assert first == again
    assert first
    assert len(sample(students["spiking"], teacher.tokenizer, "What is the answer?", 40)) > len(first)


def test_figures_are_finite(figures: dict[str, Any]) -> None:
    for figure in figures["held_out"].values():
        for name in ("ppl", "teacher_ppl", "kl", "reverse_kl", "agreement"):
            assert math.isfinite(figure[name]["value"])
