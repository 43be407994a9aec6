"""One step from folder to folder, outside of any recipe: convert, insert neurons or retune them, train a stage, pack.

Does: what the verbs of these names do, and refuse folders that do not fit each other. Does not: run recipes
(mar.refinement), or know how a step computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mar.checkpoint import LOCK, alone_in
from mar.conversion import calibrate_mixers, convert_llama, convert_llamba
from mar.data import PackedRows
from mar.folder import digest, load_student, load_tokenizer, read_provenance, save_student
from mar.insertion import insert_neurons, retune_neurons
from mar.layers import input_moments
from mar.model import MarForCausalLM
from mar.processes import this_process
from mar.quiet import say
from mar.recipe import SPIKING, MixerSettings, NeuronSettings, StageConfig, site_changes
from mar.refinement import build_objective
from mar.sources import DataConfig
from mar.spikes import SpikeMonitor
from mar.teachers import load_teacher
from mar.train import train
from mar.weights import model_type, read_config

OWN_SETTINGS = ("alpha", "beta", "features", "trained", "energy_target", "energy_weight")
"""What `mar train` can change of a stage besides its budget, rate and batch."""


def convert_to_folder(source: str, output: Path, mixer: MixerSettings, text: str | None) -> MarForCausalLM:
    """The dense student of a LLaMA or of a published Llamba folder, written to `output`; see `mar convert`."""
    with _alone_in_new(output):
        if _is_llamba(Path(source)):
            if text is not None or mixer.preset == "hybrid" or mixer.window is not None:
                raise ValueError(
                    f"{source} is a Llamba folder: it is taken as it was published, with mixers of its own; leave out "
                    "--text, --preset and --window."
                )
            choices = {"preset": "llamba", "init": "published"}
            student = convert_llamba(source)
            tokenizer = load_tokenizer(source)
            origin: dict[str, Any] = {"kind": "llamba", "name": source, "sha256": digest(Path(source))}
        else:
            teacher = load_teacher(source)
            choices = {"preset": mixer.preset, "init": mixer.init, **mixer.choices()}
            student = convert_llama(teacher.model, **choices)
            tokenizer, origin = teacher.tokenizer, teacher.source
            if text is not None:
                say(f"Calibrating mixers on the first rows of {text}.")
                rows = PackedRows(DataConfig(source=text), tokenizer)
                batch = next(iter(rows.batches(4)))
                say_if_short(rows, text, batch["input_ids"].numel())
                calibrate_mixers(student, teacher.model, batch)
        provenance = {"step": "convert", "settings": {**choices, "text": text}, "parent": origin}
        save_student(student, tokenizer, output, {**provenance, "teacher": origin, "tokens": 0, "metrics": {}})
        return student


def insert_to_folder(
    model: Path, output: Path, neurons: NeuronSettings, text: str, tokens: int
) -> tuple[MarForCausalLM, dict[str, float]]:
    """The spiking student of a dense MAR folder, written to `output`, and its rates on a row; see `mar insert`."""

    def insert(dense: MarForCausalLM, rows: PackedRows) -> MarForCausalLM:
        if dense.config.neurons is not None:
            raise ValueError(
                f"{model} already has neurons; change them with `mar retune`, or give the dense folder that it was "
                "made from."
            )
        return insert_neurons(dense, neurons.by_site(), rows.batches(1), tokens, neurons.spike_budget)

    return _spiking_to_folder(model, output, "insert_neurons", asdict(neurons), text, tokens, insert)


def retune_to_folder(
    model: Path,
    output: Path,
    changes: dict[str, Any],
    per_site: list[str],
    budget: float | None,
    text: str,
    tokens: int,
) -> tuple[MarForCausalLM, dict[str, float]]:
    """A spiking MAR folder with other codes, written to `output`, and its rates on a row; see `mar retune`.

    changes: at every site; per_site: at single ones, as `mar.recipe.site_changes` takes them.
    """

    def retune(spiking: MarForCausalLM, rows: PackedRows) -> MarForCausalLM:
        own = site_changes(per_site)
        sites = dict.fromkeys(spiking.config.neurons or {}, changes)
        by_site = {site: {**sites.get(site, {}), **own.get(site, {})} for site in (*sites, *own)}
        return retune_neurons(spiking, by_site, rows.batches(1), tokens, budget)

    settings = {**changes, "per_site": per_site, "spike_budget": budget}
    return _spiking_to_folder(model, output, "retune_neurons", settings, text, tokens, retune)


def _spiking_to_folder(
    model: Path,
    output: Path,
    step: str,
    settings: dict[str, Any],
    text: str,
    tokens: int,
    make: Callable[[MarForCausalLM, PackedRows], MarForCausalLM],
) -> tuple[MarForCausalLM, dict[str, float]]:
    with _alone_in_new(output):
        student, tokenizer = load_student(model), load_tokenizer(model)
        rows = PackedRows(DataConfig(source=text), tokenizer, vocab_size=student.config.vocab_size)
        say(f"Setting thresholds on {tokens:,} tokens of {text}.")
        spiking = make(student, rows)
        say_if_short(rows, text, tokens)
        provenance = {
            "step": step,
            "settings": {**settings, "text": text, "tokens": tokens},
            "parent": _source(model),
            "teacher": _teacher(model),
        }
        rows.rewind()
        with SpikeMonitor(spiking, f"the first tokens of {text}") as monitor, torch.inference_mode():
            spiking(**next(iter(rows.batches(1))))
        summary = monitor.summary()
        if silent := [f"{site.site} of layer {site.layer}" for site in summary.sites if not site.spikes]:
            say(
                f"{len(silent)} of {len(summary.sites)} neuron sites never fired on the first row, {silent[0]} among "
                "them, so their linears see nothing; a larger spike budget wakes them."
            )
        totals = summary.totals
        rates = {"spikes_per_mac": totals.spikes_per_mac, "nonzero_per_mac": totals.nonzero_per_mac}
        save_student(spiking, tokenizer, output, {**provenance, "tokens": 0, "metrics": rates})
        return spiking, rates


def pack_to_folder(
    model: Path, output: Path, precision: str, head: str, text: str | None = None, tokens: int = 8192
) -> int:
    """A MAR folder with its weights in small integers, written to `output`; see `mar pack`. Returns its bytes."""
    with _alone_in_new(output):
        if tokens < 1:
            raise ValueError(f"The tokens to calibrate rounding on are {tokens}; use at least 1.")
        if read_config(model).get("compact") is not None:
            raise ValueError(f"{model} is compact already; give the folder that it was made from.")
        student, tokenizer = load_student(model), load_tokenizer(model)
        compact = {"precision": precision, "head": head}
        settings: dict[str, Any] = dict(compact)
        moments = None
        if text is not None:
            say(f"Running {tokens:,} tokens of {text} through {model}.")
            rows = PackedRows(DataConfig(source=text), tokenizer, vocab_size=student.config.vocab_size)
            moments = input_moments(student, rows.batches(1), tokens)
            say_if_short(rows, text, tokens)
            settings |= {"text": text, "tokens": tokens}
        provenance = {"step": "pack", "settings": settings, "parent": _source(model), "teacher": _teacher(model)}
        say(f"Rounding to {precision}.")
        save_student(student, tokenizer, output, {**provenance, "tokens": 0, "metrics": {}}, compact, moments)
        return sum(file.stat().st_size for file in output.iterdir())


def train_to_folder(stage: StageConfig, student: Path, output: Path, teacher: str, data: DataConfig) -> dict[str, Any]:
    """Train one stage on a student's folder, write the student to `output`, return the metrics; see `mar train`.

    What `teacher` holds decides stage.teacher. Of several processes the main one alone writes.
    """
    if output.exists() and any(output.samefile(other) for other in (student, Path(teacher)) if other.exists()):
        raise ValueError(f"{output} is the student or the teacher, which would be overwritten; give another folder.")
    by_mar = (Path(teacher) / "config.json").is_file() and model_type(teacher) == "mar"
    if by_mar and stage.kind not in SPIKING:
        raise ValueError(
            f"{stage.kind} learns from a LLaMA, and {teacher} holds a MAR model; give the LLaMA it came from."
        )
    if not by_mar and stage.kind == "spike_align":
        raise ValueError(
            f"{stage.kind} compares with the dense student; give its MAR folder as the teacher, not {teacher!r}."
        )
    process = this_process()
    stage = replace(stage, teacher="llama" if stage.kind == "spike" and not by_mar else None)
    model, tokenizer = load_student(student).train(), load_tokenizer(student)
    dense, llama = None, None
    if by_mar:
        dense, source = load_student(teacher), _source(Path(teacher))
    else:
        with process.main_process_first():
            loaded = load_teacher(teacher)
        llama, source = loaded.model, loaded.source
    used: list[Any] = [each for each in (model, dense, llama) if each is not None]
    for each in used:
        each.to(process.device)
    parent = _source(student)
    own = {name: getattr(stage, name) for name in OWN_SETTINGS}
    metrics = train(
        build_objective(stage, model, llama, dense),
        PackedRows(data, tokenizer, vocab_size=model.config.vocab_size),
        stage.train,
        output / "training",
        recipe={"kind": stage.kind, "student": parent, "teacher": source, **own},
    )
    settings = {**own, "train": asdict(stage.train)}
    provenance = {"step": stage.kind, "settings": settings, "data": asdict(data), "parent": parent, "teacher": source}
    if process.is_main_process:
        save_student(model.eval(), tokenizer, output, {**provenance, "tokens": metrics["tokens"], "metrics": metrics})
    process.wait_for_everyone()
    return metrics


def say_if_short(rows: PackedRows, text: str, tokens: int) -> None:
    """Say on stderr that `rows`, which gave so many tokens of `text`, had to read it again for them."""
    if again := rows.state_dict()["epoch"]:
        say(
            f"{text} is shorter than {tokens:,} tokens and was read {again + 1:,} times; what comes of it may not hold "
            "for other text, so give more."
        )


@contextmanager
def _alone_in_new(output: Path) -> Iterator[None]:
    """A new folder to write a model into, for this process alone; where that fails, what was made for it goes.

    Raises ValueError where the folder holds a model, cannot be written, or is being written by another process.
    """
    _refuse_taken(output)
    made = [place for place in (output, *output.parents) if not place.exists()]
    try:
        with alone_in(output):
            _refuse_taken(output)  # again: another process may just have finished there
            try:
                yield
            finally:
                (output / LOCK).unlink(missing_ok=True)  # no part of a model
    except BaseException:
        for place in made:
            with suppress(OSError):  # it is not empty
                place.rmdir()
        raise


def _refuse_taken(output: Path) -> None:
    if (output / "config.json").exists():
        raise ValueError(f"{output} already holds a model; give another folder, or remove it first.")
    for weights in output.glob("*.safetensors"):  # which would be read along with the new ones, or in their place
        raise ValueError(f"{output} already holds weights ({weights.name}); give another folder, or remove them first.")
    place = next(place for place in (output.absolute(), *output.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{output} cannot be written, as {place} is no folder to write in; name another.")


def _is_llamba(folder: Path) -> bool:
    """Whether a folder has the layout of the published Llamba checkpoints, whose config names no model_type."""
    config = folder / "config.json"
    return config.is_file() and '"ssm_cfg"' in config.read_text(encoding="utf-8", errors="replace")


def _source(folder: Path) -> dict[str, Any]:
    """A model's folder, as provenance names it."""
    return {"kind": "folder", "name": str(folder), "sha256": digest(folder)}


def _teacher(folder: Path) -> dict[str, Any]:
    """Where a student's teacher came from; the student itself where its folder does not say."""
    return read_provenance(folder)["teacher"] if (folder / "provenance.json").is_file() else _source(folder)
