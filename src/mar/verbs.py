"""What each verb of the command line does, as plain functions from settings to figures.

Does: load, call the library, return JSON-ready figures. Does not: parse or print results (mar.cli). Heavy modules are
imported inside the verbs, so that `mar --help` is quick.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def convert(
    source: str, output: Path, preset: str = "fast", init: str = "attention", text: str | None = None
) -> Result:
    """Turn a LLaMA (or a published Llamba folder) into a dense MAR folder.

    Args:
        source: teacher name, hub id, LLaMA folder, GGUF file, or Llamba folder.
        output: folder to write.
        preset: mixer choices, `fast` or `llamba` (as published).
        init: `attention` starts from the attention weights, `llamba` at random.
        text: file or folder of text; with it decays and scales are calibrated on its first rows.
    """
    from mar.conversion import calibrate_mixers, convert_llama, convert_llamba
    from mar.data import PackedRows
    from mar.folder import save_student
    from mar.sources import DataConfig
    from mar.teachers import load_teacher

    config = Path(source) / "config.json"
    if config.is_file() and "ssm_cfg" in json.loads(config.read_text()):
        from transformers import AutoTokenizer

        student = convert_llamba(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        origin: dict[str, Any] = {"kind": "llamba", "name": source}
    else:
        teacher = load_teacher(source)
        student = convert_llama(teacher.model, preset, init)
        tokenizer, origin = teacher.tokenizer, teacher.source
        if text is not None:
            rows = PackedRows(DataConfig(source=text), tokenizer)
            calibrate_mixers(student, teacher.model, next(iter(rows.batches(4))))
    save_student(student, tokenizer, output, {"step": "convert", "teacher": origin, "tokens": 0, "metrics": {}})
    return {"folder": str(output), "parameters": student.num_parameters()}


def refine(recipe: str, output: Path, debug: bool = False, overrides: list[str] | None = None) -> Result:
    """Run a whole recipe, from teacher to measured students; the same command goes on after a stop.

    Args:
        recipe: a YAML file or the name of a shipped recipe. Dotted options change it: --stages.align.train.tokens=1000
        output: the run's folder.
        debug: cut every budget to two small steps.
        overrides: dotted settings, as `stages.align.train.tokens=1000`.
    """
    from mar.quickstart import refine_and_measure
    from mar.recipe import debug_size, read_recipe

    settings = read_recipe(recipe, overrides)
    return refine_and_measure(debug_size(settings) if debug else settings, output)


def train(
    kind: str,
    student: Path,
    teacher: str,
    text: str,
    output: Path,
    tokens: int = 100_000,
    lr: float = 5e-4,
    batch_size: int = 4,
    length: int = 512,
    alpha: float | None = None,
    beta: float | None = None,
    features: str | None = None,
    trained: str | None = None,
    energy_target: float | None = None,
) -> Result:
    """Train one stage on an existing student folder.

    Args:
        kind: orient, align, distill, spike_align or spike.
        student: MAR folder; for spike_align and spike one with neurons.
        teacher: LLaMA (name, hub id, folder, GGUF), or for spike_align and spike the dense MAR folder.
        text: training text: file, folder, glob, or a hub data set as hub:owner/name.
        output: folder to write; training state lies in its `training`.
        tokens: budget.
        lr: peak learning rate.
        batch_size: rows a step.
        length: tokens a row.
        alpha: weight of KL(teacher || student), for distill and spike.
        beta: weight of KL(student || teacher), for distill and spike.
        features: pre, post, both or none, for spike.
        trained: parameter set, for distill and spike.
        energy_target: MAC-weighted spikes per input to steer to, for spike.
    """
    from mar.data import PackedRows
    from mar.folder import digest, load_student, save_student
    from mar.optimizer import TrainConfig
    from mar.recipe import SPIKING, StageConfig
    from mar.refinement import build_objective
    from mar.sources import DataConfig
    from mar.teachers import load_teacher
    from mar.train import train as run

    config = TrainConfig(tokens=tokens, lr=lr, batch_size=batch_size)
    is_mar = (Path(teacher) / "config.json").is_file() and (
        json.loads((Path(teacher) / "config.json").read_text()).get("model_type") == "mar"
    )
    if kind in SPIKING[:1] and not is_mar:
        raise ValueError(
            f"{kind} compares with the dense student; give its MAR folder as the teacher, not {teacher!r}."
        )
    model = load_student(student).train()
    stage = StageConfig(
        kind=kind,  # type: ignore[arg-type]
        train=config,
        teacher=None if is_mar or kind != "spike" else "llama",
        alpha=alpha,
        beta=beta,
        features=features,
        trained=trained,
        energy_target=energy_target,
    )
    dense = load_student(teacher) if is_mar else None
    llama = None if is_mar else load_teacher(teacher).model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    data = DataConfig(source=text, length=length)
    settings = {"student": digest(student), "teacher": teacher, "kind": kind, "alpha": alpha, "beta": beta}
    metrics = run(
        build_objective(stage, model, llama, dense),
        PackedRows(data, tokenizer, vocab_size=model.config.vocab_size),
        config,
        output / "training",
        recipe={**settings, "features": features, "trained": trained, "energy_target": energy_target},
    )
    origin = {"kind": "folder", "name": str(student)}
    save_student(
        model.eval(), tokenizer, output, {"step": kind, "teacher": origin, "tokens": tokens, "metrics": metrics}
    )
    return {"folder": str(output), **metrics}


def evaluate(
    models: list[Path],
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
    from dataclasses import replace

    from mar.evaluate import compare_tasks, run_tasks
    from mar.folder import load_student
    from mar.recipe import EvaluationSettings, Recipe
    from mar.results import evaluation_rows, measure
    from mar.sources import DataConfig
    from mar.teachers import load_teacher

    if text is None and not tasks:
        raise ValueError("There is nothing to evaluate on; give --text, --tasks or both.")
    source = load_teacher(teacher)
    students = {folder.name: load_student(folder) for folder in models}
    result: Result = {}
    if text is not None:
        data = DataConfig(source=text)
        recipe = Recipe("eval", teacher, data, {}, evaluation=EvaluationSettings(replace(data), tokens, window))
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
    context: int = 512,
    spikes: float | None = None,
    nonzero: float | None = None,
    text: str | None = None,
    tables: list[str] | None = None,
    averaging: str = "decode",
) -> Result:
    """Modelled energy per token: compute only, and compute plus memory, in several cost tables.

    Args:
        models: LLaMA teachers or MAR folders.
        context: tokens of context.
        spikes: assumed mean spikes per input (r·T) of spiking models.
        nonzero: assumed share of non-zero inputs.
        text: instead of assuming, measure the rates on this text.
        tables: 45nm-fp32 (the paper's), 45nm-fp16, 45nm-int8.
        averaging: decode (a token at this context) or prefill (mean over a prefill of this length).
    """
    from transformers import AutoConfig, AutoTokenizer

    from mar.config import SITES
    from mar.costs import compare
    from mar.data import PackedRows
    from mar.folder import load_student
    from mar.results import spike_rates
    from mar.sources import DataConfig
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
                rows = PackedRows(DataConfig(source=text), AutoTokenizer.from_pretrained(folder), epochs=1)
                rates = spike_rates(load_student(folder), next(iter(rows.batches(8))), text).rates()
                labels[name] = f"rates measured on {text}"
            elif spikes is not None:
                rates = {site: SiteRate(spikes, nonzero if nonzero is not None else min(1.0, spikes)) for site in SITES}
                rates = {site: rates[site] for site in config.neurons}
                labels[name] = "rates assumed"
            else:
                raise ValueError(f"{name} has neurons; give --text to measure their rates, or --spikes to assume them.")
        pairs[name] = (config, rates)
    options = {} if tables is None else {"tables": tables}
    return {
        "label": "modelled, µJ per token",
        "context": context,
        "averaging": averaging,
        "rates": labels,
        "models": compare(pairs, context, averaging=averaging, **options),
    }


def spikes(model: Path, text: str, tokens: int = 4096) -> Result:
    """Count the spikes of a spiking model on a text, per layer and site.

    Args:
        model: spiking MAR folder.
        text: file or folder of text.
        tokens: how much of it.
    """
    from transformers import AutoTokenizer

    from mar.data import PackedRows
    from mar.folder import load_student
    from mar.results import spike_rates
    from mar.sources import DataConfig

    rows = PackedRows(DataConfig(source=text, length=min(512, tokens)), AutoTokenizer.from_pretrained(model))
    batch = next(iter(rows.batches(max(1, tokens // rows.length))))
    return spike_rates(load_student(model), batch, text).to_dict()


def generate(model: str, prompt: str, tokens: int = 100, temperature: float = 0.7, seed: int = 0) -> Result:
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


def chat(model: str, tokens: int = 200, temperature: float = 0.7, seed: int = 0) -> Result:
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


def quickstart(output: Path = Path("runs/quickstart"), minutes: float = 10.0, debug: bool = False) -> Result:
    """Refine SmolLM2-135M into a small spiking model on text that it writes itself, and report on it.

    Args:
        output: the run's folder; the same command goes on after a stop.
        minutes: the one dial: budgets scale with it.
        debug: two small steps a stage.
    """
    from mar.quickstart import quickstart as run

    return run(output, minutes, debug)


def report(folder: Path) -> Result:
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
