"""What each verb of the command line does, as plain functions from settings to figures.

Does: load, call the library, return JSON-ready figures. Does not: parse or print results. mar.cli makes the command
line from these signatures and docstrings: what comes before the `/` is given by position, the rest as options. Heavy
modules are imported inside the verbs, so that `mar --help` is quick.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mar.spikes import SpikeReport

Result = dict[str, Any]


def convert(
    source: str,
    output: Path,
    /,
    *,
    preset: Literal["fast", "llamba"] = "fast",
    init: Literal["attention", "llamba"] = "attention",
    text: str | None = None,
) -> Result:
    """Turn a LLaMA (or a published Llamba folder) into a dense MAR folder.

    Args:
        source: teacher name, hub id, LLaMA folder, GGUF file, or Llamba folder.
        output: folder to write, a new one.
        preset: mixer choices, `llamba` being those published.
        init: `attention` starts from the attention weights, `llamba` at random.
        text: file or folder of text; with it decays and scales are calibrated on its first rows.
    """
    from mar.conversion import calibrate_mixers, convert_llama, convert_llamba
    from mar.data import PackedRows
    from mar.folder import digest, load_tokenizer, save_student
    from mar.sources import DataConfig
    from mar.teachers import load_teacher

    if (output / "config.json").exists():
        raise ValueError(f"{output} already holds a model; give another folder, or remove it first.")
    if _is_llamba(Path(source)):
        student = convert_llamba(source)
        tokenizer = load_tokenizer(source)
        origin: dict[str, Any] = {"kind": "llamba", "name": source, "sha256": digest(Path(source))}
    else:
        teacher = load_teacher(source)
        student = convert_llama(teacher.model, preset, init)
        tokenizer, origin = teacher.tokenizer, teacher.source
        if text is not None:
            rows = PackedRows(DataConfig(source=text), tokenizer)
            calibrate_mixers(student, teacher.model, next(iter(rows.batches(4))))
    provenance = {"step": "convert", "settings": {"preset": preset, "init": init, "text": text}, "parent": origin}
    save_student(student, tokenizer, output, {**provenance, "teacher": origin, "tokens": 0, "metrics": {}})
    return {"folder": str(output), "parameters": student.num_parameters()}


def _is_llamba(folder: Path) -> bool:
    """Whether a folder has the layout of the published Llamba checkpoints, whose config names no model_type."""
    config = folder / "config.json"
    return config.is_file() and '"ssm_cfg"' in config.read_text(encoding="utf-8", errors="replace")


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
        recipe: a YAML file or the name of a recipe that mar ships (quickstart, smollm2-135m, llama-3.2-1b,
            ablations/ROW).
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
    lr: float = 5e-4,
    batch_size: int = 4,
    length: int = 512,
    alpha: float | None = None,
    beta: float | None = None,
    features: Literal["pre", "post", "both", "none"] | None = None,
    trained: Literal["mixers", "mixers+norms", "thresholds", "layers", "all"] | None = None,
    energy_target: float | None = None,
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
        lr: peak learning rate.
        batch_size: rows a step.
        length: tokens a row.
        alpha: weight of KL(teacher || student), for distill and spike.
        beta: weight of KL(student || teacher), for distill and spike.
        features: which normed features are compared, for spike.
        trained: parameter set, for distill and spike.
        energy_target: MAC-weighted spikes per input to steer to, for spike.
    """
    from mar.data import PackedRows
    from mar.folder import digest, load_student, load_tokenizer, model_type, save_student
    from mar.optimizer import TrainConfig
    from mar.recipe import SPIKING, StageConfig
    from mar.refinement import build_objective
    from mar.sources import DataConfig
    from mar.teachers import load_teacher
    from mar.train import train as run

    if output.exists() and any(output.samefile(other) for other in (student, Path(teacher)) if other.exists()):
        raise ValueError(f"{output} is the student or the teacher, which would be overwritten; give another folder.")
    by_mar = (Path(teacher) / "config.json").is_file() and model_type(teacher) == "mar"
    if by_mar and kind not in SPIKING:
        raise ValueError(f"{kind} learns from a LLaMA, and {teacher} holds a MAR model; give the LLaMA it came from.")
    if not by_mar and kind == "spike_align":
        raise ValueError(
            f"{kind} compares with the dense student; give its MAR folder as the teacher, not {teacher!r}."
        )
    config = TrainConfig(tokens=tokens, lr=lr, batch_size=batch_size)
    own: dict[str, Any] = {"alpha": alpha, "beta": beta, "features": features, "trained": trained}
    own["energy_target"] = energy_target
    stage = StageConfig(kind, config, teacher="llama" if kind == "spike" and not by_mar else None, **own)
    model, tokenizer = load_student(student).train(), load_tokenizer(student)
    dense, llama = None, None
    if by_mar:
        dense = load_student(teacher)
        source = {"kind": "folder", "name": teacher, "sha256": digest(Path(teacher))}
    else:
        loaded = load_teacher(teacher)
        llama, source = loaded.model, loaded.source
    parent = {"kind": "folder", "name": str(student), "sha256": digest(student)}
    metrics = run(
        build_objective(stage, model, llama, dense),
        PackedRows(DataConfig(source=text, length=length), tokenizer, vocab_size=model.config.vocab_size),
        config,
        output / "training",
        recipe={"kind": kind, "student": parent, "teacher": source, **own},
    )
    settings = {**own, "text": text, "tokens": tokens, "lr": lr, "batch_size": batch_size, "length": length}
    provenance = {"step": kind, "settings": settings, "parent": parent, "teacher": source}
    save_student(model.eval(), tokenizer, output, {**provenance, "tokens": metrics["tokens"], "metrics": metrics})
    return {"folder": str(output), **metrics}


def evaluate(
    models: list[Path],
    /,
    *,
    teacher: str,
    text: str | None = None,
    tokens: int = 100_000,
    window: int = 512,
    tasks: list[str] | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Result:
    """Compare students with their teacher on held-out text and on lm-eval's tasks.

    Args:
        models: MAR folders.
        teacher: the teacher of all of them.
        text: held-out text, for perplexity, KL and top-1 agreement.
        tokens: how much of it.
        window: tokens a window.
        tasks: piqa, boolq, winogrande, hellaswag, arc_easy, arc_challenge.
        data_dir: folder of task files (jsonl.gz) instead of the hub.
        limit: items a task, drawn by seed, the same for all models.
        seed: of items and bootstrap.
    """
    from mar.evaluate import compare_tasks, run_tasks
    from mar.folder import load_student
    from mar.recipe import EvaluationSettings, Recipe
    from mar.results import evaluation_rows, measure
    from mar.sources import DataConfig
    from mar.teachers import load_teacher

    if text is None and not tasks:
        raise ValueError("There is nothing to evaluate on; give --text, --tasks or both.")
    source = load_teacher(teacher)
    students = {str(folder): load_student(folder) for folder in models}
    result: Result = {}
    if text is not None:
        data = DataConfig(source=text)
        recipe = Recipe("eval", teacher, data, {}, evaluation=EvaluationSettings(data, tokens, window))
        rows, name = evaluation_rows(recipe, Path(), source)
        result.update(measure(students, source, rows, name))
    if tasks:
        pairs: dict[str, Any] = {"teacher": (source.model, source.tokenizer)}
        pairs.update({name: (model, source.tokenizer) for name, model in students.items()})
        outcome = run_tasks(pairs, tasks, data_dir=data_dir, limit=limit, seed=seed)
        result["tasks"] = {name: compare_tasks(outcome, name, "teacher").to_dict() for name in students}
    return result


def energy(
    models: list[str],
    /,
    *,
    context: int = 512,
    spikes: float | None = None,
    nonzero: float | None = None,
    text: str | None = None,
    tokens: int = 4096,
    tables: list[str] | None = None,
    averaging: Literal["decode", "prefill"] = "decode",
) -> Result:
    """Modelled energy per token: compute only, and compute plus memory, in several cost tables.

    Args:
        models: LLaMA teachers or MAR folders.
        context: tokens of context.
        spikes: assumed mean spikes per input (r·T) of spiking models.
        nonzero: assumed share of non-zero inputs.
        text: instead of assuming, measure the rates on this text.
        tokens: how much of it.
        tables: 45nm-fp32 (the paper's), 45nm-fp16, 45nm-int8.
        averaging: a token decoded at this context, or the mean over a prefill of this length.
    """
    from transformers import AutoConfig

    from mar.costs import compare
    from mar.spikes import SiteRate
    from mar.teachers import load_teacher

    pairs: dict[str, Any] = {}
    labels = {}
    for name in models:
        folder = Path(name)
        is_folder = (folder / "config.json").is_file()
        config = AutoConfig.from_pretrained(folder) if is_folder else load_teacher(name).model.config
        rates = None
        labels[name] = "no neurons"
        if getattr(config, "neurons", None):
            if text is not None:
                rates = _count_spikes(name, text, tokens)
                labels[name] = f"rates measured on {text}"
            elif spikes is not None:
                assumed = SiteRate(spikes, nonzero if nonzero is not None else min(1.0, spikes))
                rates = dict.fromkeys(config.neurons, assumed)
                labels[name] = "rates assumed"
            else:
                raise ValueError(f"{name} has neurons; give --text to measure their rates, or --spikes to assume them.")
        pairs[name] = (config, rates)
    return {
        "label": "modelled, µJ per token",
        "context": context,
        "averaging": averaging,
        "rates": labels,
        "models": compare(pairs, context, tables or ("45nm-fp32", "45nm-int8"), averaging),
    }


def spikes(model: Path, text: str, /, *, tokens: int = 4096) -> Result:
    """Count the spikes of a spiking model on a text, per layer and site.

    Args:
        model: spiking MAR folder.
        text: file or folder of text.
        tokens: how much of it.
    """
    return _count_spikes(model, text, tokens).to_dict()


def _count_spikes(model: str | Path, text: str, tokens: int) -> SpikeReport:
    from mar.data import PackedRows
    from mar.folder import load_student, load_tokenizer
    from mar.results import spike_rates
    from mar.sources import DataConfig

    student = load_student(model)
    rows = PackedRows(DataConfig(source=text, length=min(512, tokens)), load_tokenizer(model))
    return spike_rates(student, next(iter(rows.batches(max(1, tokens // rows.length)))), text)


def generate(model: str, prompt: str, /, *, tokens: int = 100, temperature: float = 0.7, seed: int = 0) -> Result:
    """Continue a prompt.

    Args:
        model: MAR folder or LLaMA teacher.
        prompt: text; a chat turn where the tokenizer has a template.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
    """
    from mar.folder import load
    from mar.generate import prompt_ids, stream

    network, tokenizer = load(model)
    ids = list(
        stream(network, prompt_ids(tokenizer, prompt), max_new_tokens=tokens, temperature=temperature, seed=seed)
    )
    text = tokenizer.decode(ids, skip_special_tokens=True)
    print(text, file=sys.stderr)
    return {"text": text, "tokens": len(ids)}


def chat(model: str, /, *, tokens: int = 200, temperature: float = 0.7, seed: int = 0) -> Result:
    """Talk with a model; its state is kept over turns. An empty line or Ctrl-D ends.

    Args:
        model: MAR folder or LLaMA teacher.
        tokens: most tokens a reply.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
    """
    from mar.folder import load
    from mar.generate import Session

    network, tokenizer = load(model)
    session = Session(network, tokenizer, temperature=temperature, seed=seed)
    turns = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return {"turns": turns}
        for piece in session.reply(line, max_new_tokens=tokens):
            print(piece, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        turns += 1


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


def info() -> Result:
    """Versions, CPU features, and the chosen backend of every op with its reason."""
    import torch

    from mar import kernels

    features: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
        features = [flag for flag in wanted if flags and flag in flags.group(1).split()]
    return {
        "versions": {name: version(name) for name in ("mar", "torch", "transformers", "accelerate")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_features": features,
        "backends": kernels.backends(),
    }
