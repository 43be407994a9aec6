import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import mar.refinement
from mar.checkpoint import DiskFull
from mar.conversion import convert_llama
from mar.data import PackedRows, read_meta
from mar.folder import digest
from mar.kernels.paged import Pages
from mar.model import MarForCausalLM
from mar.optimizer import TrainConfig
from mar.recipe import Recipe, StageConfig, read_recipe, shipped_recipes
from mar.refinement import Refined, build_objective, refine
from mar.sources import DataConfig
from mar.teachers import Teacher, load_teacher
from mar.train import TrainingDiverged
from tiny_models import rms_ratio
from tiny_recipes import (
    LENGTH,
    TRAIN,
    files_of,
    log_of,
    provenance,
    shipped_in_debug_size,
    steps_of,
    tiny_recipe,
    weights_of,
    write_sentences,
)
from tiny_training import command_as_one_of_several, in_two_processes

KINDS = ("orient", "align", "distill", "spike_align", "spike")
NAMES = ["0-convert", "1-orient", "2-align", "3-distill", "4-insert_neurons", "5-spike_align", "6-spike"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("text") / "sentences.jsonl")


@pytest.fixture(scope="module")
def teacher(tiny_llama_folder: Path) -> Teacher:
    return load_teacher(tiny_llama_folder)


@pytest.fixture(scope="module")
def whole(tiny_llama_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Refined:
    """A run of all kinds of stages that nothing interrupted."""
    return refine(tiny_recipe(tiny_llama_folder, text, KINDS), tmp_path_factory.mktemp("whole"), progress=False)


@contextmanager
def interrupted_at_step(number: int, how: Callable[[], object]) -> Iterator[None]:
    """Calls `how` where the optimizer is about to take the `number`-th step from here on."""
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == number:
            how()

    handle = register_optimizer_step_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def stop() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_has_a_folder_a_step(whole: Refined) -> None:
    assert [step.name for step in steps_of(whole.folder)] == NAMES
    assert whole.students == {"dense": whole.folder / "3-distill", "spiking": whole.folder / "6-spike"}
    assert list(whole.metrics) == list(KINDS)
    for metrics in whole.metrics.values():
        assert (metrics["steps"], metrics["tokens"]) == (3, 3 * LENGTH)
    assert whole.metrics["align"]["relative_mse_to_llama"] > 0
    assert whole.metrics["distill"]["kl_to_llama"] > 0
    assert whole.metrics["spike"]["bidirectional_kl_to_dense"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_auto_classes_load_every_step(whole: Refined, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.folder / name)
    assert isinstance(model, MarForCausalLM)
    assert (model.config.neurons is not None) == (name >= "4")
    tokenizer = AutoTokenizer.from_pretrained(whole.folder / name)
    ids = tokenizer("The river rose.", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.isfinite().all()
    if name >= "4":
        assert model.config.neuron("down_proj").time_steps == 6
        assert model.config.neuron("in_proj").time_steps == 3


def test_every_step_trains_what_its_stage_names(whole: Refined) -> None:
    def changed(earlier: str, later: str) -> set[str]:
        old, new = (load_file(whole.folder / name / "model.safetensors") for name in (earlier, later))
        return {name for name in old if not old[name].equal(new[name])}

    mixers = changed("1-orient", "2-align")
    assert mixers
    assert all(".mixer." in name for name in mixers)
    layers = changed("2-align", "3-distill")
    assert any(".mlp." in name for name in layers)
    assert not any("embed_tokens" in name or "lm_head" in name for name in layers)
    assert changed("3-distill", "4-insert_neurons") == set()
    assert any(name.endswith("neuron.a") for name in changed("5-spike_align", "6-spike"))


def test_provenance_is_a_chain_back_to_the_teacher(whole: Refined, teacher: Teacher) -> None:
    parent: dict[str, Any] = teacher.source
    for step in steps_of(whole.folder):
        found = provenance(step)
        assert found["parent"] == parent
        assert found["teacher"] == teacher.source
        assert found["recipe"]["name"] == "tiny"
        assert found["tokens"] == (3 * LENGTH if step.name[2:] in KINDS else 0)
        assert found["metrics"] == whole.metrics.get(step.name[2:], {})
        assert found["packages"] == {name: version(name) for name in ("mar", "torch", "transformers", "accelerate")}
        parent = {"kind": "stage", "name": step.name, "sha256": digest(step)}


def version(package: str) -> str:
    return __import__(package).__version__


def test_a_step_s_card_says_where_it_comes_from(whole: Refined, teacher: Teacher) -> None:
    card = (whole.folder / "6-spike" / "README.md").read_text()
    assert "a spiking MAR model" in card
    assert teacher.source["name"] in card
    assert "a dense MAR model" in (whole.folder / "3-distill" / "README.md").read_text()


def test_a_finished_run_is_not_repeated(whole: Refined, tiny_llama_folder: Path, text: Path) -> None:
    before = files_of(whole.folder)
    again = refine(tiny_recipe(tiny_llama_folder, text, KINDS), whole.folder, progress=False)
    assert files_of(whole.folder) == before
    assert again == whole


def test_orient_leaves_the_caller_s_teacher_as_it_is(tiny_llama_folder: Path, text: Path) -> None:
    teacher, stage = load_teacher(tiny_llama_folder), StageConfig(kind="orient", train=TrainConfig(precision="fp32"))
    before = teacher.model.config._attn_implementation
    objective = build_objective(stage, convert_llama(teacher.model), teacher.model, None)
    assert objective.teacher.config._attn_implementation == "eager"  # type: ignore[attr-defined]
    assert teacher.model.config._attn_implementation == before != "eager"


@pytest.mark.parametrize("how", [stop, press_ctrl_c])
def test_interrupted_twice_ends_in_the_same_bits(
    whole: Refined, tiny_llama_folder: Path, text: Path, tmp_path: Path, how: Callable[[], object]
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, KINDS)
    # Of 3 steps a stage: in the second one of align, and then, of the 10 or 11 steps that are left, in spike.
    for number, finished in ((5, NAMES[:2]), (10, NAMES[:6])):
        with interrupted_at_step(number, how), pytest.raises(KeyboardInterrupt):
            refine(recipe, tmp_path, progress=False)
        done = {step.name: files_of(step) for step in steps_of(tmp_path)}
        assert list(done) == finished
    refined = refine(recipe, tmp_path, progress=False)
    assert {name: files_of(tmp_path / name) for name in done} == done
    assert refined.students.keys() == whole.students.keys()
    for name in NAMES:
        assert weights_of(tmp_path / name) == weights_of(whole.folder / name)
    for kind, step in zip(KINDS, [*NAMES[1:4], *NAMES[5:]], strict=True):
        assert log_of(tmp_path / step) == log_of(whole.folder / step)
        for key in ("loss", "steps", "tokens"):
            assert refined.metrics[kind][key] == whole.metrics[kind][key]


def test_a_stage_at_its_constant_rate_takes_more_tokens(tiny_llama_folder: Path, text: Path, tmp_path: Path) -> None:
    def with_steps(count: int) -> Recipe:
        return tiny_recipe(tiny_llama_folder, text, ("align",), schedule="wsd", tokens=count * LENGTH)

    refine(with_steps(6), tmp_path / "whole", progress=False)
    with interrupted_at_step(3, stop), pytest.raises(KeyboardInterrupt):
        refine(with_steps(4), tmp_path / "run", progress=False)
    refine(with_steps(6), tmp_path / "run", progress=False)
    assert log_of(tmp_path / "run" / "1-align") == log_of(tmp_path / "whole" / "1-align")


def test_an_interruption_while_saving_loses_nothing(
    whole: Refined, tiny_llama_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = MarForCausalLM.save_pretrained

    def interrupted(self: MarForCausalLM, folder: Path, **options: Any) -> None:
        save(self, folder, **options)
        if Path(folder).parent.name == "2-align":  # written aside first
            raise KeyboardInterrupt

    recipe = tiny_recipe(tiny_llama_folder, text, KINDS)
    with monkeypatch.context() as patch:
        patch.setattr(MarForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refine(recipe, tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "2-align").iterdir()] == ["training"]
    assert [step.name for step in steps_of(tmp_path)] == NAMES[:2]
    refine(recipe, tmp_path, progress=False)
    assert weights_of(tmp_path / "6-spike") == weights_of(whole.folder / "6-spike")


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    tiny_llama_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, ("align",))

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")

    with (
        monkeypatch.context() as patch,
        interrupted_at_step(3, lambda: patch.setattr(transformers.modeling_utils, "safe_save_file", full)),
        pytest.raises(
            DiskFull, match=r"^The disk is full at .*1-align; free some space and run the same command again"
        ),
    ):
        refine(recipe, tmp_path, progress=False)
    assert [step.name for step in steps_of(tmp_path)] == ["0-convert"]
    with interrupted_at_step(1, stop):  # the training is done, so no step is taken
        refine(recipe, tmp_path, progress=False)
    assert [step.name for step in steps_of(tmp_path)] == ["0-convert", "1-align"]


def test_divergence_stops_the_run_and_keeps_what_was_finished(
    tiny_llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, ("align", "distill"))
    recipe.stages["distill"].train = replace(TRAIN, lr=1e35, clip=None)
    with pytest.raises(TrainingDiverged, match=r"^Stage 'distill' diverged at step \d.*lower lr \(now 1e\+35\)"):
        refine(recipe, tmp_path, progress=False)
    assert [step.name for step in steps_of(tmp_path)] == ["0-convert", "1-align"]


def change(**settings: Any) -> Callable[[Any], None]:
    """Sets attributes by dotted path, `stages__align__train` standing for recipe.stages["align"].train."""

    def apply(recipe: Any) -> None:
        for path, value in settings.items():
            *parts, last = path.split("__")
            target = recipe
            for part in parts:
                target = target[part] if isinstance(target, dict) else getattr(target, part)
            setattr(target, last, value)

    return apply


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            change(mixer__preset="llamba"),
            r"0-convert was made with other settings \(settings.preset was 'fast' and is now",
        ),
        (
            change(data=DataConfig("other.jsonl", length=LENGTH)),
            r"0-convert .* \(data.source was '.*' and is now 'other",
        ),
        (
            change(stages__align__train=replace(TRAIN, lr=0.5)),
            r"1-align .* \(settings.train.lr was 0.001 and is now 0.5\)",
        ),
        (change(neurons__sites=["in_proj", "down_proj"]), r"2-insert_neurons .* \(settings.sites was"),
        (change(stages__spike__features="none"), r"3-spike .* \(settings.features was None and is now 'none'\)"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(
    tiny_llama_folder: Path, text: Path, short: Path, changes: Callable[[Any], None], problem: str
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text)
    changes(recipe)
    before = files_of(short)
    with pytest.raises(ValueError, match=problem + r".*; refine into another folder, or remove this one"):
        refine(recipe, short, progress=False)
    assert files_of(short) == before


@pytest.fixture(scope="module")
def short(tiny_llama_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of align and spike."""
    return refine(tiny_recipe(tiny_llama_folder, text), tmp_path_factory.mktemp("short"), progress=False).folder


def test_another_teacher_in_the_same_folder_is_refused(
    tiny_llama_folder: Path, text: Path, short: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_folder, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"0-convert was made with other settings \(parent\.name was"):
        refine(tiny_recipe(tmp_path / "other", text), short, progress=False)


def test_what_decides_no_number_may_change(tiny_llama_folder: Path, text: Path, short: Path) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, log_every=7, checkpoint_minutes=3.0, keep_checkpoints=1)
    recipe.name, recipe.evaluation.tokens = "another name", 7
    before = files_of(short)
    refine(recipe, short, progress=False)
    assert files_of(short) == before


def test_a_changed_stage_runs_again_once_its_folder_is_removed(
    tiny_llama_folder: Path, text: Path, short: Path, tmp_path: Path
) -> None:
    for step in ("0-convert", "1-align", "2-insert_neurons"):
        shutil.copytree(short / step, tmp_path / step)
    before = files_of(tmp_path)
    recipe = tiny_recipe(tiny_llama_folder, text)
    recipe.stages["spike"].features = "none"
    refined = refine(recipe, tmp_path, progress=False)
    assert {name: seen for name, seen in files_of(tmp_path).items() if not name.startswith("3-")} == before
    assert weights_of(refined.students["spiking"]) != weights_of(short / "3-spike")


def test_a_damaged_step_is_named(tiny_llama_folder: Path, text: Path, short: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "run")
    weights = tmp_path / "run" / "1-align" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"1-align.model\.safetensors is truncated or damaged \(.*\); restore it"):
        refine(tiny_recipe(tiny_llama_folder, text), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (StageConfig("align", TRAIN, alpha=0.5), "kind 'align' has no setting 'alpha'"),
        (StageConfig("distill", TRAIN, features="pre"), "kind 'distill' has no setting 'features'"),
        (StageConfig("spike_align", TRAIN, energy_target=0.5), "kind 'spike_align' has no setting 'energy_target'"),
        (StageConfig("distill", TRAIN, teacher="dense"), "kind 'distill' has a fixed teacher; remove `teacher: dense`"),
    ],
)
def test_a_setting_without_use_is_refused_before_any_work(
    tiny_llama_folder: Path, text: Path, tmp_path: Path, stage: StageConfig, problem: str
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, ("align",))
    recipe.stages["last"] = stage
    with pytest.raises(ValueError, match=problem):
        refine(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def refined_by_two(recipe: Recipe, folder: Path) -> list[tuple[Any, str, bool]]:
    """`mar refine` of a recipe in two processes: what it did in each."""
    file = folder.with_suffix(".yaml")
    file.write_text(json.dumps(asdict(recipe)))
    return in_two_processes(command_as_one_of_several, "refine", str(file), str(folder), "--json")


def test_two_processes_refine_like_one(tiny_llama_folder: Path, tmp_path: Path) -> None:
    # Of these stages' losses each is a mean over tokens, so two halves of a batch average to the whole.
    kinds = ("distill", "spike")
    plain = {"tokens": 6 * LENGTH, "precision": "fp32"}
    (main, other) = refined_by_two(tiny_recipe(tiny_llama_folder, "teacher", kinds, **plain), tmp_path / "two")
    assert (main[0], main[2], other) == (0, False, (0, "", False))
    figures = json.loads(main[1])
    assert list(figures["held_out"]) == ["dense", "spiking"]
    assert (tmp_path / "two" / "report.html").is_file()

    refine(tiny_recipe(tiny_llama_folder, "teacher", kinds, batch_size=2, **plain), tmp_path / "one", progress=False)
    assert parts_of(tmp_path / "two") == parts_of(tmp_path / "one")
    one, two = (steps_of(tmp_path / name) for name in ("one", "two"))
    assert [step.name for step in two] == [step.name for step in one]
    assert weights_of(two[0]) == weights_of(one[0])
    for single, double in zip(one, two, strict=True):
        assert provenance(double)["tokens"] == provenance(single)["tokens"]
        weights = [load_file(step / "model.safetensors") for step in (double, single)]
        # All at once: where a gradient is next to nothing, Adam takes the sign of its rounding for the whole step.
        ours, theirs = (torch.cat([w.flatten() for _, w in sorted(named.items())]) for named in weights)
        assert rms_ratio(ours, theirs) < 1e-3
    for previous, step in pairwise(two):
        assert provenance(step)["parent"]["sha256"] == digest(previous)
    for kind, place in (("distill", 1), ("spike", 3)):
        losses = [[line["loss"] for line in log_of(steps[place])] for steps in (one, two)]
        assert len(losses[0]) == 3
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        assert figures["stages"][kind]["loss"] == pytest.approx(provenance(one[place])["metrics"]["loss"], rel=1e-3)


def test_an_error_leaves_no_process_behind(tiny_llama_folder: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_llama_folder, tmp_path / "missing.jsonl")
    recipe.evaluation.data = DataConfig(str(tmp_path / "missing.jsonl"))
    assert refined_by_two(recipe, tmp_path / "run") == 2 * [(2, "", False)]


def test_stages_of_one_kind_follow_each_other(tiny_llama_folder: Path, text: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_llama_folder, text, ())
    recipe.stages = {"first": StageConfig("align", TRAIN), "second": StageConfig("align", TRAIN)}
    refined = refine(recipe, tmp_path, progress=False)
    assert [step.name for step in steps_of(tmp_path)] == ["0-convert", "1-first", "2-second"]
    assert refined.students == {"dense": tmp_path / "2-second"}
    assert refined.metrics["second"]["loss"] < refined.metrics["first"]["loss"]


def test_a_spiking_stage_may_come_first(tiny_llama_folder: Path, text: Path, tmp_path: Path) -> None:
    refined = refine(tiny_recipe(tiny_llama_folder, text, ("spike_align",)), tmp_path, progress=False)
    assert refined.students == {"dense": tmp_path / "0-convert", "spiking": tmp_path / "2-spike_align"}


def other_teacher(teacher: Teacher, **changes: Any) -> LlamaForCausalLM:
    config = teacher.model.config.__class__(**{**teacher.model.config.to_dict(), **changes})
    return LlamaForCausalLM(config).eval()


def test_models_that_do_not_belong_together(teacher: Teacher) -> None:
    student = convert_llama(teacher.model)
    with pytest.raises(ValueError, match="vocab_size is 320 and its teacher's 330; a stage of kind 'distill' needs"):
        build_objective(StageConfig("distill"), student, other_teacher(teacher, vocab_size=330), None)
    with pytest.raises(ValueError, match="num_hidden_layers is 2 and its teacher's 3; a stage of kind 'align' needs"):
        build_objective(StageConfig("align"), student, other_teacher(teacher, num_hidden_layers=3), None)
    with pytest.raises(ValueError, match="'spike' needs a student with neurons; insert them first"):
        build_objective(StageConfig("spike"), student, teacher.model, student)
    wide = other_teacher(teacher, hidden_size=64, num_hidden_layers=3)
    assert build_objective(StageConfig("distill"), student, wide, None).name == "distill"


def test_settings_reach_their_objective(teacher: Teacher, short: Path) -> None:
    spiking, dense = (
        AutoModelForCausalLM.from_pretrained(short / name, dtype=torch.float32) for name in ("3-spike", "1-align")
    )
    settings = {
        "alpha": 0.3,
        "beta": 0.4,
        "features": "both",
        "trained": "thresholds",
        "energy_target": 0.5,
        "energy_weight": 2.0,
    }
    objective: Any = build_objective(StageConfig("spike", **settings), spiking, teacher.model, dense)
    assert {name: getattr(objective, name) for name in settings} == settings
    assert (objective.teacher is dense, objective.against) == (True, "dense")
    by_llama = StageConfig("spike", teacher="llama", train=TrainConfig(precision="bf16"))
    objective = build_objective(by_llama, spiking, teacher.model, dense)
    assert (objective.alpha, objective.against) == (0.2, "llama")
    # The copy that teaches is in bf16; the caller's stays as it was, for evaluation.
    assert objective.teacher.dtype == torch.bfloat16
    assert teacher.model.dtype == torch.float32


def parts_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_the_teacher_s_text_is_written_in_parts_and_gone_on_with(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "teacher", ("align",))
    refine(recipe, tmp_path / "whole", progress=False)
    expected = parts_of(tmp_path / "whole" / "text")
    assert len(expected) == 5  # 300 and 200 tokens, 128 a part
    assert len(set(expected.values())) == 5

    write, calls = mar.refinement.write_text, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 4):
            raise KeyboardInterrupt
        return write(*arguments, **options)

    monkeypatch.setattr(mar.refinement, "write_text", interrupted)
    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            refine(recipe, tmp_path / "stopped", progress=False)
        assert len(parts_of(tmp_path / "stopped" / "text")) == count
    refine(recipe, tmp_path / "stopped", progress=False)
    assert calls == 7  # 5 parts and 2 interruptions
    assert parts_of(tmp_path / "stopped" / "text") == expected
    assert weights_of(tmp_path / "stopped" / "1-align") == weights_of(tmp_path / "whole" / "1-align")


def test_ctrl_c_while_the_teacher_writes_loses_nothing(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "teacher", ("align",))
    refine(recipe, tmp_path / "whole", progress=False)
    step, steps = Pages.step, 0

    def pressed(pages: Pages, tokens: list[int]) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 20:
            press_ctrl_c()
        return step(pages, tokens)

    monkeypatch.setattr(Pages, "step", pressed)
    with pytest.raises(KeyboardInterrupt, match="run again to go on"):
        refine(recipe, tmp_path / "stopped", progress=False)
    draft = tmp_path / "stopped" / "text" / "train" / "part-000.draft"
    assert int(next(draft.iterdir()).name.removeprefix("step-")) > 20
    refine(recipe, tmp_path / "stopped", progress=False)
    assert parts_of(tmp_path / "stopped" / "text") == parts_of(tmp_path / "whole" / "text")
    assert not draft.exists()
    draft.with_suffix(".parquet").unlink()  # it is made again, alone
    refine(recipe, tmp_path / "stopped", progress=False)
    assert parts_of(tmp_path / "stopped" / "text") == parts_of(tmp_path / "whole" / "text"), (
        "a part is made again alone"
    )


def test_the_teacher_s_text_is_as_the_recipe_asks(tiny_llama_folder: Path, teacher: Teacher, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_llama_folder, "teacher", ("align",))
    refine(recipe, tmp_path, progress=False)
    for split, tokens in (("train", 300), ("held_out", 200)):
        metas = [read_meta(path) for path in sorted((tmp_path / "text" / split).iterdir())]
        assert tokens <= sum(meta["tokens_written"] for meta in metas) < tokens + 128
        assert all((meta["split"], meta["teacher"]) == (split, teacher.source) for meta in metas)
        rows = PackedRows(DataConfig(str(tmp_path / "text" / split), length=16), teacher.tokenizer, epochs=1)
        assert len(list(rows)) * 16 >= tokens - 16

    recipe.writing.temperature = 0.5
    with pytest.raises(ValueError, match=r"part-000\.parquet was made with other settings \(temperature was 1\.0"):
        refine(recipe, tmp_path, progress=False)


def test_empty_text_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no document"):
        refine(tiny_recipe(tiny_llama_folder, tmp_path / "empty.jsonl"), tmp_path / "run", progress=False)


PLAIN = [name for name in shipped_recipes() if "/" not in name]
ROWS = [name for name in shipped_recipes() if "/" in name]


@pytest.mark.parametrize("name", PLAIN)
def test_shipped_recipes_run(name: str, tiny_llama_folder: Path, text: Path, tmp_path: Path) -> None:
    recipe = shipped_in_debug_size(name, tiny_llama_folder, text)
    refined = refine(recipe, tmp_path, progress=False)
    assert list(refined.metrics) == list(recipe.stages)
    assert list(refined.students) == ["dense", "spiking"]
    assert all(metrics["steps"] == 2 for metrics in refined.metrics.values())


def test_ablations_run_from_one_dense_student(teacher: Teacher, text: Path, tmp_path: Path) -> None:
    weights: dict[str, bytes] = {}
    for row in ROWS:
        folder = tmp_path / row
        if weights:
            for name in ("text", "0-convert", "1-align", "2-distill"):
                shutil.copytree(tmp_path / ROWS[0] / name, folder / name)
        before = files_of(folder)
        recipe = shipped_in_debug_size(row, Path(teacher.source["name"]), text)
        refined = refine(recipe, folder, teacher, progress=False)
        assert before.items() <= files_of(folder).items()
        assert refined.students == {"dense": folder / "2-distill", "spiking": folder / "4-spike"}
        weights[row.split("/")[1]] = weights_of(folder / "4-spike")
    same = [("table2-2-atmn-kl", "table4-a1-b0"), ("table2-4-atmn-bidirectional-prenorm", "table3-pre")]
    same += [("table2-3-atmn-bidirectional", "table3-none"), ("table3-none", "table4-a02-b07")]
    for one, other in same:
        assert weights[one] == weights[other]
    assert len(set(weights.values())) == len(weights) - len(same)


def test_recipes_come_back_from_a_step(whole: Refined, tmp_path: Path) -> None:
    kept = provenance(whole.folder / "6-spike")["recipe"]
    (tmp_path / "kept.yaml").write_text(json.dumps(kept))
    recipe = read_recipe(tmp_path / "kept.yaml")
    before = files_of(whole.folder)
    refine(recipe, whole.folder, progress=False)
    assert files_of(whole.folder) == before


@pytest.mark.parametrize(("faster", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_writes_in_the_precision_that_is_faster(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: str, dtype: torch.dtype
) -> None:
    used = []

    def write(*args: Any, **settings: Any) -> Any:
        used.append(settings["dtype"])
        raise KeyboardInterrupt

    monkeypatch.setattr(mar.refinement, "write_text", write)
    monkeypatch.setattr(mar.refinement, "resolve_precision", lambda precision, device: faster)
    recipe = Recipe(
        name="written", teacher=str(tiny_llama_folder), data=DataConfig(source="teacher", length=16), stages={}
    )
    with pytest.raises(KeyboardInterrupt):
        refine(recipe, tmp_path / "run", progress=False)
    assert used == [dtype]
