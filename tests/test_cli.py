import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import mar.cli
from mar.cli import VERBS, main
from mar.recipe import read_recipe
from test_readme import fill_cache
from tiny_recipes import files_of, provenance, steps_of, weights_of, write_sentences

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def workplace(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cached teacher, text, task items and a finished quickstart, all tiny; tests only add to it."""
    base = tmp_path_factory.mktemp("workplace")
    fill_cache(base / "cache", tiny_llama_folder)
    write_sentences(base / "sentences.jsonl")
    (base / "items").mkdir()
    items = [{"goal": "Open a jar.", "sol1": f"Twist it {n} times.", "sol2": "Sit.", "label": n % 2} for n in range(4)]
    (base / "items" / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAR_CACHE", str(base / "cache"))
        patch.chdir(base)
        with pytest.raises(SystemExit) as end:
            main(["quickstart", "run", "--debug"])
    assert end.value.code == 0
    return base


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in the workplace; returns exit code, stdout and stderr."""
    monkeypatch.setenv("MAR_CACHE", str(workplace / "cache"))
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """Runs a command line with --json, which must succeed and print one object on stdout; returns it."""

    def call(*arguments: object) -> Any:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        return json.loads(out)

    return call


DENSE, SPIKING, HELD_OUT = "run/2-distill", "run/4-spike", "run/text/held_out"


def test_help_names_every_verb(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n    {verb} " in out or f"\n    {verb}\n" in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_every_option_does(run: Run, verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert "--json" in out
    assert "class" not in out
    command = next(a for a in mar.cli.build_parser()._actions if a.dest == "verb").choices[verb]  # type: ignore[index]
    for action in command._actions:
        assert action.help


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mar", "generate"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mar generate: the following arguments are required")


def test_an_empty_path_is_refused(run: Run) -> None:
    code, _, err = run("insert", "", "out", "--text", HELD_OUT)
    assert (code, err) == (
        2,
        "mar insert: argument model: an empty path; name a file or folder; see `mar insert --help`.\n",
    )


def test_help_is_quick() -> None:
    code = "import sys, mar.cli\ntry: mar.cli.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1].split()
    assert not {"torch", "transformers", "jsonargparse", "rich", "matplotlib", "numpy"} & set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ("insert", "nowhere", "new", "--text", "x"),
        ("train", "align", "nowhere", "new", "--teacher", "x", "--text", "x"),
        ("retune", "nowhere", "new", "--text", "x"),
        ("pack", "nowhere", "new"),
        ("spikes", "nowhere", "x"),
        ("eval", "nowhere", "--teacher", "x", "--text", "x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_not_there_is_refused_before_torch_is_loaded(tmp_path: Path, arguments: tuple[str]) -> None:
    code = (
        f"import sys, mar.cli\ntry: mar.cli.main({list(arguments)})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("mar: nowhere holds no config.json; give a folder that")


def test_a_prompt_after_a_lone_dash_is_taken_as_it_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(prompt: str, /) -> dict[str, str]:
        """Say it.

        Args:
            prompt: what.
        """
        return {"text": prompt}

    monkeypatch.setitem(VERBS, "generate", say)
    assert run("generate", "--", "--like_this")[:2] == (0, "--like_this\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "mar: the following arguments are required: VERB; see `mar --help`."),
        (("refin",), "mar: argument VERB: invalid choice: 'refin'"),
        (("generate", "x"), "mar generate: the following arguments are required: prompt; see `mar generate --help`."),
        (("generate", "x", "y", "--tokens", "many"), "mar generate: argument --tokens: invalid int value: 'many'"),
        (("generate", "x", "y", "--tok", "3"), "mar generate: unrecognized arguments: --tok 3; see"),
        (("train", "aling", "a", "b"), "mar train: argument kind: invalid choice: 'aling'"),
        (("refine", "quickstart", "--debgu"), "mar refine: unrecognized arguments: --debgu; see"),
        (("refine", "quickstrat"), "mar: There is no recipe 'quickstrat'; give a YAML file or one of llama-3.2-1b"),
        (("refine", "quickstart", "--stages.align.train.tokens"), "mar: Recipe quickstart: "),
        (("refine", "quickstart", "--stages.align.train.tokns=3"), "mar: Recipe quickstart: there is no setting"),
        (("refine", "quickstart", "--data.length", "0"), "mar: data.length is 0; it must be at least 1."),
        (("refine", "smollm2-135m"), "mar: Recipe smollm2-135m: the following arguments are required: data.source."),
        (("quickstart", "x", "--minutes", "-3"), "mar: minutes is -3.0; give a number above 0."),
        (("generate", "nowhere", "Hello"), "mar: there is no model 'nowhere'; give a folder"),
        (("generate", SPIKING, "Hello", "--temperature", "-1"), "mar: temperature is -1.0; use 0"),
        (("report", "items"), "mar: items holds no results.json; run `mar refine`"),
        (("spikes", DENSE, HELD_OUT), "mar: The model has no neurons to watch"),
        (("spikes", SPIKING, "missing.txt"), "mar: there is no 'missing.txt'; give a file"),
        (
            ("spikes", "smollm2-135m", HELD_OUT),
            "mar: smollm2-135m holds no config.json; give a folder that `mar refine`",
        ),
        (("energy", SPIKING), f"mar: {SPIKING} has neurons; give --text to measure their rates, or --spikes to assume"),
        (("energy", DENSE, "--context", "0"), "mar: context is 0; it counts the token itself"),
        (("energy", DENSE, "--tables", "7nm"), "mar: table is '7nm'; use one of 45nm-fp32"),
        (("eval", DENSE, "--teacher", "smollm2-135m"), "mar: There is nothing to evaluate on; give --text, --tasks"),
        (
            ("eval", DENSE, "--teacher", DENSE, "--text", HELD_OUT),
            "mar: run/2-distill/config.json says model_type 'mar'",
        ),
        (("eval", DENSE, "--teacher", "smollm2-135m", "--tasks", "chess"), "mar: Unknown task 'chess'; use some of"),
        (("convert", DENSE, "new"), "mar: run/2-distill/config.json says model_type 'mar'; a teacher must be a LLaMA"),
        (("convert", "smollm2-135m", DENSE), "mar: run/2-distill already holds a model; give another folder"),
        (
            ("insert", SPIKING, "new", "--text", HELD_OUT),
            f"mar: {SPIKING} already has neurons; change them with",
        ),
        (("retune", DENSE, "new", "--text", HELD_OUT), "mar: The model has no neurons to retune; insert some first."),
        (("insert", DENSE, "new"), "mar insert: the following arguments are required: --text"),
        (("insert", DENSE, "new", "--text", "x", "--sites", "qkv"), "mar insert: argument --sites: invalid choice"),
        (("pack", DENSE, "new", "--precision", "int2"), "mar pack: argument --precision: invalid choice: 'int2'"),
        (("pack", DENSE, SPIKING), f"mar: {SPIKING} already holds a model; give another folder"),
        (("pack", "items", "new"), "mar: items holds no config.json; give a folder that `mar refine`"),
        (("generate", "smollm2-135m", "Hello", "--engine", "native"), "mar: smollm2-135m holds no config.json"),
        (("generate", DENSE, "Hello", "--precision", "int8"), "mar: precision is 'int8', but torch writes in fp32"),
        (("chat", DENSE, "--threads", "0"), "mar: threads is 0; use 1 to 256."),
        (("generate", DENSE, "Hello", "--threads", "100000"), "mar: threads is 100000; use 1 to 256."),
        (
            ("eval", DENSE, "--teacher", "smollm2-135m", "--text", HELD_OUT, "--precision", "int4"),
            "mar: precision is 'int4', which torch has not; use fp32, bf16, or --engine native.",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, workplace: Path, arguments: tuple[str, ...], problem: str
) -> None:
    before = files_of(workplace)
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("mar")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith(problem)
    assert "Traceback" not in err
    assert files_of(workplace) == before


def test_print_config_is_the_recipe_with_changes(run: Run, run_json: Callable[..., Any], tmp_path: Path) -> None:
    changes = ["--stages.align.train.tokens=64", "--data.length", "32", "--teacher", "other"]
    code, out, err = run("refine", "quickstart", "--print_config", *changes)
    assert (code, err) == (0, "")
    expected = read_recipe("quickstart", ["stages.align.train.tokens=64", "data.length=32", "teacher=other"])
    (tmp_path / "printed.yaml").write_text(out)
    assert read_recipe(tmp_path / "printed.yaml") == expected
    assert run_json("refine", "quickstart", "--print-config", *changes) == yaml.safe_load(out)
    small = run_json("refine", "quickstart", "--print-config", "--debug")
    assert small["stages"]["spike"]["train"]["tokens"] == 128


def test_quickstart_gave_students_and_a_report(workplace: Path) -> None:
    assert [step.name for step in steps_of(workplace / "run")][-1] == "4-spike"
    assert (workplace / "run" / "report.html").is_file()


def test_refine_runs_a_recipe_with_changes(run_json: Callable[..., Any], workplace: Path) -> None:
    text = ["--data.source=sentences.jsonl", "--data.split", "train", "--data.held_out_share=0.3"]
    changes = ["--stages.align.train.tokens=64", "--stages.spike.train.tokens", "64", "--teacher", "smollm2-135m"]
    arguments = ("refine", "quickstart", "refined", "--data.length=32", "--evaluation.window=32", *text, *changes)
    small = ["--stages.distill.train.tokens=32", "--mixer.calibration_tokens=64"]
    found = run_json(*arguments, *small)
    assert found["folders"] == {"dense": "refined/2-distill", "spiking": "refined/4-spike"}
    assert found["stages"]["align"]["steps"] == 2
    assert found["text"] == "the documents of sentences.jsonl held out from training"
    assert provenance(Path("refined/4-spike"))["recipe"]["data"]["length"] == 32


def test_a_run_goes_by_its_recipe_s_name(run_json: Callable[..., Any]) -> None:
    Path("mine.yaml").write_text("name: mine\nteacher: smollm2-135m\ndata: {source: teacher}\nstages: {}\n")
    assert run_json("refine", "mine.yaml", "--debug")["folders"] == {"dense": "runs/mine/0-convert"}


def test_report_is_written_again(run_json: Callable[..., Any], workplace: Path) -> None:
    shutil.copytree(workplace / "run", workplace / "reported")
    page = (workplace / "reported" / "report.html").read_text()
    (workplace / "reported" / "report.html").unlink()
    assert run_json("report", "reported") == {"report": "reported/report.html"}
    assert (workplace / "reported" / "report.html").read_text() == page


def test_convert_makes_a_dense_folder(run_json: Callable[..., Any], run: Run) -> None:
    found = run_json("convert", "smollm2-135m", "converted", "--text", HELD_OUT)
    assert found["folder"] == "converted"
    origin = provenance(Path("converted"))
    assert (origin["parent"]["name"], origin["tokens"]) == ("smollm2-135m", 0)
    assert run("convert", "smollm2-135m", "published", "--preset=llamba", "--init", "llamba")[0] == 0
    assert json.loads(Path("published/config.json").read_text())["bc_norm"] == "none"
    assert run("convert", "smollm2-135m", "hybrid", "--window", "16")[0] == 0
    assert json.loads(Path("hybrid/config.json").read_text())["window"] == 16
    assert provenance(Path("hybrid"))["settings"]["window"] == 16


def test_insert_makes_a_spiking_folder(run_json: Callable[..., Any], run: Run) -> None:
    placed = ["--sites", "gate_up", "down_proj", "--per-site", "down_proj.time_steps=9", "gate_up.tau=2"]
    found = run_json("insert", DENSE, "inserted", "--text", HELD_OUT, "--tokens", 64, "--time-steps", 3, *placed)
    assert (found["folder"], found["neurons"]) == ("inserted", 2 * (32 + 64))
    assert 0 < found["nonzero_per_mac"] < found["spikes_per_mac"] < 9
    assert provenance(Path("inserted"))["metrics"] == {
        name: found[name] for name in ("spikes_per_mac", "nonzero_per_mac")
    }
    neurons = json.loads(Path("inserted/config.json").read_text())["neurons"]
    assert {site: settings["time_steps"] for site, settings in neurons.items()} == {"gate_up": 3, "down_proj": 9}
    assert run_json("spikes", "inserted", HELD_OUT, "--tokens", 32)["totals"]["spikes"] > 0


def test_train_goes_from_folder_to_folder(run_json: Callable[..., Any], run: Run) -> None:
    options = ["--text", "sentences.jsonl", "--length", 32, "--tokens", 64, "--batch-size", 1]
    found = run_json("train", "distill", DENSE, "trained/dense", "--teacher", "smollm2-135m", *options, "--alpha=0.5")
    assert (found["folder"], found["steps"], found["tokens"]) == ("trained/dense", 2, 64)
    assert found["bidirectional_kl_to_llama"] > 0
    kept = provenance(Path("trained/dense"))
    assert (kept["parent"]["name"], kept["settings"]["alpha"], kept["step"]) == (DENSE, 0.5, "distill")
    assert (kept["settings"]["train"]["lr"], kept["data"]["source"]) == (1e-4, "sentences.jsonl")
    assert kept["metrics"] == {key: value for key, value in found.items() if key != "folder"}

    found = run_json("train", "spike_align", "run/3-insert_neurons", "trained/a", "--teacher", DENSE, *options)
    assert found["mixer_relative_mse_to_dense"] > 0
    found = run_json("train", "spike", "trained/a", "trained/b", "--teacher", DENSE, *options, "--features=post")
    assert found["feature_distance_to_dense"] > 0
    found = run_json("train", "spike", "trained/a", "trained/c", "--teacher", "smollm2-135m", *options)
    assert found["bidirectional_kl_to_llama"] > 0

    before = weights_of(Path("trained/b"))
    assert run("train", "spike", "trained/a", "trained/b", "--teacher", DENSE, *options, "--features=post")[0] == 0
    assert weights_of(Path("trained/b")) == before
    code, _, err = run("train", "spike", "trained/a", "trained/b", "--teacher", DENSE, *options, "--features=pre")
    assert code == 2
    assert "is of another run: recipe.features was post and is now pre" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("align", DENSE, DENSE, "--teacher", "smollm2-135m"), "is the student or the teacher, which would be overwr"),
        (("spike", SPIKING, DENSE, "--teacher", DENSE), "is the student or the teacher, which would be overwritten"),
        (("align", DENSE, "new", "--teacher", DENSE), "align learns from a LLaMA, and run/2-distill holds a MAR model"),
        (("spike_align", SPIKING, "new", "--teacher", "smollm2-135m"), "spike_align compares with the dense student"),
        (("spike", DENSE, "new", "--teacher", DENSE), "needs a student with neurons; insert them first"),
        (("align", DENSE, "new", "--teacher", "smollm2-135m", "--alpha", "1"), "kind 'align' has no setting 'alpha'"),
        (("align", "missing", "new", "--teacher", "smollm2-135m"), "missing holds no config.json"),
    ],
)
def test_what_cannot_be_trained(run: Run, workplace: Path, arguments: tuple[str, ...], problem: str) -> None:
    before = files_of(workplace)
    code, _, err = run("train", *arguments, "--text", "sentences.jsonl", "--length", "32", "--tokens", "32")
    assert code == 2, err
    assert problem in err.splitlines()[-1]
    assert files_of(workplace) == before


def test_eval_on_text_and_tasks(run_json: Callable[..., Any], run: Run) -> None:
    text = ["--text", HELD_OUT, "--window", 32, "--tokens", 64]
    tasks = ["--tasks", "piqa", "--data-dir", "items", "--limit", 3]
    found = run_json("eval", DENSE, SPIKING, "--teacher", "smollm2-135m", *text, *tasks)
    assert list(found["held_out"]) == list(found["tasks"]) == [DENSE, SPIKING]
    assert list(found["spikes"]) == [SPIKING]
    assert found["tasks"][DENSE]["tasks"][0]["items"] == 3
    code, out, err = run("eval", DENSE, SPIKING, "--teacher", "smollm2-135m", *text, *tasks)
    assert (code, out) == (0, "")
    for part in ("perplexity", "top-1", "difference", "piqa", "majority", "modelled decoder", "spikes per input"):
        assert part in err


def test_eval_with_the_native_engine(run_json: Callable[..., Any]) -> None:
    what = ["--teacher", "smollm2-135m", "--text", HELD_OUT, "--window", 32, "--tokens", 64]
    what += ["--tasks", "piqa", "--data-dir", "items", "--limit", 3]
    native = ["--engine", "native", "--threads", 1, "--precision"]
    exact, rough, torch = (
        run_json("eval", DENSE, SPIKING, *what, *native, "fp32"),
        run_json("eval", DENSE, *what, *native, "int4"),
        run_json("eval", DENSE, *what),
    )
    assert list(exact["spikes"]) == [SPIKING]
    kl = [found["held_out"][DENSE]["kl"]["value"] for found in (exact, torch, rough)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert kl[2] != pytest.approx(kl[1], rel=1e-3)
    assert [found["held_out"][DENSE]["precision"] for found in (exact, rough)] == ["native fp32", "native int4"]
    answers = [found["tasks"][DENSE]["tasks"][0]["student"] for found in (exact, torch)]
    assert answers[0] == answers[1]


def test_eval_keeps_folders_of_one_name_apart(run_json: Callable[..., Any], workplace: Path) -> None:
    shutil.copytree(workplace / DENSE, workplace / "elsewhere" / "2-distill")
    text = ["--text", HELD_OUT, "--window", 32, "--tokens", 32]
    found = run_json("eval", DENSE, "elsewhere/2-distill", "--teacher", "smollm2-135m", *text)
    assert list(found["held_out"]) == [DENSE, "elsewhere/2-distill"]


def test_energy_says_where_its_rates_come_from(run_json: Callable[..., Any], run: Run) -> None:
    models = ["smollm2-135m", DENSE, SPIKING]
    found = run_json("energy", *models, "--context", 100, "--spikes", 0.5, "--tables", "45nm-fp32")
    assert [row["model"] for row in found["models"]] == models
    assert found["rates"] == {"smollm2-135m": "no neurons", DENSE: "no neurons", SPIKING: "rates assumed"}
    assert "assumed" in found["models"][2]["compute"]["label"]
    llama, dense, spiking = (row["compute"]["decoder_uj"] for row in found["models"])
    assert llama > 0
    assert dense > spiking > 0
    measured = run_json("energy", SPIKING, "--text", HELD_OUT)
    assert measured["rates"] == {SPIKING: f"rates measured on {HELD_OUT}"}
    assert "measured on" in measured["models"][0]["compute"]["label"]
    code, out, err = run("energy", *models, "--spikes", "0.5", "--averaging", "prefill")
    assert (code, out) == (0, "")
    assert "decoder, µJ" in err
    assert "averaging: prefill" in err


def test_spikes_are_counted(run_json: Callable[..., Any], run: Run) -> None:
    found = run_json("spikes", SPIKING, HELD_OUT, "--tokens", 64)
    assert found["totals"]["tokens"] == 64
    assert len(found["sites"]) == 8
    code, out, err = run("spikes", SPIKING, HELD_OUT, "--tokens", 64)
    assert (code, out) == (0, "")
    assert "weighted by MACs" in err


def test_generate_is_repeatable(run_json: Callable[..., Any], run: Run) -> None:
    arguments = ("generate", SPIKING, "What is the answer?", "--tokens", 9)
    found = run_json(*arguments)
    assert found["tokens"] == 9
    assert run_json(*arguments) == found
    assert run_json(*arguments, "--seed", 3) != found
    assert run_json("generate", "smollm2-135m", "What is the answer?", "--tokens", 3)["tokens"] == 3
    likeliest = run_json(*arguments, "--temperature", 0)
    assert run_json(*arguments, "--top-k", 1)["text"] == likeliest["text"]
    assert run_json(*arguments, "--top-p", 1e-6)["text"] == likeliest["text"]
    code, out, _ = run(*arguments)
    assert (code, out) == (0, found["text"] + "\n")


def test_pack_writes_what_everything_reads(run_json: Callable[..., Any], run: Run, workplace: Path) -> None:
    found = run_json("pack", SPIKING, "packed", "--precision", "int4", "--head", "int8")
    assert found == {"folder": "packed", "bytes": sum(size for size, _ in files_of(workplace / "packed").values())}
    assert json.loads(Path("packed/config.json").read_text())["compact"] == {"precision": "int4", "head": "int8"}
    assert run_json("generate", "packed", "Why?", "--tokens", 3)["tokens"] == 3
    assert run_json("spikes", "packed", HELD_OUT, "--tokens", 32)["totals"]["tokens"] == 32
    native = run_json("generate", "packed", "Why?", "--tokens", 3, "--engine", "native", "--threads", 1)
    assert native["spikes_per_mac"] >= native["nonzero_per_mac"] > 0
    fit = run_json("pack", SPIKING, "fit", "--precision", "int4", "--text", HELD_OUT, "--tokens", 96)
    assert fit["bytes"] > 0
    assert json.loads(Path("fit/provenance.json").read_text())["settings"]["text"] == HELD_OUT
    assert run_json("generate", "fit", "Why?", "--tokens", 3, "--engine", "native", "--threads", 1)["tokens"] == 3
    code, out, err = run("pack", "packed", "again")
    assert (code, out) == (2, "")
    assert "packed is compact already; give the folder that it was made from" in err


def test_the_native_engine_says_what_torch_says(run_json: Callable[..., Any], run: Run) -> None:
    """A dense student at temperature 0 in fp32, and what was counted in one line of stderr."""
    arguments = ("generate", DENSE, "What is the answer?", "--tokens", 9, "--temperature", 0)
    native = run_json(*arguments, "--engine", "native", "--precision", "fp32", "--threads", 1)
    assert {key: native[key] for key in ("text", "tokens")} == run_json(*arguments)
    assert native.keys() == {"text", "tokens", "tokens_per_s", "energy_uj"}
    code, out, err = run("generate", SPIKING, "What is the answer?", "--engine", "native", "--threads", "1")
    assert code == 0
    assert (
        out == run_json("generate", SPIKING, "What is the answer?", "--engine", "native", "--threads", 1)["text"] + "\n"
    )
    line = err.splitlines()[-1]
    words = r"spikes per input, [\d.]+% of the inputs not zero, modelled energy [\d.e-]+ µJ per token with the head "
    words += r"\(45nm-fp32, compute only\)\]"
    assert re.fullmatch(rf"\[[\d.e+]+ tokens/s, [\d.]+ {words}", line), line


def test_chat_keeps_its_state_over_turns(
    run_json: Callable[..., Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    def replies(*lines: str) -> list[str]:
        say(*lines)
        code, out, err = run("chat", SPIKING, "--tokens", "6", "--temperature", "0")
        assert (code, out) == (0, "")
        return err.split("> ")[1:-1]

    say("What is the answer?", "And the question?")
    assert run_json("chat", SPIKING, "--tokens", 6) == {"turns": 2}
    both = replies("What is the answer?", "And the question?")
    assert len(both) == 2
    assert replies("What is the answer?") == both[:1]
    assert replies("And the question?") != both[1:]

    say("What is the answer?", "And the question?")
    code, out, err = run("chat", DENSE, "--tokens", "6", "--engine", "native", "--threads", "1")
    assert (code, out) == (0, "")
    assert err.count("modelled energy") == 2


def test_info_names_versions_and_backends(run_json: Callable[..., Any], run: Run) -> None:
    found = run_json("info")
    assert found["versions"]["torch"]
    assert "scan" in found["backends"]
    assert found["cpus"] >= 1
    code, out, err = run("info")
    assert (code, out) == (0, "")
    assert "torch: 2" in err
    assert found["native"]["name"] in err
    assert "the best that this CPU runs" in err


def test_what_libraries_print_is_kept_off_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> dict[str, Any]:
        print("loading ...")
        return {"done": True}

    monkeypatch.setitem(VERBS, "info", chatty)
    assert run("info", "--json") == (0, '{"done": true}\n', "loading ...\n")


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_130_and_the_same_command_goes_on(run: Run, workplace: Path, times: int) -> None:
    arguments = [
        "refine",
        "quickstart",
        f"stopped-{times}",
        "--debug",
        "--writing.tokens=256",
        "--writing.held_out_tokens=200",
    ]
    steps = 0

    def press(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    handle = register_optimizer_step_pre_hook(press)
    try:
        code, out, err = run(*arguments)
    finally:
        handle.remove()
    assert (code, out) == (130, "")
    last = err.splitlines()[-1]
    assert last == ("Stopped after step 1 of 2; run again to go on from there." if times == 1 else last)
    assert "go on" in last
    assert "Traceback" not in err
    assert run(*arguments)[0] == 0
    assert [step.name for step in steps_of(workplace / f"stopped-{times}")][-1] == "4-spike"


def test_a_full_disk_is_exit_code_2_and_nothing_is_lost(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    options = ["--teacher", "smollm2-135m", "--text", "sentences.jsonl", "--length", "32", "--tokens", "64"]
    before = files_of(workplace / DENSE)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        code, _, err = run("train", "distill", DENSE, "squeezed", *options)
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "mar: The disk is full at squeezed; free some space and run the same command"
    )
    assert files_of(workplace / DENSE) == before
    assert not (workplace / "squeezed" / "provenance.json").exists()
    log = workplace / "squeezed" / "training" / "log.jsonl"
    seen = log.read_text()
    assert run("train", "distill", DENSE, "squeezed", *options)[0] == 0
    assert log.read_text() == seen  # trained before the disk was full, so only saved now


def damaged(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    shutil.copytree(source, target)
    (target / name).write_bytes(change((target / name).read_bytes()))


@pytest.mark.parametrize("verb", ["generate", "spikes", "eval", "energy", "train", "insert"])
def test_a_truncated_model_is_refused_by_every_verb(run: Run, workplace: Path, tmp_path: Path, verb: str) -> None:
    damaged(workplace / SPIKING, tmp_path / "cut", "model.safetensors", lambda content: content[:-50])
    commands = {
        "generate": ["Hello"],
        "spikes": [HELD_OUT],
        "eval": ["--teacher", "smollm2-135m", "--text", HELD_OUT],
        "energy": ["--text", HELD_OUT],
        "train": [tmp_path / "new", "--teacher", DENSE, "--text", HELD_OUT],
        "insert": [tmp_path / "new", "--text", HELD_OUT],
    }
    kind = ["spike"] if verb == "train" else []
    code, out, err = run(verb, *kind, tmp_path / "cut", *commands[verb])
    assert (code, out) == (2, "")
    assert "model.safetensors is truncated or damaged" in err.splitlines()[-1]


def test_damaged_teachers_and_students_are_refused(
    run: Run, workplace: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    damaged(tiny_llama_folder, tmp_path / "cut", "model.safetensors", lambda content: content[:1000])
    assert "model.safetensors is truncated or damaged" in refused("convert", tmp_path / "cut", "new")
    damaged(workplace / DENSE, tmp_path / "config", "config.json", lambda content: content.replace(b'"mar"', b'"gpt2"'))
    assert "holds a 'gpt2' model" in refused(
        "train", "align", tmp_path / "config", "new", "--teacher", "x", "--text", "y"
    )
    damaged(workplace / DENSE, tmp_path / "odd", "config.json", lambda content: content.replace(b'"silu"', b"3"))
    for verb in (["energy"], ["insert", tmp_path / "new", "--text", HELD_OUT]):
        assert "hidden_act is 3; use one of" in refused(verb[0], tmp_path / "odd", *verb[1:])
    shutil.copytree(tiny_llama_folder, tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    assert "'model.norm.weight' has NaN or infinite elements" in refused("convert", tmp_path / "nan", "new")
    shutil.copytree(tiny_llama_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert "as a pickle (pytorch_model.bin)" in refused(
        "refine", "quickstart", "new", f"--teacher={tmp_path / 'pickled'}"
    )
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no documents" in refused("spikes", SPIKING, tmp_path / "empty.jsonl")
    other = json.loads((tiny_llama_folder / "config.json").read_text()) | {"vocab_size": 330}
    damaged(tiny_llama_folder, tmp_path / "wide", "config.json", lambda _: json.dumps(other).encode())
    assert "has shape" in refused("eval", DENSE, "--teacher", tmp_path / "wide", "--text", HELD_OUT)
    assert not (workplace / "new").exists()
