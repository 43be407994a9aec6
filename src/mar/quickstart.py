"""The main job, start to finish: a recipe refined, its students measured, a table, samples and one HTML report.

Does: say beforehand what it takes, run, measure, write results.json and report.html. Does not: compute figures
(mar.results) or draw (mar.report).
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mar.census import parameters
from mar.checkpoint import write_json_atomically
from mar.folder import load_student
from mar.precision import matmul_rates, resolve_precision
from mar.processes import this_process
from mar.quiet import say
from mar.recipe import Recipe, debug_size, read_recipe
from mar.refinement import refine
from mar.report import ModelRow, QuickReport, html_report, terminal_table
from mar.results import evaluation_rows, measure, sample
from mar.teachers import Teacher, load_teacher

SAMPLE_PROMPT = "Give me three tips for a good night's sleep."

NOTES = [
    "Perplexity, KL, agreement and spike rates are measured on the held-out text; energy is modelled from operation "
    "counts and the measured spike rates (45nm-fp32 table, compute only), not measured.",
    "Energy figures leave out data movement, which flatters spiking models; `mar energy` shows them with it.",
    "The budget is small: these students show that the path works, not what the method can reach.",
]


def quickstart(output: Path, minutes: float = 10.0, debug: bool = False) -> dict[str, Any]:
    """Run the recipe `quickstart` in `output`, its token budgets scaled by minutes / 10, and report on it."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}; give a number above 0.")
    recipe = read_recipe("quickstart")
    for stage in recipe.stages.values():
        stage.train = replace(stage.train, tokens=max(1, round(stage.train.tokens * minutes / 10)))
    # What is measured on shrinks with a shorter run, but does not grow with a longer one.
    kept = min(1.0, minutes / 10) * recipe.writing.held_out_tokens
    recipe.writing = replace(
        recipe.writing,
        tokens=max(1, round(recipe.writing.tokens * minutes / 10)),
        held_out_tokens=max(recipe.data.length, round(kept)),
    )
    return refine_and_measure(debug_size(recipe) if debug else recipe, output)


def refine_and_measure(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Refine, measure, write results.json and report.html into `output`, print the table; returns the figures.

    Of several processes the main one alone measures; the others have no figures to return.
    """
    started = time.monotonic()
    process = this_process()
    with process.main_process_first():
        teacher = load_teacher(recipe.teacher)
    # Agreed on by all processes, so before the others leave.
    precision = resolve_precision("auto", process.device)  # type: ignore[arg-type]

    def begin() -> None:
        if process.is_main_process:
            announce(recipe, output, teacher)

    # Text that is there already is read before the hours of training, because it may turn out to be missing or short.
    written_first = recipe.data.source == "teacher" and recipe.evaluation.data is None
    held_out = None if written_first else evaluation_rows(recipe, output, teacher)
    refined = refine(recipe, output, teacher, begin=begin)
    if not process.is_main_process:
        return {}
    students = {name: load_student(folder) for name, folder in refined.students.items()}
    for student in students.values():
        student.to(process.device)  # type: ignore[arg-type]
    rows, text = held_out or evaluation_rows(recipe, output, teacher)
    say(f"Measuring on {rows['input_ids'].numel():,} tokens of {text}.")
    figures = measure(students, teacher, rows, text, precision=precision)
    models: dict[str, Any] = {"teacher": teacher.model, **students}
    figures["samples"] = {name: sample(model, teacher.tokenizer, SAMPLE_PROMPT) for name, model in models.items()}
    figures["folders"] = {name: str(folder) for name, folder in refined.students.items()}
    figures["stages"] = refined.metrics
    figures["minutes_this_run"] = (time.monotonic() - started) / 60
    report = quick_report(recipe, output, teacher, figures)
    write_json_atomically(output / "results.json", {"report": report.to_dict(), "figures": figures})
    return {**figures, **write_report(output)}


def write_report(folder: Path) -> dict[str, Any]:
    """report.html from the folder's results.json; prints the table and the samples to stderr."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json; run `mar refine` or `mar quickstart` into it first.")
    try:
        report = QuickReport.from_dict(json.loads(path.read_text(encoding="utf-8"))["report"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run the recipe into {folder} again.") from error
    html_report(report, folder / "report.html")
    console = Console(stderr=True)
    console.print(terminal_table(report))
    for name, text in report.samples.items():
        console.print(f"[bold]{name}[/bold] · {SAMPLE_PROMPT}")
        console.print(text.strip(), markup=False)
    say(f"Report: {folder / 'report.html'}")
    return {"report": str(folder / "report.html")}


def quick_report(recipe: Recipe, output: Path, teacher: Teacher, figures: dict[str, Any]) -> QuickReport:
    """The report's content, from figures as `mar.results.measure` gives them."""
    held_out, energy = figures["held_out"], figures["energy"]
    first = next(iter(held_out.values()))
    rows = [
        ModelRow(
            name="teacher",
            parameters=figures["parameters"]["teacher"],
            perplexity=first["teacher_ppl"]["value"],
            kl=None,
            against=None,
            agreement=None,
            spikes_per_input=None,
            nonzero=None,
            energy_decoder_uj=energy["teacher"]["decoder_uj"],
            energy_total_uj=energy["teacher"]["with_head_uj"],
        )
    ]
    for name, figure in held_out.items():
        totals = figures["spikes"].get(name, {}).get("totals", {})
        rows.append(
            ModelRow(
                name=name,
                parameters=figures["parameters"][name],
                perplexity=figure["ppl"]["value"],
                kl=figure["kl"]["value"],
                against=figure["against"],
                agreement=figure["agreement"]["value"],
                spikes_per_input=totals.get("spikes_per_mac"),
                nonzero=totals.get("nonzero_per_mac"),
                energy_decoder_uj=energy[name]["decoder_uj"],
                energy_total_uj=energy[name]["with_head_uj"],
            )
        )
    logs = {
        path.parent.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(output.glob("*/training/log.jsonl"))
    }
    grids = figures["rate_grids"]
    return QuickReport(
        title=f"MAR: {recipe.name}",
        recipe_yaml=yaml.safe_dump(json.loads(json.dumps(asdict(recipe))), sort_keys=False),
        environment=environment(figures["minutes_this_run"]),
        rows=rows,
        stage_logs=logs,
        rates=next(iter(grids.values()))["spikes"] if grids else [],
        energy_curves={
            name: (curve["contexts"], curve["decoder_uj"]) for name, curve in figures["energy_curves"].items()
        },
        samples=figures["samples"],
        notes=[f"The teacher: {teacher.source.get('note', teacher.source['kind'])}.", *NOTES],
    )


def environment(minutes: float) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "minutes of the last run": round(minutes, 1),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mar", "torch", "transformers")},
    }


def announce(recipe: Recipe, output: Path, teacher: Teacher) -> None:
    """Say what the run will take: minutes estimated from a matrix-product probe, disk and memory from the shapes."""
    size = parameters(teacher.model.config)
    disk = size * 4 * (2 + len(recipe.stages)) + size * 12
    memory = size * 4 * 7 + 2e9
    minutes = estimate_minutes(recipe, size, output)
    free = shutil.disk_usage(output if output.exists() else Path.cwd()).free
    if free < disk:
        raise OSError(f"The run needs about {disk / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free; make room.")
    say(
        f"{recipe.name}: about {minutes:.0f} minutes to go on this machine (estimated), {disk / 1e9:.1f} GB of disk, "
        f"{memory / 1e9:.1f} GB of memory. Results go to {output}. Ctrl-C stops; the same command goes on."
    )


WORK = {"orient": 8, "align": 6, "distill": 11, "spike_align": 12, "spike": 12}
"""Floating-point operations per token and parameter of a stage, forward and backward, teacher included; estimated."""

EFFICIENCY = 0.6
"""Share of the rate of `mar.precision.matmul_rates` that whole steps reach; estimated from docs/results.md."""


def estimate_minutes(recipe: Recipe, size: int, folder: Path) -> float:
    """Minutes that what the run in `folder` has not done yet will take, at the rate of a short matrix-product probe."""
    process = this_process()
    device: Any = process.device
    rates = matmul_rates(device.type)
    seconds = 0.0

    def add(kind: str, tokens: float, precision: str) -> None:
        nonlocal seconds
        rate = rates[resolve_precision(precision, device)] * 1e9 * EFFICIENCY
        seconds += WORK[kind] * size * max(0.0, tokens) / rate

    for name, stage in recipe.stages.items():
        done = max((_tokens_trained(log) for log in folder.glob(f"*-{name}/training/log.jsonl")), default=0)
        add(stage.kind, (stage.train.tokens - done) / process.num_processes, stage.train.precision)
    if recipe.data.source == "teacher":
        # Decoding is bound by memory: measured, a written token takes about as long as an aligned one.
        wanted = recipe.writing
        written = len(list(folder.glob("text/*/part-*.parquet"))) * wanted.batch_size * wanted.length
        written += sum(int(path.name.removeprefix("step-")) for path in folder.glob("text/*/*.draft/step-*"))
        add("align", wanted.tokens + wanted.held_out_tokens - written, "auto")
    return seconds / 60 + 1


def _tokens_trained(log: Path) -> int:
    """By the log's last whole line; of a damaged one, nothing: the run itself says what is wrong with it."""
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0].splitlines()
    try:
        return int(json.loads(lines[-1])["tokens"])
    except (IndexError, ValueError, TypeError, KeyError):
        return 0
