"""A recipe, run from teacher to trained student: text, conversion, then each stage in turn.

Does: lay out the run folder, skip what is finished, go on with what is not. Does not: train (mar.train), define losses
(mar.stages), or measure students (mar.results).

A run folder holds one folder a step, each a plain Hugging Face folder with the step's training state under `training/`.
Running the same recipe in the same folder continues it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mar.checkpoint import explain_disk_full
from mar.conversion import calibrate_mixers, convert_llama
from mar.data import PackedRows, read_meta, write_documents
from mar.folder import digest, load_student, read_provenance, save_student
from mar.generate import Draft, write_text
from mar.insertion import insert_neurons
from mar.model import MarForCausalLM
from mar.objective import Objective
from mar.precision import resolve_precision
from mar.processes import this_process
from mar.prompts import HELD_OUT_PROMPTS, TRAIN_PROMPTS
from mar.quiet import say
from mar.recipe import SPIKING, Recipe, StageConfig
from mar.stages import Align, Distill, Orient, Spike, SpikeAlign
from mar.teachers import Teacher, load_teacher
from mar.train import NUMBERS_STAY, train

STAGES = {"orient": Orient, "align": Align, "distill": Distill, "spike_align": SpikeAlign, "spike": Spike}


@dataclass
class Refined:
    """A finished run: the models' folders by name (`dense`, `spiking` where trained) and each stage's final metrics."""

    folder: Path
    students: dict[str, Path]
    metrics: dict[str, dict[str, Any]]


def refine(
    recipe: Recipe,
    folder: str | Path,
    teacher: Teacher | None = None,
    progress: bool = True,
    begin: Callable[[], None] = lambda: None,
) -> Refined:
    """Run a recipe in `folder`, or go on with it.

    teacher: an already loaded one, to save time; it is moved to the device that the run computes on. begin: called
    when the folder is known to be this recipe's, before any work. Where a launcher started several processes, all train
    and the main one alone writes, into a folder that all must see.
    Raises ValueError where the folder holds another recipe's run, and before any work for a stage with a setting that
    its kind has no use for.
    """
    for stage in recipe.stages.values():
        stage_settings(stage)
    if teacher is None:
        # One after the other, because the first download of a teacher is for all of them.
        with this_process().main_process_first():
            teacher = load_teacher(recipe.teacher)
    run = _RefineRun(recipe, Path(folder), teacher, progress)
    run.refuse_others()
    begin()
    run.folder.mkdir(parents=True, exist_ok=True)
    if recipe.data.source == "teacher":
        precision = resolve_precision("auto", teacher.model.device)  # by all processes, before one of them writes
        with run.process.main_process_first():
            run.write_text(torch.bfloat16 if precision == "bf16" else torch.float32)
    student = run.step("convert", run.convert)
    students = {}
    metrics = {}
    for name, stage in recipe.stages.items():
        if stage.kind in SPIKING and "dense" not in students:
            students["dense"] = run.path
            run.dense = student
            student = run.step("insert_neurons", lambda dense=student: run.insert(dense))
        student, metrics[name] = run.train_stage(name, stage, student)
    students["spiking" if run.dense is not None else "dense"] = run.path
    return Refined(run.folder, students, metrics)


class _RefineRun:
    """Where a run stands: the folder of the newest model, and what later steps need of earlier ones."""

    def __init__(self, recipe: Recipe, folder: Path, teacher: Teacher, progress: bool) -> None:
        self.recipe, self.folder, self.teacher, self.progress = recipe, folder, teacher, progress
        self.process = this_process()
        teacher.model.to(self.process.device)  # type: ignore[arg-type]
        self.dense: MarForCausalLM | None = None
        self.path = folder
        self.count = 0
        self.parent = teacher.source

    def refuse_others(self) -> None:
        """Raise ValueError where text or a finished step is another recipe's or teacher's."""
        if self.recipe.data.source == "teacher":
            for split in ("train", "held_out"):
                for path in sorted((self.folder / "text" / split).glob("part-*.parquet")):
                    # By its name: a part in between may be missing, and names of four digits sort among those of three.
                    part = int(path.stem.removeprefix("part-"))
                    _refuse_other(path, read_meta(path), self._text_settings(split, part))
        for count, name in enumerate(self._step_names()):
            folder, settings = self.folder / f"{count}-{name}", self._settings(name)
            if count:
                del settings["parent"]  # to tell takes a digest of the step before, and damage there is its own error
            if (folder / "provenance.json").is_file():
                _refuse_other(folder, read_provenance(folder), settings)

    def _step_names(self) -> Iterator[str]:
        yield "convert"
        spiking = False
        for name, stage in self.recipe.stages.items():
            if stage.kind in SPIKING and not spiking:
                spiking = True
                yield "insert_neurons"
            yield name

    def _text_settings(self, split: str, part: int) -> dict[str, Any]:
        return {"part": part, "split": split, **asdict(self.recipe.writing), "teacher": self.teacher.source}

    def write_text(self, dtype: torch.dtype) -> None:
        """Let the teacher write training and held-out text, in parts: Ctrl-C loses nothing, a kill one part only.

        dtype: of the teacher's weights meanwhile, whichever is multiplied faster here.
        """
        wanted = self.recipe.writing
        for split, prompts, tokens in (
            ("train", TRAIN_PROMPTS, wanted.tokens),
            ("held_out", HELD_OUT_PROMPTS, wanted.held_out_tokens),
        ):
            done, part = 0, 0
            while done < tokens:
                path = self.folder / "text" / split / f"part-{part:03d}.parquet"
                settings = self._text_settings(split, part)
                draft = Draft(path.with_suffix(".draft"), {**settings, "dtype": str(dtype)})
                if path.is_file():
                    _refuse_other(path, read_meta(path), settings)
                else:
                    size = min(wanted.batch_size * wanted.length, tokens - done)
                    if self.progress:
                        say(f"Writing {size:,} tokens of {split} text; a kill would lose them, Ctrl-C does not.")
                    documents = write_text(
                        self.teacher.model,
                        self.teacher.tokenizer,
                        list(prompts),
                        tokens=size,
                        length=wanted.length,
                        batch_size=wanted.batch_size,
                        temperature=wanted.temperature,
                        seed=wanted.seed * 10_000 + part,
                        progress=self.progress,
                        dtype=dtype,
                        draft=draft,
                    )
                    with explain_disk_full(self.folder):
                        write_documents(path, documents, {**settings, "tokens_written": sum(map(len, documents))})
                shutil.rmtree(draft.folder, ignore_errors=True)
                done += int(read_meta(path)["tokens_written"])
                part += 1

    def rows(self) -> PackedRows:
        """The training text from its beginning."""
        data = self.recipe.data
        if data.source == "teacher":
            data = replace(data, source=str(self.folder / "text" / "train"))
        return PackedRows(data, self.teacher.tokenizer, vocab_size=self.teacher.model.config.vocab_size)

    def calibration_batch(self, tokens: int) -> dict[str, torch.Tensor]:
        """The first rows, at least `tokens` tokens of them."""
        rows = self.rows()
        return next(iter(rows.batches(-(-tokens // rows.length))))

    def convert(self) -> MarForCausalLM:
        """The untrained dense student."""
        mixer = self.recipe.mixer
        student = convert_llama(self.teacher.model, mixer.preset, mixer.init, **mixer.choices())
        if mixer.calibrate and mixer.init == "attention" and student.config.decay_bias:
            calibrate_mixers(student, self.teacher.model, self.calibration_batch(mixer.calibration_tokens))
        return student

    def insert(self, dense: MarForCausalLM) -> MarForCausalLM:
        """The untrained spiking student, thresholds calibrated on the first rows."""
        neurons = self.recipe.neurons
        return insert_neurons(dense, neurons.by_site(), self.rows().batches(1), spike_budget=neurons.spike_budget)

    def step(self, name: str, make: Callable[[], MarForCausalLM]) -> MarForCausalLM:
        """The model of a step that trains nothing."""
        folder, settings = self._next_folder(name), self._settings(name)
        if self.process.is_main_process and not self._is_done(folder, settings):
            say(f"Making {folder}.")
        return self._written(folder, settings, lambda: (make(), {}))

    def train_stage(
        self, name: str, stage: StageConfig, student: MarForCausalLM
    ) -> tuple[MarForCausalLM, dict[str, Any]]:
        """Train one stage, unless its folder says that it is done."""
        folder, settings = self._next_folder(name), self._settings(name)
        metrics: dict[str, Any] = {}
        if not self._is_done(folder, settings):
            objective = build_objective(stage, student.train(), self.teacher.model, self.dense)
            # How to train is left out: an unfinished run takes more tokens while its rates allow it (mar.train).
            own = {key: value for key, value in settings["settings"].items() if key != "train"}
            recipe = {**settings, "settings": own}
            metrics = train(objective, self.rows(), stage.train, folder / "training", self.progress, recipe)
        student = self._written(folder, settings, lambda: (student.eval(), metrics))
        return student, read_provenance(folder)["metrics"]

    def _written(
        self, folder: Path, settings: dict[str, Any], make: Callable[[], tuple[MarForCausalLM, dict[str, Any]]]
    ) -> MarForCausalLM:
        """The model of a step: its folder's if that is whole, else what `make` gives, which the main process saves."""
        with self.process.main_process_first():
            if self._is_done(folder, settings):
                student = load_student(folder)
            else:
                student, metrics = make()
                self._save(student, folder, settings, metrics)
        self._advance(folder)
        return student.to(self.process.device)  # type: ignore[arg-type]

    def _next_folder(self, name: str) -> Path:
        return self.folder / f"{self.count}-{name}"

    def _advance(self, folder: Path) -> None:
        self.count += 1
        self.path = folder
        self.parent = {"kind": "stage", "name": folder.name, "sha256": digest(folder)}

    def _settings(self, name: str) -> dict[str, Any]:
        """What decides this step's outcome, so that a changed recipe is not mistaken for a finished one."""
        whole = asdict(self.recipe)
        own = {"convert": "mixer", "insert_neurons": "neurons"}
        settings = whole[own[name]] if name in own else whole["stages"][name]
        if "train" in settings:
            settings["train"] = {key: value for key, value in settings["train"].items() if key not in NUMBERS_STAY}
        return {"step": name, "settings": settings, "data": whole["data"], "parent": self.parent}

    def _is_done(self, folder: Path, settings: dict[str, Any]) -> bool:
        if not (folder / "provenance.json").is_file():
            return False
        _refuse_other(folder, read_provenance(folder), settings)
        return True

    def _save(self, student: MarForCausalLM, folder: Path, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
        provenance = {
            **settings,
            "recipe": asdict(self.recipe),
            "teacher": self.teacher.source,
            "tokens": metrics.get("tokens", 0),
            "metrics": metrics,
        }
        save_student(student, self.teacher.tokenizer, folder, provenance)


def _refuse_other(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    if (kept := {key: found.get(key) for key in wanted}) != wanted:
        raise ValueError(
            f"{path} was made with other settings ({_first_difference(kept, wanted)}); refine into another folder, "
            "or remove this one and what was made after it."
        )


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Where two settings differ first: `train.lr was 0.1 and is now 0.2`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old!r} and is now {new!r}"


def stage_settings(stage: StageConfig) -> dict[str, Any]:
    """What a stage asks of its objective. Raises ValueError for a setting its kind has no use for."""
    own = {
        key: value
        for key, value in vars(stage).items()
        if key not in ("kind", "train", "teacher") and value is not None
    }
    known = {item.name for item in fields(STAGES[stage.kind])}
    if unknown := sorted(set(own) - known):
        raise ValueError(f"A stage of kind {stage.kind!r} has no setting {unknown[0]!r}; remove it from the recipe.")
    if stage.teacher is not None and stage.kind != "spike":
        raise ValueError(f"A stage of kind {stage.kind!r} has a fixed teacher; remove `teacher: {stage.teacher}`.")
    return own


def build_objective(stage: StageConfig, student: MarForCausalLM, llama: Any, dense: MarForCausalLM | None) -> Objective:
    """The objective of a stage. Raises ValueError for a setting its kind has no use for."""
    own = stage_settings(stage)
    by_dense = stage.kind == "spike_align" or (stage.kind == "spike" and stage.teacher != "llama")
    target = _frozen(dense if by_dense else llama)
    _check_pair(stage.kind, student, target)
    if by_dense:
        return STAGES[stage.kind](student, target, **own)
    # A copy where it changes, because the caller's teacher stays as it is for what follows.
    if resolve_precision(stage.train.precision, student.device) == "bf16":
        target = copy.deepcopy(target).to(torch.bfloat16)
    elif stage.kind == "orient":
        target = copy.deepcopy(target)
    if stage.kind == "orient":
        target.set_attn_implementation("eager")
    if stage.kind == "spike":
        own["against"] = "llama"
    return STAGES[stage.kind](student, target, **own)


def _check_pair(kind: str, student: MarForCausalLM, teacher: Any) -> None:
    if kind in SPIKING and student.config.neurons is None:
        raise ValueError(f"A stage of kind {kind!r} needs a student with neurons; insert them first.")
    # Predictions are compared word by word, layers one by one; the paper's features are those of layers too.
    for name in ("vocab_size",) if kind == "distill" else ("vocab_size", "hidden_size", "num_hidden_layers"):
        own, wanted = getattr(student.config, name), getattr(teacher.config, name)
        if own != wanted:
            raise ValueError(
                f"The student's {name} is {own} and its teacher's {wanted}; a stage of kind {kind!r} needs them equal, "
                "so give the teacher that the student came from."
            )


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)
