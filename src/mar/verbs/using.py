"""Verbs that use models and write nothing: eval, energy, spikes, generate, chat, info."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mar.verbs.making import Result
from mar.weights import require_mar

if TYPE_CHECKING:
    from mar.spikes import SpikeReport

EngineName = Literal["torch", "native"]
Precision = Literal["fp32", "bf16", "int8", "int4"]

MOST_THREADS = 256
"""As the native engine has it."""


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
    engine: EngineName = "torch",
    precision: Precision | None = None,
    threads: int | None = None,
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
        engine: what runs the students; torch always runs the teacher.
        precision: with torch fp32 (the default) or bf16 autocast, faster and a little off; with native that of the
            weights (default: a compact folder's own, else int8), the teacher in fp32.
        threads: of the CPU (default: as many as this process may use).
        seed: of items and bootstrap.
    """
    if text is None and not tasks:
        raise ValueError("There is nothing to evaluate on; give --text, --tasks or both.")
    for folder in models:
        require_mar(folder)
    _check_threads(threads)
    from mar.evaluate import compare_tasks, run_tasks
    from mar.processes import this_process
    from mar.recipe import EvaluationSettings, Recipe
    from mar.results import evaluation_rows, measure
    from mar.sources import DataConfig
    from mar.teachers import load_teacher

    _set_threads(threads)
    source = load_teacher(teacher)
    students = {str(folder): _student(folder, engine, precision, threads) for folder in models}
    autocast = precision if precision and engine == "torch" else "fp32"
    networks: list[Any] = [source.model, *students.values()]
    for network in networks:
        network.to(this_process().device)
    result: Result = {}
    if text is not None:
        data = DataConfig(source=text)
        recipe = Recipe("eval", teacher, data, {}, evaluation=EvaluationSettings(data, tokens, window))
        rows, name = evaluation_rows(recipe, Path(), source)
        result.update(measure(students, source, rows, name, precision=autocast))
    if tasks:
        pairs: dict[str, Any] = {"teacher": (source.model, source.tokenizer)}
        pairs.update({name: (model, source.tokenizer) for name, model in students.items()})
        outcome = run_tasks(pairs, tasks, data_dir=data_dir, limit=limit, seed=seed, precision=autocast)
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
    from mar.weights import model_type

    pairs: dict[str, Any] = {}
    labels = {}
    for name in models:
        folder = Path(name)
        is_folder = (folder / "config.json").is_file()
        if is_folder and not isinstance(model_type(folder), str):
            raise ValueError(f"{folder / 'config.json'} names no model_type; restore it.")
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
    require_mar(model)
    return _count_spikes(model, text, tokens).to_dict()


def _count_spikes(model: str | Path, text: str, tokens: int) -> SpikeReport:
    from mar.data import PackedRows
    from mar.folder import load_student, load_tokenizer
    from mar.results import spike_rates
    from mar.sources import DataConfig
    from mar.steps import say_if_short

    student = load_student(model)
    rows = PackedRows(DataConfig(source=text, length=min(512, tokens)), load_tokenizer(model))
    batch = next(iter(rows.batches(max(1, tokens // rows.length))))
    say_if_short(rows, text, tokens)
    return spike_rates(student, batch, text)


def generate(
    model: str,
    prompt: str,
    /,
    *,
    tokens: int = 100,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    engine: EngineName = "torch",
    precision: Precision | None = None,
    threads: int | None = None,
) -> Result:
    """Continue a prompt.

    Args:
        model: MAR folder or LLaMA teacher.
        prompt: text, after a lone -- if it starts with a dash; a chat turn where the tokenizer has a template.
        tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have so much probability together.
        top_k: draw among so many likeliest tokens (default: all).
        seed: of the sampling.
        engine: torch, or native, which takes MAR folders and says what it counted.
        precision: of the native engine's weights (default: a compact folder's own, else int8).
        threads: of the CPU (default: as many as this process may use).
    """
    network, tokenizer = _load(model, engine, precision, threads)
    from mar.generate import prompt_ids, stream

    ids = list(stream(network, prompt_ids(tokenizer, prompt), tokens, temperature, top_p, top_k, seed=seed))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"text": text, "tokens": len(ids), **_say_usage(network)}


def chat(
    model: str,
    /,
    *,
    tokens: int = 200,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    engine: EngineName = "torch",
    precision: Precision | None = None,
    threads: int | None = None,
) -> Result:
    """Talk with a model; its state is kept over turns. An empty line or Ctrl-D ends.

    Args:
        model: MAR folder or LLaMA teacher.
        tokens: most tokens a reply.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have so much probability together.
        top_k: draw among so many likeliest tokens (default: all).
        seed: of the sampling.
        engine: torch, or native, which takes MAR folders and says what it counted in each turn.
        precision: of the native engine's weights (default: a compact folder's own, else int8).
        threads: of the CPU (default: as many as this process may use).
    """
    print(f"Reading {model}. An empty line or Ctrl-D ends.", file=sys.stderr, flush=True)
    network, tokenizer = _load(model, engine, precision, threads)
    from mar.generate import Session

    session = Session(network, tokenizer, temperature, top_p, top_k, seed)
    turns = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return {"turns": turns}
        for piece in session.reply(line, max_new_tokens=tokens):
            print(piece, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        _say_usage(network)
        turns += 1


def _load(name: str, engine: EngineName, precision: Precision | None, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer, of a MAR folder or with torch of a teacher too."""
    _check_threads(threads)
    if engine == "native":
        from mar.adapter import load_engine

        return load_engine(name, precision, threads)
    if precision not in (None, "fp32"):
        raise ValueError(f"precision is {precision!r}, but torch writes in fp32; leave it out or use --engine native.")
    from mar.folder import load

    _set_threads(threads)
    return load(name)


def _student(folder: Path, engine: EngineName, precision: Precision | None, threads: int | None) -> Any:
    """A MAR folder's model for `evaluate`."""
    if engine == "native":
        return _load(str(folder), engine, precision, threads)[0]
    if precision in ("int8", "int4"):
        raise ValueError(f"precision is {precision!r}, which torch has not; use fp32, bf16, or --engine native.")
    from mar.folder import load_student

    return load_student(folder)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads}; use 1 to {MOST_THREADS}.")


def _say_usage(model: Any) -> dict[str, float]:
    """What the native engine counted since the last call, which is also said in one line; {} for torch."""
    from mar.adapter import EngineModel

    if not isinstance(model, EngineModel):
        return {}
    usage = model.usage()
    words = {
        "tokens_per_s": "{:.4g} tokens/s",
        "spikes_per_mac": "{:.3g} spikes per input",
        "nonzero_per_mac": "{:.1%} of the inputs not zero",
        "energy_uj": "modelled energy {:.4g} µJ per token with the head (45nm-fp32, compute only)",
    }
    print(f"[{', '.join(text.format(usage[name]) for name, text in words.items() if name in usage)}]", file=sys.stderr)
    model.reset()
    return usage


def info() -> Result:
    """Versions, CPU features, the faster precision to train in, the native core's variant, every op's backend."""
    import torch

    from mar import kernels
    from mar.kernels import native
    from mar.precision import faster_precision, matmul_rates

    core: dict[str, Any] = {"name": None, "reason": native.REASON, "features": []}
    if native.core is not None:
        core = native.core.variant()
    features: list[str] = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
        wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
        features = [flag for flag in wanted if flags and flag in flags.group(1).split()]
    per_second = ", ".join(f"{rate:.0f} in {name}" for name, rate in matmul_rates("cpu").items())
    return {
        "versions": {name: version(name) for name in ("mar", "torch", "transformers", "accelerate")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_features": features,
        "training": f"{faster_precision('cpu')}: matrix products at {per_second} GFLOP/s",
        "native": core | {"features": " ".join(core["features"])},
        "backends": kernels.backends(),
    }
