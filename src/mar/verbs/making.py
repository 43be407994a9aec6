"""Verbs that write models and reports: convert, insert, retune, refine, train, pack, quickstart, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from mar.weights import require_mar

Result = dict[str, Any]


def convert(
    source: str,
    output: Path,
    /,
    *,
    preset: Literal["fast", "llamba", "hybrid"] = "fast",
    init: Literal["attention", "llamba"] = "attention",
    window: int | None = None,
    text: str | None = None,
) -> Result:
    """Turn a LLaMA (or a published Llamba folder) into a dense MAR folder.

    Args:
        source: teacher name, hub id, LLaMA folder, GGUF file, or Llamba folder.
        output: folder to write, a new one.
        preset: mixer choices, `llamba` being those published; `hybrid` keeps attention over the last 64 tokens and the
            first; of LLaMAs with unscaled rotary positions only. A Llamba folder keeps its own.
        init: `attention` starts from the attention weights, `llamba` at random.
        window: tokens of attention beside the scan, 0 for none (default: the preset's).
        text: file or folder of text, a few thousand tokens: decays and scales are calibrated on its first rows, and
            training starts far nearer to its end.
    """
    from mar.recipe import MixerSettings
    from mar.steps import convert_to_folder

    student = convert_to_folder(source, output, MixerSettings(preset, init, window), text)
    calibrated = text is not None
    return {"folder": str(output), "parameters": student.num_parameters(), "calibrated": calibrated}


def insert(
    model: Path,
    output: Path,
    /,
    *,
    text: str,
    tokens: int = 4096,
    kind: Literal["atmn", "ternary", "binary"] = "atmn",
    time_steps: int = 4,
    tau: float = 1.0,
    threshold: Literal["channel", "scalar"] = "channel",
    precharge: float = 0.0,
    merge: Literal["weighted", "sum"] = "weighted",
    surrogate: str = "ste",
    sites: list[Literal["in_proj", "out_proj", "gate_up", "down_proj"]] | None = None,
    per_site: list[str] | None = None,
    spike_budget: float | None = None,
) -> Result:
    """Turn a dense MAR folder into a spiking one, calibrated on a text; trains nothing.

    Args:
        model: dense MAR folder.
        output: folder to write, a new one.
        text: file or folder of text.
        tokens: how much of it.
        kind: the neuron: the paper's, or a baseline with hard reset (ternary) or without negative spikes (binary).
        time_steps: T, inner steps per token.
        tau: leak of the membrane between steps.
        threshold: one per channel, or one for the site.
        precharge: the part of V that membranes start with; 0.5 rounds codes, 0 truncates.
        merge: spikes weighted by tau^t, or their plain sum.
        surrogate: the backward shape: ste, rectangle, triangle, arctan, sigmoid.
        sites: where neurons go (default: all four).
        per_site: changes at single sites, as in down_proj.time_steps=16
        spike_budget: most spikes per input (MAC-weighted r·T), spent where they lower the error most; with a
            precharge below 0.5 weights are scaled to fit.
    """
    require_mar(model)
    from mar.config import SITES, NeuronConfig
    from mar.recipe import NeuronSettings, site_changes
    from mar.steps import insert_to_folder

    default = NeuronConfig(kind, time_steps, tau, threshold, precharge, merge, surrogate)
    neurons = NeuronSettings(default, list(sites or SITES), site_changes(per_site or []), spike_budget)
    spiking, rates = insert_to_folder(model, output, neurons, text, tokens)
    return {"folder": str(output), "neurons": sum(neuron.channels for *_, neuron in spiking.neuron_sites()), **rates}


def retune(
    model: Path,
    output: Path,
    /,
    *,
    text: str,
    tokens: int = 4096,
    spike_budget: float | None = None,
    time_steps: int | None = None,
    precharge: float | None = None,
    per_site: list[str] | None = None,
) -> Result:
    """Give a spiking MAR folder fewer spikes or other codes, its thresholds kept or raised alike; trains nothing.

    Args:
        model: spiking MAR folder.
        output: folder to write, a new one.
        text: file or folder of text.
        tokens: how much of it.
        spike_budget: most spikes per input (MAC-weighted r·T); all thresholds rise by one factor until it is kept.
        time_steps: T at every site (default: as it is).
        precharge: the part of V that membranes start with, at every site; neurons go on firing where they did (default:
            as it is).
        per_site: changes of these two at single sites, as in down_proj.time_steps=16
    """
    require_mar(model)
    from mar.steps import retune_to_folder

    given = {"time_steps": time_steps, "precharge": precharge}
    changes = {name: value for name, value in given.items() if value is not None}
    spiking, rates = retune_to_folder(model, output, changes, per_site or [], spike_budget, text, tokens)
    return {"folder": str(output), "neurons": sum(neuron.channels for *_, neuron in spiking.neuron_sites()), **rates}


def refine(
    recipe: str,
    output: Path | None = None,
    /,
    *,
    debug: bool = False,
    print_config: bool = False,
    overrides: list[str] | None = None,
) -> Result:
    """Run a whole recipe, from teacher to measured students; the same command goes on after a stop.

    Any setting of the recipe can be changed by its dotted name: --stages.align.train.tokens=1000

    Args:
        recipe: a YAML file or the name of a recipe that mar ships (quickstart, smollm2-135m, smollm2-135m-hybrid,
            llama-3.2-1b, ablations/ROW).
        output: the run's folder (default: runs/ and the recipe's name).
        debug: cut every budget to two small steps.
        print_config: print the whole recipe, changes included, as YAML (with --json as JSON) and stop.
    """
    from dataclasses import asdict

    from mar.quickstart import refine_and_measure
    from mar.recipe import debug_size, read_recipe

    settings = read_recipe(recipe, overrides)
    if debug:
        settings = debug_size(settings)
    if print_config:
        return json.loads(json.dumps(asdict(settings)))
    return refine_and_measure(settings, output or Path("runs") / settings.name)


def train(
    kind: Literal["orient", "align", "distill", "spike_align", "spike"],
    student: Path,
    output: Path,
    /,
    *,
    teacher: str,
    text: str,
    tokens: int = 100_000,
    lr: float | None = None,
    batch_size: int = 1,
    length: int = 512,
    alpha: float | None = None,
    beta: float | None = None,
    features: Literal["pre", "post", "both", "none"] | None = None,
    trained: Literal["mixers", "mixers+norms", "thresholds", "layers", "all"] | None = None,
    energy_target: float | None = None,
    energy_weight: float | None = None,
    precision: Literal["auto", "bf16", "fp32", "int8"] = "auto",
) -> Result:
    """Train one stage on an existing student folder; the same command goes on after a stop.

    Args:
        kind: the stage.
        student: MAR folder; for spike_align and spike one with neurons.
        output: folder to write, another one; training state lies in its `training`.
        teacher: LLaMA (name, hub id, folder, GGUF) or dense MAR folder; spike_align takes the latter only, spike both,
            the others a LLaMA.
        text: training text: file, folder, glob, or a hub data set as hub:owner/name.
        tokens: budget.
        lr: peak learning rate, after a tenth of the steps, 100 at most (default: 1.5e-3 for align, 1e-4 for distill
            and spike, 5e-4 for the others).
        batch_size: rows a step.
        length: tokens a row.
        alpha: weight of KL(teacher || student), for distill and spike.
        beta: weight of KL(student || teacher), for distill and spike.
        features: which normed features are compared, for spike.
        trained: parameter set, for distill and spike.
        energy_target: MAC-weighted spikes per input to steer to, for spike.
        energy_weight: what a spike per input above it costs (default: 1); where more are spent than wanted, raise it.
        precision: bf16 autocast, fp32, int8 products (on CPUs; see docs/training.md), or auto: bf16 unless fp32 is
            faster on this machine, as `mar info` says.
    """
    require_mar(student)
    from dataclasses import replace

    from mar.optimizer import TrainConfig
    from mar.recipe import PEAK_RATES, StageConfig
    from mar.sources import DataConfig
    from mar.steps import train_to_folder

    rate = PEAK_RATES[kind] if lr is None else lr
    config = TrainConfig(tokens=tokens, lr=rate, batch_size=batch_size, weight_decay=0.0, precision=precision)
    config = replace(config, warmup_steps=min(100, config.steps(length) // 10))
    stage = StageConfig(
        kind,
        config,
        alpha=alpha,
        beta=beta,
        features=features,
        trained=trained,
        energy_target=energy_target,
        energy_weight=energy_weight,
    )
    metrics = train_to_folder(stage, student, output, teacher, DataConfig(source=text, length=length))
    return {"folder": str(output), **metrics}


def pack(
    model: Path,
    output: Path,
    /,
    *,
    precision: Literal["int8", "int4"] = "int8",
    head: Literal["int8", "int4", "bf16"] = "int8",
    text: str | None = None,
    tokens: int = 8192,
) -> Result:
    """Write a MAR folder again with its weights in small integers, for transformers and the engine alike.

    Args:
        model: MAR folder.
        output: folder to write, a new one.
        precision: of the decoder's linears: int8, a scale for each output; int4, a scale for 64 inputs of an output.
        head: of embedding and head.
        text: file or folder of text: linears and head are rounded for what they multiply on it, and less is lost.
        tokens: how much of it.
    """
    require_mar(model)
    from mar.steps import pack_to_folder

    return {"folder": str(output), "bytes": pack_to_folder(model, output, precision, head, text, tokens)}


def quickstart(output: Path = Path("runs/quickstart"), /, *, minutes: float = 10.0, debug: bool = False) -> Result:
    """Refine SmolLM2-135M into a small spiking model on text that it writes itself, and report on it.

    Args:
        output: the run's folder; the same command goes on after a stop.
        minutes: the one dial: budgets scale with it.
        debug: two small steps a stage.
    """
    from mar.quickstart import quickstart as run

    return run(output, minutes, debug)


def report(folder: Path, /) -> Result:
    """Write report.html of a run again from its results.json, and print its table.

    Args:
        folder: a run's folder.
    """
    from mar.quickstart import write_report

    return write_report(folder)
