"""Recipes: everything that decides a run, as dataclasses, read from YAML with dotted overrides.

Does: define, read, check and shrink recipes. Does not: run them (mar.refinement).
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from mar.config import MIXER_PRESETS, SITES, NeuronConfig, site_neurons
from mar.optimizer import TrainConfig
from mar.sources import DataConfig

PEAK_RATES = {"orient": 5e-4, "align": 1.5e-3, "distill": 1e-4, "spike_align": 5e-4, "spike": 1e-4}
"""Learning rates for rows one or two at a time, as far as docs/lab-log.md has measured them."""

SPIKING = ("spike_align", "spike")


@dataclass
class MixerSettings:
    """How attention becomes a mixer: see `convert_llama`, and `calibrate_mixers` for calibrate, in mar.conversion.

    window: tokens of attention beside the scan, 0 for none; None: the preset's.
    """

    preset: Literal["fast", "llamba", "hybrid"] = "fast"
    init: Literal["attention", "llamba"] = "attention"
    window: int | None = None
    calibrate: bool = True
    calibration_tokens: int = 2048

    def choices(self) -> dict[str, Any]:
        """The choices of `convert_llama` that differ from the preset's."""
        return {} if self.window is None else {"window": self.window}


@dataclass
class NeuronSettings:
    """Which neurons go where: a default, the sites, and changes per site (`{down_proj: {time_steps: 16}}`).

    spike_budget: most MAC-weighted spikes per input that calibrated thresholds may spend, weights scaled to fit where
    precharge is below 0.5; None: as least error wants.
    """

    default: NeuronConfig = field(default_factory=NeuronConfig)
    sites: list[str] = field(default_factory=lambda: list(SITES))
    per_site: dict[str, dict[str, Any]] = field(default_factory=dict)
    spike_budget: float | None = None

    def __post_init__(self) -> None:
        if self.spike_budget is not None and not 0 < self.spike_budget < math.inf:
            raise ValueError(f"neurons.spike_budget is {self.spike_budget}; use a number above 0, or null for none.")
        # Checked here, because neurons are inserted when hours of training may have gone by.
        known = [item.name for item in fields(NeuronConfig)]
        for site, changes in self.per_site.items():
            if unknown := sorted(set(changes) - set(known)):
                raise ValueError(
                    f"neurons.per_site.{site} has no setting {unknown[0]!r}; use one of {', '.join(known)}."
                )
        self.by_site()

    def by_site(self) -> dict[str, dict[str, Any]]:
        """The value of `MarConfig.neurons`."""
        return site_neurons(self.default, self.per_site, tuple(self.sites))


def site_changes(changes: list[str]) -> dict[str, dict[str, Any]]:
    """Changes such as `down_proj.time_steps=16` as `NeuronSettings.per_site` takes them."""
    found: dict[str, dict[str, Any]] = {}
    for change in changes:
        parts = re.fullmatch(r"(\w+)\.(\w+)=([\w.+-]+)", change)
        if parts is None:
            raise ValueError(f"{change!r} is no change at a site; write one like down_proj.time_steps=16.")
        found.setdefault(parts[1], {})[parts[2]] = yaml.safe_load(parts[3])
    return found


@dataclass
class WritingSettings:
    """Text that the teacher writes itself, where `data.source` is `teacher`: how much, and how it is sampled.

    tokens: for training, continuing `mar.prompts.TRAIN_PROMPTS`. held_out_tokens: for evaluation, on other prompts.
    length: most tokens a document. Sampled from the teacher's own distribution at `temperature`.
    """

    tokens: int = 100_000
    held_out_tokens: int = 20_000
    length: int = 512
    batch_size: int = 64
    temperature: float = 1.0
    seed: int = 0


@dataclass
class EvaluationSettings:
    """What students are measured on: `tokens` of `data` in windows of `window`.

    data: None means the text that the teacher writes for this, or the held-out side where the recipe's own
    `data.split` is `train`.
    """

    data: DataConfig | None = None
    tokens: int = 20_000
    window: int = 512

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("window", 2)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} to measure on is {value}; use at least {least}.")


@dataclass
class StageConfig:
    """One stage. What is None keeps the default of its objective in mar.stages; what a kind has no use for is refused.

    kind: orient, align, distill, spike_align or spike. teacher: `dense` (the stage-1 student) or `llama`, for spike.
    """

    kind: Literal["orient", "align", "distill", "spike_align", "spike"]
    train: TrainConfig = field(default_factory=TrainConfig)
    teacher: Literal["dense", "llama"] | None = None
    alpha: float | None = None
    beta: float | None = None
    features: Literal["pre", "post", "both", "none"] | None = None
    trained: Literal["mixers", "mixers+norms", "thresholds", "layers", "all"] | None = None
    threshold_lr_scale: float | None = None
    energy_target: float | None = None
    energy_weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "threshold_lr_scale", "energy_target", "energy_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a number from 0 up.")


@dataclass
class Recipe:
    """Everything that decides a run. `stages` run in their order; neurons are inserted before the first spiking one.

    teacher: see `mar.teachers.load_teacher`. data: what every stage reads, each from the start; its source `teacher`
    stands for text that the teacher writes first (`writing`). evaluation: what `mar refine` measures at the end.
    """

    name: str
    teacher: str
    data: DataConfig
    stages: dict[str, StageConfig]
    mixer: MixerSettings = field(default_factory=MixerSettings)
    neurons: NeuronSettings = field(default_factory=NeuronSettings)
    writing: WritingSettings = field(default_factory=WritingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        spiking = [stage.kind in SPIKING for stage in self.stages.values()]
        if spiking != sorted(spiking):
            raise ValueError(
                f"Recipe {self.name!r} has a dense stage after a spiking one; put align and distill before spike_align "
                "and spike."
            )
        window = {**MIXER_PRESETS[self.mixer.preset], **self.mixer.choices()}.get("window", 0)
        if window and any(stage.kind == "orient" for stage in self.stages.values()):
            raise ValueError(
                f"Recipe {self.name!r} orients mixers with a window of {window} tokens, whose scan and window are not "
                "one mixing matrix; leave the orient stage out or set mixer.window to 0."
            )


def recipe_parser() -> ArgumentParser:
    """What reads recipe files and dotted overrides (`--stages.align.train.tokens 1000`); unknown keys are refused."""
    parser = ArgumentParser(prog="mar refine")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Recipe)
    return parser


def debug_size(recipe: Recipe) -> Recipe:
    """The same recipe with every budget cut to two steps of one short row: for tests and for trying a setting out."""
    small = copy.deepcopy(recipe)
    small.data = replace(small.data, length=64)
    small.writing = replace(small.writing, tokens=512, held_out_tokens=256, length=128, batch_size=8)
    small.evaluation = replace(small.evaluation, tokens=256, window=64)
    small.mixer = replace(small.mixer, calibration_tokens=64)
    for stage in small.stages.values():
        stage.train = replace(stage.train, tokens=128, batch_size=1, accumulation=1, warmup_steps=1)
    return small


RECIPES = Path(__file__).parent / "recipes"
ABLATIONS = RECIPES / "ablations"
"""Holds rows.yaml, what each row of the paper's tables changes, and base.yaml, what all of them share."""


def shipped_recipes() -> list[str]:
    """Names of the recipes that mar ships."""
    rows = [f"ablations/{row}" for row in yaml.safe_load((ABLATIONS / "rows.yaml").read_text())]
    return sorted(file.stem for file in RECIPES.glob("*.yaml")) + rows


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file or the name of one that mar ships, with overrides (`stages.align.train.lr=1e-3`).

    Raises FileNotFoundError, or ValueError that names the unknown key or unfitting value.
    """
    file, settings = Path(path), list(overrides or [])
    if not file.is_file():
        name = str(path)
        if name not in shipped_recipes():
            raise FileNotFoundError(
                f"There is no recipe {name!r}; give a YAML file or one of {', '.join(shipped_recipes())}."
            )
        file = RECIPES / f"{name}.yaml"
        if name.startswith("ablations/"):
            file = ABLATIONS / "base.yaml"
            rows = yaml.safe_load((ABLATIONS / "rows.yaml").read_text())
            settings = [f"name={name}", *rows[name.removeprefix("ablations/")], *settings]
    # Before jsonargparse, which names no known keys and passes over an unknown one whose value is an empty mapping.
    try:
        whole = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {path} is not YAML: {' '.join(str(error).split())}; mend it there.") from error
    for given in (whole, *map(_nested, settings)):
        if problem := _unknown_key(given, Recipe):
            raise ValueError(f"Recipe {path}: {problem}.")
    parser = recipe_parser()
    parser.exit_on_error = False
    arguments = ["--config", str(file), *(f"--{setting.removeprefix('--')}" for setting in settings)]
    try:
        values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except (argparse.ArgumentError, TypeError) as error:
        problem = " ".join(str(error).split()).replace("Problem with given class_path 'mar.recipe.StageConfig': ", "")
        raise ValueError(f"Recipe {path}: {problem}.") from error
    values.pop("config")
    return Recipe(**values)


def _nested(setting: str) -> Any:
    """An override as the mapping that says the same in a file."""
    name, _, text = setting.removeprefix("--").partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # as in *.txt
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _unknown_key(settings: Any, kind: Any, above: str = "") -> str | None:
    """What to say of the first key in `settings` that has no field in the dataclass that `kind` is or holds."""
    if not isinstance(settings, dict):
        return None
    if get_origin(kind) is dict:
        hints = dict.fromkeys(settings, get_args(kind)[1])
    elif held := next(filter(is_dataclass, (kind, *get_args(kind))), None):
        hints = get_type_hints(held)
    else:
        return None
    for key, value in settings.items():
        if key not in hints:
            key, _, rest = str(key).partition(".")  # a file may have dotted names too
            value = {rest: value} if rest else value
        if key not in hints:
            return f"there is no setting {above + key!r}; use one of {', '.join(hints)}"
        if unknown := _unknown_key(value, hints[key], f"{above}{key}."):
            return unknown
    return None
