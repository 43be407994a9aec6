import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerFast

import mar
import mar.steps
from mar import verbs
from mar.census import census
from mar.checkpoint import alone_in
from mar.cli import VERBS
from mar.config import SITES, NeuronConfig, site_neurons
from mar.conversion import LLAMBA_LAYER_NAMES, LLAMBA_NAMES, convert_llama
from mar.costs import cost
from mar.data import PackedRows
from mar.folder import digest, load_student, load_tokenizer, save_student
from mar.insertion import insert_neurons, retune_neurons
from mar.results import spike_rates
from mar.sources import DataConfig
from mar.spikes import SiteRate, SpikeMonitor
from mar.teachers import Teacher, load_teacher
from tiny_recipes import LENGTH, files_of, log_of, provenance, weights_of, write_sentences

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def teacher(tiny_llama_folder: Path) -> Teacher:
    return load_teacher(tiny_llama_folder)


@pytest.fixture(scope="module")
def folders(tiny_llama_folder: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Teacher, an untrained dense and an untrained spiking student, and a text."""
    base = tmp_path_factory.mktemp("verbs")
    text = write_sentences(base / "sentences.jsonl")
    dense = convert_llama(teacher.model)
    rows = PackedRows(DataConfig(str(text), length=LENGTH), teacher.tokenizer)
    spiking = insert_neurons(dense, site_neurons(NeuronConfig()), rows.batches(2), tokens=128)
    for name, student in (("dense", dense), ("spiking", spiking)):
        card = {"step": name, "teacher": teacher.source, "tokens": 0}
        save_student(student, teacher.tokenizer, base / name, card)
    return {"teacher": tiny_llama_folder, "text": text, "dense": base / "dense", "spiking": base / "spiking"}


def train(folders: Folders, output: Path, kind: Any = "distill", **changes: Any) -> dict[str, Any]:
    settings = {"teacher": folders["teacher"], "text": folders["text"], "tokens": 96, "batch_size": 1, "length": LENGTH}
    settings |= changes
    student = folders["spiking" if kind.startswith("spike") else "dense"]
    named = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return verbs.train(kind, student, output, **named)


@pytest.mark.parametrize("verb", VERBS)
def test_the_docstring_has_a_line_for_every_argument(verb: str) -> None:
    function = VERBS[verb]
    offered = set(inspect.signature(function).parameters) - {"overrides"}
    assert offered == set(mar.cli._documentation(function)[1])  # type: ignore[attr-defined]


def test_results_are_json(folders: Folders, tmp_path: Path) -> None:
    spiking, text = folders["spiking"], str(folders["text"])
    for result in (
        verbs.convert(str(folders["teacher"]), tmp_path / "dense"),
        train(folders, tmp_path / "trained"),
        verbs.insert(folders["dense"], tmp_path / "spiking", text=text, tokens=64),
        verbs.evaluate([spiking], teacher=str(folders["teacher"]), text=text, tokens=64, window=32),
        verbs.energy([str(spiking)], text=text, tokens=64),
        verbs.spikes(spiking, text, tokens=64),
        verbs.generate(str(spiking), "Why?", tokens=3),
        verbs.generate(str(spiking), "Why?", tokens=3, engine="native", threads=1),
        verbs.pack(spiking, tmp_path / "compact", precision="int4"),
        verbs.info(),
    ):
        assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_insert_does_what_the_recipe_s_settings_do(folders: Folders, teacher: Teacher, tmp_path: Path) -> None:
    text = str(folders["text"])
    before = files_of(folders["dense"])
    found = verbs.insert(
        folders["dense"],
        tmp_path / "spiking",
        text=text,
        tokens=700,
        time_steps=3,
        precharge=0.5,
        sites=["down_proj", "in_proj"],
        per_site=["down_proj.time_steps=16", "down_proj.precharge=0", "in_proj.tau=2.0"],
    )
    placed = site_neurons(
        NeuronConfig(time_steps=3, precharge=0.5),
        {"down_proj": {"time_steps": 16, "precharge": 0.0}, "in_proj": {"tau": 2.0}},
        ("down_proj", "in_proj"),
    )
    rows = PackedRows(DataConfig(text), teacher.tokenizer)
    expected = insert_neurons(load_student(folders["dense"]), placed, rows.batches(1), tokens=700)
    spiking = load_student(tmp_path / "spiking")
    assert spiking.config.neurons == placed
    assert all(tensor.equal(expected.state_dict()[name]) for name, tensor in spiking.state_dict().items())
    with SpikeMonitor(expected) as monitor, torch.no_grad():
        expected(**next(iter(PackedRows(DataConfig(text), teacher.tokenizer).batches(1))))
    totals = monitor.summary().totals
    rates = {"spikes_per_mac": totals.spikes_per_mac, "nonzero_per_mac": totals.nonzero_per_mac}
    assert found == {"folder": str(tmp_path / "spiking"), "neurons": 2 * (64 + 32), **rates}
    assert files_of(folders["dense"]) == before

    kept = provenance(tmp_path / "spiking")
    assert kept["parent"] == {"kind": "folder", "name": str(folders["dense"]), "sha256": digest(folders["dense"])}
    assert (kept["step"], kept["teacher"], kept["tokens"]) == ("insert_neurons", teacher.source, 0)
    assert kept["settings"]["per_site"]["down_proj"] == {"time_steps": 16, "precharge": 0.0}
    assert (kept["settings"]["text"], kept["settings"]["tokens"]) == (text, 700)
    train(folders | {"spiking": tmp_path / "spiking"}, tmp_path / "trained", "spike", teacher=folders["dense"])


def test_retune_changes_what_is_given_and_keeps_the_rest(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, own = str(folders["text"]), load_student(folders["spiking"])
    for neuron in own.config.neurons.values():
        neuron |= {"surrogate": "arctan"}
    save_student(own, load_tokenizer(folders["spiking"]), tmp_path / "own", provenance(folders["spiking"]))
    found = verbs.retune(tmp_path / "own", tmp_path / "fewer", text=text, tokens=200, spike_budget=0.3)
    fewer = load_student(tmp_path / "fewer")
    assert fewer.config.neurons == own.config.neurons
    assert found["spikes_per_mac"] < 0.5
    changes = {"precharge": 0.25, "per_site": ["down_proj.time_steps=16"]}
    verbs.retune(tmp_path / "own", tmp_path / "other", text=text, tokens=200, **changes)
    other = load_student(tmp_path / "other")
    rows = PackedRows(DataConfig(text), load_tokenizer(folders["spiking"]))
    by_site = {site: {"precharge": 0.25} for site in SITES} | {"down_proj": {"precharge": 0.25, "time_steps": 16}}
    expected = retune_neurons(own, by_site, rows.batches(1), 200)
    assert other.config.neurons == expected.config.neurons
    assert all(tensor.equal(expected.state_dict()[name]) for name, tensor in other.state_dict().items())
    kept = provenance(tmp_path / "other")
    assert (kept["step"], kept["parent"]["sha256"]) == ("retune_neurons", digest(tmp_path / "own"))
    assert kept["settings"] == {**changes, "spike_budget": None, "text": text, "tokens": 200}
    capsys.readouterr()
    verbs.retune(tmp_path / "own", tmp_path / "silent", text=text, tokens=200, spike_budget=1e-9)
    assert "8 of 8 neuron sites never fired on the first row, in_proj of layer 0 among them" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no neurons at 'middle' to retune; the model has them at down_proj, gate_up"):
        verbs.retune(tmp_path / "own", tmp_path / "x", text=text, per_site=["middle.time_steps=3"])


def test_insert_has_the_settings_and_defaults_of_neurons() -> None:
    offered = inspect.signature(verbs.insert).parameters
    for field in fields(NeuronConfig):
        assert offered[field.name].default == field.default


def test_a_published_llamba_becomes_spiking(
    folders: Folders, tiny_tokenizer: PreTrainedTokenizerFast, teacher: Teacher, tmp_path: Path
) -> None:
    write_llamba(tmp_path / "llamba", tiny_tokenizer, teacher)
    verbs.convert(str(tmp_path / "llamba"), tmp_path / "dense")
    (tmp_path / "dense" / "provenance.json").unlink()
    verbs.insert(tmp_path / "dense", tmp_path / "spiking", text=str(folders["text"]), tokens=100)
    assert [site for _, site, _ in load_student(tmp_path / "spiking").neuron_sites()] == 2 * list(SITES)
    assert provenance(tmp_path / "spiking")["teacher"]["name"] == str(tmp_path / "dense")


@pytest.mark.parametrize(
    ("model", "changes", "problem"),
    [
        ("spiking", {}, r"spiking already has neurons; change them with `mar retune`, or give the dense"),
        ("dense", {"text": "missing.txt"}, r"there is no 'missing\.txt'; give a file"),
        ("dense", {"per_site": ["attention.tau=2"]}, r"site is 'attention'; use one of 'in_proj'"),
        ("dense", {"sites": ["in_proj"], "per_site": ["out_proj.tau=2"]}, r"'out_proj', which is not among the placed"),
        ("dense", {"per_site": ["in_proj.T=2"]}, r"per_site\.in_proj has no setting 'T'; use one of kind, time_steps"),
        ("dense", {"per_site": ["in_proj=2"]}, r"'in_proj=2' is no change at a site; write one like down_proj\.time"),
        ("dense", {"per_site": ["in_proj.time_steps=0"]}, r"time_steps is 0"),
        ("dense", {"kind": "ternary", "tau": 2.0}, r"the ternary neuron has a fixed leak"),
        ("dense", {"surrogate": "step"}, r"surrogate is 'step'; use one of 'ste'"),
        ("teacher", {}, r"holds a 'llama' model, not a MAR one; convert it first"),
    ],
)
def test_what_cannot_become_spiking(
    folders: Folders, tmp_path: Path, model: str, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        verbs.insert(folders[model], tmp_path / "new", **({"text": str(folders["text"])} | changes))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"already holds a model; give another folder, or remove it first"):
        verbs.insert(folders["dense"], folders["spiking"], text=str(folders["text"]))
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "model-00002-of-00003.safetensors").touch()
    with pytest.raises(ValueError, match=r"already holds weights \(model-00002-of-00003\.safetensors\); give another"):
        verbs.insert(folders["dense"], tmp_path / "left", text=str(folders["text"]))


def test_convert_calibrates_on_text(folders: Folders, teacher: Teacher, tmp_path: Path) -> None:
    verbs.convert(str(folders["teacher"]), tmp_path / "plain")
    verbs.convert(str(folders["teacher"]), tmp_path / "calibrated", text=str(folders["text"]))
    plain, calibrated = (load_student(tmp_path / name).model.layers[0].mixer for name in ("plain", "calibrated"))
    assert plain.D.eq(0).all()
    assert calibrated.D.ne(0).any()
    assert provenance(tmp_path / "calibrated")["settings"]["text"] == str(folders["text"])
    assert provenance(tmp_path / "plain")["parent"] == teacher.source


def writers(folders: Folders, output: Path, tokens: int = 64) -> dict[str, Callable[[], object]]:
    """Every verb that writes a model into a new folder, on a text."""
    text = str(folders["text"])
    return {
        "convert": lambda: verbs.convert(str(folders["teacher"]), output, text=text),
        "insert": lambda: verbs.insert(folders["dense"], output, text=text, tokens=tokens),
        "retune": lambda: verbs.retune(folders["spiking"], output, text=text, tokens=tokens),
        "pack": lambda: verbs.pack(folders["spiking"], output, text=text, tokens=tokens),
    }


@pytest.mark.parametrize("verb", ["convert", "insert", "retune", "pack"])
def test_one_process_writes_into_a_new_folder(folders: Folders, tmp_path: Path, verb: str) -> None:
    output = tmp_path / "new" / "student"
    with (
        alone_in(output),
        pytest.raises(ValueError, match=f"Another process is at work in {output}; wait for it, or use another folder"),
    ):
        writers(folders, output)[verb]()
    writers(folders, output)[verb]()
    assert not (output / "lock").exists()
    load_student(output)


def test_a_folder_that_was_just_finished_is_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the one of two processes that gets the lock when the other is done."""
    output = tmp_path / "student"

    @contextmanager
    def after_another(folder: Path) -> Iterator[None]:
        shutil.copytree(folders["dense"], folder)
        yield

    monkeypatch.setattr(mar.steps, "alone_in", after_another)
    with pytest.raises(ValueError, match="already holds a model"):
        verbs.pack(folders["spiking"], output)
    assert files_of(output) == files_of(folders["dense"])


def test_a_verb_that_fails_leaves_no_folder(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no"):
        verbs.pack(folders["spiking"], tmp_path / "new" / "student", text="nowhere.txt")
    assert not list(tmp_path.iterdir())


def write_llamba(folder: Path, tokenizer: PreTrainedTokenizerFast, teacher: Teacher) -> dict[str, torch.Tensor]:
    """A random Llamba checkpoint with the published names and shapes; returns its weights by our names."""
    student = convert_llama(teacher.model, preset="llamba", init="llamba")
    names = {ours: theirs for theirs, ours in LLAMBA_NAMES.items()}
    for layer in range(2):
        names |= {
            f"model.layers.{layer}.{ours}": f"backbone.layers.{layer}.{theirs}"
            for theirs, ours in LLAMBA_LAYER_NAMES.items()
        }
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    shaped = {name: tensor.unsqueeze(1) if name.endswith("conv_weight") else tensor for name, tensor in weights.items()}
    folder.mkdir()
    save_file({names[name]: tensor.clone() for name, tensor in shaped.items()}, folder / "model.safetensors")
    ssm = {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 8, "expand": 1, "activation": "identity", "bias": False}
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 320, "norm_epsilon": 1e-6, "ssm_cfg": ssm}
    (folder / "config.json").write_text(json.dumps({**config, "mlp_cfg": {"intermediate_size": 64}}))
    tokenizer.save_pretrained(folder)
    return weights


def test_convert_reads_llamba_folders(
    tiny_tokenizer: PreTrainedTokenizerFast, teacher: Teacher, tmp_path: Path
) -> None:
    weights = write_llamba(tmp_path / "llamba", tiny_tokenizer, teacher)
    result = verbs.convert(str(tmp_path / "llamba"), tmp_path / "dense")
    student = load_student(tmp_path / "dense")
    assert student.state_dict().keys() == weights.keys()
    assert all(tensor.equal(weights[name]) for name, tensor in student.state_dict().items())
    assert result["parameters"] == student.num_parameters()
    origin = provenance(tmp_path / "dense")["teacher"]
    assert (origin["kind"], origin["sha256"]) == ("llamba", digest(tmp_path / "llamba"))
    with pytest.raises(ValueError, match="is a Llamba folder: it is taken as it was published"):
        verbs.convert(str(tmp_path / "llamba"), tmp_path / "hybrid", preset="hybrid")
    with pytest.raises(ValueError, match="leave out --text, --preset and --window"):
        verbs.convert(str(tmp_path / "llamba"), tmp_path / "hybrid", window=16)
    assert not (tmp_path / "hybrid").exists()


def test_training_is_gone_on_with(folders: Folders, tmp_path: Path) -> None:
    steps = 0

    def stop(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in (2, 4):
            raise KeyboardInterrupt

    train(folders, tmp_path / "whole", "spike", teacher=folders["dense"])
    handle = register_optimizer_step_pre_hook(stop)
    try:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train(folders, tmp_path / "stopped", "spike", teacher=folders["dense"])
    finally:
        handle.remove()
    train(folders, tmp_path / "stopped", "spike", teacher=folders["dense"])
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_trained_folders_say_where_they_come_from(folders: Folders, teacher: Teacher, tmp_path: Path) -> None:
    before = files_of(folders["dense"])
    metrics = train(folders, tmp_path / "trained", tokens=80)
    found = provenance(tmp_path / "trained")
    assert found["parent"] == {"kind": "folder", "name": str(folders["dense"]), "sha256": digest(folders["dense"])}
    assert found["teacher"] == teacher.source
    assert found["tokens"] == metrics["tokens"] == 96  # 80 rounded up to whole steps
    assert files_of(folders["dense"]) == before
    train(folders, tmp_path / "spiking", "spike_align", teacher=folders["dense"])
    assert provenance(tmp_path / "spiking")["teacher"]["sha256"] == digest(folders["dense"])


@pytest.mark.parametrize(("spikes", "nonzero", "expected"), [(0.4, None, 0.4), (1.7, None, 1.0), (0.4, 0.3, 0.3)])
def test_assumed_rates(folders: Folders, spikes: float, nonzero: float | None, expected: float) -> None:
    found = verbs.energy([str(folders["spiking"])], context=64, spikes=spikes, nonzero=nonzero, tables=["45nm-fp32"])
    config = load_student(folders["spiking"]).config
    report = cost(census(config, 64, dict.fromkeys(config.neurons, SiteRate(spikes, expected))))
    assert found["models"][0]["compute"] == report.to_dict()


def test_measured_rates(folders: Folders, teacher: Teacher) -> None:
    text = str(folders["text"])
    found = verbs.spikes(folders["spiking"], text, tokens=100)
    rows = next(PackedRows(DataConfig(text, length=100), teacher.tokenizer).batches(1))
    student = load_student(folders["spiking"])
    report = spike_rates(student, rows, text)
    assert found == report.to_dict()
    priced = verbs.energy([str(folders["spiking"])], context=64, text=text, tokens=100)
    assert priced["models"][0]["compute"] == cost(census(student.config, 64, report)).to_dict()


def test_short_texts_are_enough_to_count_on(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One sentence.")
    assert verbs.spikes(folders["spiking"], str(tmp_path / "short.txt"), tokens=200)["totals"]["tokens"] == 200


@pytest.mark.parametrize("verb", ["convert", "insert", "retune", "pack", "spikes"])
@pytest.mark.parametrize(("sentences", "short"), [(1, True), (2000, False)])
def test_a_short_text_is_said_to_be_short(
    folders: Folders, tmp_path: Path, capfd: Any, verb: str, sentences: int, short: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence. " * sentences)
    write = writers(folders | {"text": text}, tmp_path / "new", tokens=600)
    write["spikes"] = lambda: verbs.spikes(folders["spiking"], str(text), tokens=600)
    write[verb]()
    said = rf"{text} is shorter than [\d,]+ tokens and was read \d+ times; .* so give more\."
    assert bool(re.search(said, capfd.readouterr().err)) == short


def test_eval_of_the_dense_start(folders: Folders, teacher: Teacher) -> None:
    found = verbs.evaluate(
        [folders["dense"]], teacher=str(folders["teacher"]), text=str(folders["text"]), tokens=64, window=32
    )
    figure = found["held_out"][str(folders["dense"])]
    assert (figure["windows"], figure["against"]) == (2, teacher.source["name"])
    assert figure["kl"]["value"] > 0
    assert found["parameters"]["teacher"] == teacher.model.num_parameters()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eval_runs_in_the_precision_asked_for(folders: Folders, tmp_path: Path, precision: Any) -> None:
    items = [{"goal": "Open a jar.", "sol1": f"Twist it {n} times.", "sol2": "Sit.", "label": n % 2} for n in range(2)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: seen.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    text: dict[str, Any] = {"text": str(folders["text"]), "tokens": 64, "window": 32}
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        for what in (text, {"tasks": ["piqa"], "data_dir": tmp_path}):
            seen.clear()
            found = verbs.evaluate([folders["dense"]], teacher=str(folders["teacher"]), precision=precision, **what)
            assert wanted in seen
            assert precision == "bf16" or seen == {wanted}
            for figure in found.get("held_out", {}).values():
                assert figure["precision"] == precision
    finally:
        hook.remove()


def test_generate_ends_where_the_model_does(folders: Folders, capfd: pytest.CaptureFixture[str]) -> None:
    found = verbs.generate(str(folders["dense"]), "Why?", tokens=5, temperature=0.0)
    assert found["tokens"] <= 5
    assert capfd.readouterr() == ("", "")


def test_info_counts_what_torch_uses() -> None:
    found = verbs.info()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["mar"] == mar.__version__
    assert all(reason for reason in found["backends"].values())


def test_info_names_the_native_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where MAR_ISA forced it, which is read when the core is loaded; without a core it says why there is none."""
    code = "import json; from mar import verbs; print(json.dumps(verbs.info()['native']))"
    environment = {**os.environ, "MAR_ISA": "generic"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert found["name"] == "generic"
    assert "forced by MAR_ISA" in found["reason"]
    monkeypatch.setattr("mar.kernels.native.core", None)
    monkeypatch.setattr("mar.kernels.native.REASON", "there is none")
    assert verbs.info()["native"] == {"name": None, "reason": "there is none", "features": ""}


def test_threads_are_those_asked_for(folders: Folders) -> None:
    before = torch.get_num_threads()
    try:
        verbs.generate(str(folders["dense"]), "Why?", tokens=1, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
