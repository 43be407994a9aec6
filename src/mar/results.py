"""What a refined model is worth, in one dictionary: held-out figures, spike rates, modelled energy, samples.

Does: measure teacher and students on the same rows and shape the figures for a table, JSON and the report. Does not:
train, or draw (mar.report).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mar.adapter import EngineModel
from mar.census import census, parameters
from mar.costs import cost, curve
from mar.data import PackedRows
from mar.evaluate import HeldOut, held_out
from mar.generate import prompt_ids, stream
from mar.model import MarForCausalLM
from mar.recipe import Recipe
from mar.spikes import SpikeMonitor, SpikeReport
from mar.teachers import Teacher

CONTEXTS = tuple(2**power for power in range(6, 16))
"""Sequence lengths at which energy is modelled: 64 to 32,768 tokens."""


def evaluation_rows(recipe: Recipe, folder: Path, teacher: Teacher) -> tuple[dict[str, Tensor], str]:
    """Held-out rows as the recipe's `evaluation` asks, (windows, window) each, and the name of their text."""
    wanted = recipe.evaluation
    data = wanted.data
    if data is None:
        if recipe.data.source == "teacher":
            data = replace(recipe.data, source=str(folder / "text" / "held_out"))
        elif recipe.data.split == "train":
            data = replace(recipe.data, split="held_out")
        else:
            raise ValueError(
                "The recipe has no text to measure on; set evaluation.data, or set data.split to 'train', which keeps "
                "documents aside for that."
            )
    rows = PackedRows(
        replace(data, length=wanted.window, shuffle=False),
        teacher.tokenizer,
        epochs=1,
        vocab_size=teacher.model.config.vocab_size,
    )
    kept = [row for row, _ in zip(rows, range(max(1, wanted.tokens // wanted.window)), strict=False)]
    if not kept:
        raise ValueError(f"The held-out text gives no row of {wanted.window} tokens; shorten evaluation.window.")
    name = str(data.source) if data.split == "all" else f"the documents of {data.source} held out from training"
    if recipe.data.source == "teacher" and wanted.data is None:
        name = "text written by the teacher from unseen prompts"
    return {key: torch.stack([row[key] for row in kept]) for key in kept[0]}, name


def spike_rates(model: MarForCausalLM, rows: Mapping[str, Tensor], text: str, batch: int = 4) -> SpikeReport:
    """Counted spikes of a spiking model on rows of token ids."""
    device = model.device
    with SpikeMonitor(model, text=text) as monitor, torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(rows["input_ids"]), batch):
            part = {key: value[start : start + batch].to(device) for key, value in rows.items()}
            model.model(input_ids=part["input_ids"], document_ids=part["document_ids"], use_cache=False)
    return monitor.summary()


def measure(
    students: Mapping[str, MarForCausalLM | EngineModel],
    teacher: Teacher,
    rows: Mapping[str, Tensor],
    text: str,
    context: int = 512,
    precision: str = "bf16",
) -> dict[str, Any]:
    """Figures of teacher and students as plain numbers: `held_out`, `spikes`, `energy` (modelled) and `parameters`.

    context: tokens of context at which energy per decoded token is modelled (45nm-fp32, compute only).
    precision: of the models while they are measured, `fp32` or `bf16` autocast.
    """
    against = teacher.source["name"]
    with ExitStack() as stack:
        # The spikes are counted in the same pass that measures the models.
        monitors = {
            name: stack.enter_context(SpikeMonitor(model, text=text))
            for name, model in students.items()
            if isinstance(model, MarForCausalLM) and model.config.neurons is not None
        }
        engines = {name: model for name, model in students.items() if isinstance(model, EngineModel)}
        for model in engines.values():
            model.reset()
        figures: dict[str, HeldOut] = held_out(
            students,
            teacher.model,
            rows["input_ids"],
            window=rows["input_ids"].shape[1],
            document_ids=rows["document_ids"],
            precision=precision,
            text=text,
            against=against,
        )
    reports = {name: monitor.summary() for name, monitor in monitors.items()}
    counted = {
        name: {"text": text, **model.engine.counters(), "totals": model.rates_per_mac()}
        for name, model in engines.items()
        if model.rates()
    }
    models: dict[str, Any] = {"teacher": teacher.model, **students}
    energy, curves = {}, {}
    for name, model in models.items():
        measured = engines[name].rates() if name in counted else reports.get(name)
        report = cost(census(model.config, context, measured))
        energy[name] = {"decoder_uj": report.decoder, "with_head_uj": report.with_head, "context": context}
        costs = curve(model.config, CONTEXTS, measured)
        curves[name] = {"contexts": list(CONTEXTS), "decoder_uj": [one.decoder for one in costs]}
    return {
        "text": text,
        "against": against,
        "held_out": {name: figure.to_dict() for name, figure in figures.items()},
        "spikes": {name: report.to_dict() for name, report in reports.items()} | counted,
        "energy_label": "modelled (45nm-fp32, compute only), spike rates measured on the held-out text",
        "energy": energy,
        "energy_curves": curves,
        "rate_grids": {
            name: {"spikes": report.grid("spikes_per_element"), "nonzero": report.grid("nonzero_share")}
            for name, report in reports.items()
        },
        "parameters": {name: parameters(model.config) for name, model in models.items()},
    }


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = 80) -> str:
    """A continuation of `prompt` as a chat turn where the tokenizer has a template; temperature 0.7, seed 0."""
    ids = prompt_ids(tokenizer, prompt)
    written = list(stream(model, ids, max_new_tokens=tokens, temperature=0.7, seed=0))
    return str(tokenizer.decode(written, skip_special_tokens=True))
