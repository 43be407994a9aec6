"""Recipes that run in a second with the tiny LLaMA, and what tests look at in a run's folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import SENTENCES
from mar.config import NeuronConfig
from mar.optimizer import TrainConfig
from mar.recipe import (
    EvaluationSettings,
    MixerSettings,
    NeuronSettings,
    Recipe,
    StageConfig,
    WritingSettings,
    debug_size,
    read_recipe,
)
from mar.sources import DataConfig

LENGTH = 32
TRAIN = TrainConfig(tokens=3 * LENGTH, batch_size=1, lr=1e-3, warmup_steps=1, checkpoint_minutes=0)
"""Three steps of one row, with a checkpoint after each."""


def write_sentences(path: Path, documents: int = 60) -> Path:
    """A jsonl file of different texts, each some 100 tokens of the tiny tokenizer long."""
    texts = [f"{number}. {SENTENCES[number % 6]} {SENTENCES[number % 5]}" for number in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny_recipe(teacher: Path, source: Path | str, kinds: tuple[str, ...] = ("align", "spike"), **train: Any) -> Recipe:
    """Stages of the given kinds, each named like its kind. source `teacher`: 300 tokens in parts of 128."""
    stages: dict[str, Any] = {kind: StageConfig(kind=kind, train=replace(TRAIN, **train)) for kind in kinds}  # type: ignore[arg-type]
    return Recipe(
        name="tiny",
        teacher=str(teacher),
        data=DataConfig(source=str(source), length=LENGTH),
        stages=stages,
        mixer=MixerSettings(calibration_tokens=LENGTH),
        neurons=NeuronSettings(NeuronConfig(time_steps=3), per_site={"down_proj": {"time_steps": 6}}),
        writing=WritingSettings(tokens=300, held_out_tokens=200, length=128, batch_size=1),
        evaluation=EvaluationSettings(tokens=2 * LENGTH, window=LENGTH),
    )


def shipped_in_debug_size(name: str, teacher: Path, text: Path) -> Recipe:
    """A recipe that mar ships in its debug size, with the tiny teacher, on local text where it names a source."""
    overrides = [f"teacher={teacher}"]
    if name in ("smollm2-135m", "smollm2-135m-hybrid", "llama-3.2-1b"):
        overrides += [f"data.source={text}", "data.held_out_share=0.3"]
    return debug_size(read_recipe(name, overrides))


def steps_of(run: Path) -> list[Path]:
    """The folders of a run's steps, in order."""
    return sorted(
        (path.parent for path in run.glob("*/provenance.json")), key=lambda path: int(path.name.split("-")[0])
    )


def provenance(step: Path) -> dict[str, Any]:
    return json.loads((step / "provenance.json").read_text())


def weights_of(step: Path) -> bytes:
    return (step / "model.safetensors").read_bytes()


def log_of(step: Path) -> list[dict[str, Any]]:
    """The training log of a step without its clock."""
    lines = [json.loads(line) for line in (step / "training" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder` with its size and the moment it was last written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
