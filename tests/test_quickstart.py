import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import mar.quickstart
from mar.quickstart import announce, estimate_minutes, quickstart, refine_and_measure, write_report
from mar.recipe import EvaluationSettings, Recipe, debug_size, read_recipe
from mar.report import QuickReport
from mar.sources import DataConfig
from mar.teachers import load_teacher
from test_readme import fill_cache
from tiny_recipes import files_of, provenance, steps_of, tiny_recipe, write_sentences

Outcome = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def outcome(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The quickstart in its debug size with the tiny LLaMA in the place of the real teacher: folder and figures."""
    base = tmp_path_factory.mktemp("quickstart")
    fill_cache(base / "cache", tiny_llama_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAR_CACHE", str(base / "cache"))
        figures = quickstart(base / "run", debug=True)
    return base / "run", figures, str(base / "cache")


def report_of(folder: Path) -> QuickReport:
    return QuickReport.from_dict(json.loads((folder / "results.json").read_text())["report"])


def test_it_ends_with_students_figures_and_a_report(outcome: Outcome) -> None:
    folder, figures, _ = outcome
    assert [step.name for step in steps_of(folder)] == [
        "0-convert", "1-align", "2-distill", "3-insert_neurons", "4-spike",
    ]  # fmt: skip
    assert figures["folders"] == {"dense": str(folder / "2-distill"), "spiking": str(folder / "4-spike")}
    assert figures["report"] == str(folder / "report.html")
    assert list(figures["samples"]) == ["teacher", "dense", "spiking"]
    assert list(figures["stages"]) == ["align", "distill", "spike"]
    assert provenance(folder / "4-spike")["teacher"]["name"] == "smollm2-135m"
    written = json.loads((folder / "results.json").read_text())["figures"]
    assert written == json.loads(json.dumps({key: value for key, value in figures.items() if key != "report"}))


def test_the_report_has_the_measured_figures(outcome: Outcome) -> None:
    folder, figures, _ = outcome
    report = report_of(folder)
    teacher, dense, spiking = report.rows
    assert [row.name for row in report.rows] == ["teacher", "dense", "spiking"]
    assert (teacher.kl, teacher.against, teacher.agreement, teacher.spikes_per_input) == (None, None, None, None)
    assert (dense.spikes_per_input, dense.nonzero) == (None, None)
    assert spiking.spikes_per_input == figures["spikes"]["spiking"]["totals"]["spikes_per_mac"]
    assert spiking.nonzero == figures["spikes"]["spiking"]["totals"]["nonzero_per_mac"]
    for row in (dense, spiking):
        held_out = figures["held_out"][row.name]
        assert (row.kl, row.against) == (held_out["kl"]["value"], "smollm2-135m")
        assert (row.perplexity, row.agreement) == (held_out["ppl"]["value"], held_out["agreement"]["value"])
        assert teacher.perplexity == held_out["teacher_ppl"]["value"]
    for row in report.rows:
        assert row.energy_decoder_uj == figures["energy"][row.name]["decoder_uj"]
        assert row.energy_total_uj == figures["energy"][row.name]["with_head_uj"]
    assert report.samples == figures["samples"]
    assert list(report.stage_logs) == ["1-align", "2-distill", "4-spike"]
    assert [record["step"] for record in report.stage_logs["4-spike"]] == [1, 2]
    assert list(report.energy_curves) == ["teacher", "dense", "spiking"]
    assert report.rates == figures["rate_grids"]["spiking"]["spikes"]
    assert "a tiny LLaMA of the tests" in report.notes[0]


def test_the_report_holds_the_recipe_that_ran(outcome: Outcome, tmp_path: Path) -> None:
    folder, _, _ = outcome
    (tmp_path / "ran.yaml").write_text(report_of(folder).recipe_yaml)
    assert read_recipe(tmp_path / "ran.yaml") == debug_size(read_recipe("quickstart"))


def test_the_page_is_whole_and_alone(outcome: Outcome) -> None:
    page = (outcome[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert page.count("<svg") >= 3
    assert "http-equiv" not in page
    assert 'src="' not in page.replace('src="data:', "")


def test_it_goes_on_where_it_was(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, figures, cache = outcome
    monkeypatch.setenv("MAR_CACHE", cache)
    before = files_of(folder)
    again = quickstart(folder, debug=True)
    for key in ("held_out", "spikes", "energy", "samples", "stages", "folders"):
        assert again[key] == figures[key]
    changed = {name for name, seen in files_of(folder).items() if before.get(name) != seen}
    assert changed == {"results.json", "report.html"}


def test_the_report_is_written_again_from_results(outcome: Outcome, tmp_path: Path, capfd: Any) -> None:
    shutil.copy(outcome[0] / "results.json", tmp_path)
    assert write_report(tmp_path) == {"report": str(tmp_path / "report.html")}
    assert (tmp_path / "report.html").read_text() == (outcome[0] / "report.html").read_text()
    out, err = capfd.readouterr()
    assert out == ""
    for name in ("teacher", "dense", "spiking"):
        assert name in err
    assert "MODELLED" in err


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"report": 3}', '{"report": {"rows": 3}}'])
def test_damaged_results_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"(?s)results\.json is damaged \(.*\); remove it and run"):
        write_report(tmp_path)


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json; run `mar refine` or `mar quickstart`"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"report": {"title": "x"}}))
    with pytest.raises(ValueError, match=r"missing or unknown; it was written by another version"):
        write_report(tmp_path)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_a_number_above_zero(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ValueError, match=r"minutes is .*; give a number above 0"):
        quickstart(tmp_path / "run", minutes)
    assert not (tmp_path / "run").exists()


def test_minutes_scale_the_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Recipe] = []
    monkeypatch.setattr(mar.quickstart, "refine_and_measure", lambda recipe, output: ran.append(recipe) or {})
    for minutes in (10, 25, 1e-9):
        quickstart(tmp_path, float(minutes))
    whole, longer, least = ran
    assert whole == read_recipe("quickstart")
    assert longer.writing.tokens == round(2.5 * whole.writing.tokens)
    assert longer.writing.held_out_tokens == whole.writing.held_out_tokens
    for name, stage in whole.stages.items():
        assert longer.stages[name] == replace(stage, train=replace(stage.train, tokens=round(2.5 * stage.train.tokens)))
        assert least.stages[name].train.tokens == 1


def test_what_it_takes_is_said_first(tiny_llama_folder: Path, tmp_path: Path, capfd: Any) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "teacher")
    announce(recipe, tmp_path / "run", load_teacher(tiny_llama_folder))
    out, err = capfd.readouterr()
    assert out == ""
    for part in (
        "tiny: about",
        "minutes to go on this machine (estimated)",
        "GB of disk",
        "GB of memory",
        str(tmp_path),
    ):
        assert part in err


def test_other_minutes_are_refused_before_anything_is_said(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder, _, cache = outcome
    monkeypatch.setenv("MAR_CACHE", cache)
    with pytest.raises(ValueError, match=r"part-000\.parquet was made with other settings \(tokens was"):
        quickstart(folder, minutes=20)
    assert capfd.readouterr().err == ""


def test_another_stage_is_refused_before_anything_is_said(
    outcome: Outcome, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder, _, cache = outcome
    monkeypatch.setenv("MAR_CACHE", cache)
    recipe = debug_size(read_recipe("quickstart"))
    recipe.stages["spike"].train = replace(recipe.stages["spike"].train, lr=2e-3)
    with pytest.raises(ValueError, match=r"4-spike was made with other settings \(settings\.train\.lr was"):
        refine_and_measure(recipe, folder)
    assert capfd.readouterr().err == ""


@pytest.fixture
def one_teraflop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose precisions are equally fast."""
    rates = dict.fromkeys(("bf16", "fp32", "int8"), 1000.0)
    monkeypatch.setattr("mar.quickstart.matmul_rates", lambda device: rates)


def test_the_estimate_grows_with_the_work(tiny_llama_folder: Path, tmp_path: Path, one_teraflop: None) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "a.txt")
    recipe.stages["align"].train = replace(recipe.stages["align"].train, tokens=10**9)
    short = estimate_minutes(recipe, 10**8, tmp_path)
    assert short == pytest.approx(6e17 / 1e12 / 0.6 / 60, rel=0.01)  # 6 operations a token and parameter
    recipe.stages["align"].train = replace(recipe.stages["align"].train, tokens=10**11)
    assert estimate_minutes(recipe, 10**8, tmp_path) == pytest.approx(100 * short, rel=0.01)


@pytest.mark.parametrize("end", ["", '{"tokens": 9'])
def test_the_estimate_leaves_out_what_is_done(
    tiny_llama_folder: Path, tmp_path: Path, one_teraflop: None, end: str
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "a.txt")
    recipe.stages["align"].train = replace(recipe.stages["align"].train, tokens=10**9)
    whole = estimate_minutes(recipe, 10**8, tmp_path)
    log = tmp_path / "1-align" / "training" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"tokens": 1000}\n{"tokens": 750000000}\n' + end)
    assert estimate_minutes(recipe, 10**8, tmp_path) == pytest.approx(whole / 4, rel=0.01)
    log.write_text("damaged\n")
    assert estimate_minutes(recipe, 10**8, tmp_path) == whole


def test_the_estimate_leaves_out_written_text(tiny_llama_folder: Path, tmp_path: Path, one_teraflop: None) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "teacher")
    recipe.writing = replace(recipe.writing, tokens=10**6, batch_size=100, length=1000)
    whole = estimate_minutes(recipe, 10**11, tmp_path)
    (tmp_path / "text" / "train").mkdir(parents=True)
    (tmp_path / "text" / "train" / "part-000.parquet").touch()
    assert whole - estimate_minutes(recipe, 10**11, tmp_path) == pytest.approx(6e16 / 1e12 / 0.6 / 60, rel=0.01)


def test_a_disk_too_small_is_refused_before_any_work(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5, 5))
    with pytest.raises(OSError, match=r"^The run needs about .* GB of disk and 0\.0 GB are free; make room\.$"):
        refine_and_measure(tiny_recipe(tiny_llama_folder, "teacher"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("evaluation", [None, DataConfig("missing.jsonl")])
def test_text_to_measure_on_is_looked_for_before_training(
    tiny_llama_folder: Path, tmp_path: Path, evaluation: DataConfig | None
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, write_sentences(tmp_path / "sentences.jsonl"))
    recipe.evaluation = EvaluationSettings(evaluation, tokens=64, window=32)
    with pytest.raises((ValueError, FileNotFoundError), match=r"no text to measure on|there is no 'missing\.jsonl'"):
        refine_and_measure(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dense_run_is_measured_too(tiny_llama_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_llama_folder, write_sentences(tmp_path / "sentences.jsonl"), ("align",))
    recipe.data = replace(recipe.data, split="train", held_out_share=0.3)
    figures = refine_and_measure(recipe, tmp_path / "run")
    assert list(figures["held_out"]) == ["dense"]
    report = report_of(tmp_path / "run")
    assert [row.name for row in report.rows] == ["teacher", "dense"]
    assert report.rates == []
    assert yaml.safe_load(report.recipe_yaml)["name"] == "tiny"
