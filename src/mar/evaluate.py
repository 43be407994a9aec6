"""What a student kept of its teacher: perplexity, KL and agreement on held-out text, and paired task results.

Does: measure several students against one teacher, and put a bootstrap interval on every figure. Does not: run the
tasks themselves (mar.tasks), train, or print (mar.report).

Every interval is the central 95 % of bootstrap resamples over whole windows or items. Student and teacher are always
resampled together, so what is hard for both does not widen the interval of their difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mar.adapter import EngineModel
from mar.layers import last_hidden
from mar.losses import IGNORE_LABEL, compare_hidden
from mar.tasks import PAPER_METRICS, TaskResults, autocast_dtype, evaluation_mode, generator, run_tasks

__all__ = [
    "Comparison",
    "Estimate",
    "HeldOut",
    "TaskComparison",
    "compare_tasks",
    "held_out",
    "kept_above_chance",
    "resampled_means",
    "run_tasks",
]

KEPT_TASKS = ("hellaswag", "arc_easy", "piqa")
"""The tasks on which models of this size are above chance, over which `kept above chance` is averaged."""

_COLUMNS = ("student_nll", "teacher_nll", "kl", "reverse_kl", "agree", "valid")
_RESAMPLE_CELLS = 2**22  # counts held at once by `resampled_means`: 32 MB of 64-bit integers


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; all None, with a note that says why, where the figure is not defined."""

    value: float | None
    low: float | None
    high: float | None
    note: str = ""


@dataclass(frozen=True)
class HeldOut:
    """One student on held-out text.

    against: the teacher of both KLs and of the agreement. text: what was read, in `windows` windows of `window` tokens
    without overlap; all tokens but the first of a window, or of a document in a packed one, are predicted: `tokens` in
    all. kl: KL(teacher || student) and reverse_kl: KL(student || teacher), nats per token. agreement: share of tokens
    with the same top-1 prediction. ppl_ratio: student perplexity over teacher perplexity.
    """

    student: str
    against: str
    text: str
    window: int
    windows: int
    tokens: int
    precision: str
    ppl: Estimate
    teacher_ppl: Estimate
    ppl_ratio: Estimate
    kl: Estimate
    reverse_kl: Estimate
    agreement: Estimate

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per figure, for a table."""
        names = ("ppl", "teacher_ppl", "ppl_ratio", "kl", "reverse_kl", "agreement")
        head = {"student": self.student, "against": self.against}
        return [{**head, "figure": name, **asdict(getattr(self, name))} for name in names]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def held_out(
    students: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel,
    tokens: Int[Tensor, "tokens"] | Int[Tensor, "windows window"],
    window: int = 512,
    batch: int = 4,
    document_ids: Int[Tensor, "windows window"] | None = None,
    precision: str = "fp32",
    text: str = "held-out text",
    against: str = "teacher",
    resamples: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, HeldOut]:
    """Perplexity, KL and agreement of each student against `teacher`, whose forward is paid once.

    tokens: a token stream, cut into windows (a remainder shorter than `window` is left out), or rows that are windows
    already. document_ids: of packed rows; every model starts afresh with each document. precision: `fp32` runs the
    weights as they are, `bf16` under autocast; an engine has its own. text, against: names of the text and of the
    teacher, for the record. progress: called with windows done and windows in all. Logits exist only in chunks of
    `mar.losses.compare_hidden`.

    Raises ValueError for too few tokens, document_ids of another shape, ids outside the vocabulary, models of different
    vocabularies, and a model whose output is not finite.
    """
    rows = _windows(tokens, window, text)
    _check_vocabulary(students, teacher, rows, against)
    documents = torch.zeros_like(rows) if document_ids is None else document_ids
    labels = _labels(rows, documents, text)
    values = {name: np.empty((len(rows), len(_COLUMNS))) for name in students}
    autocast = _autocast(teacher.device, precision)
    with torch.no_grad(), evaluation_mode(teacher, *students.values()), autocast:
        for start in range(0, len(rows), batch):
            stop = min(start + batch, len(rows))
            part = {"input_ids": rows[start:stop], "document_ids": documents[start:stop], "labels": labels[start:stop]}
            inputs = {key: value.to(teacher.device) for key, value in part.items()}
            target = inputs.pop("labels").reshape(-1)
            expected = _hidden_and_head(teacher, inputs)
            for name, student in students.items():
                measured = _measured(student, inputs, *expected, target)
                columns = torch.stack([measured[key].double() * measured["valid"] for key in _COLUMNS], dim=-1)
                values[name][start:stop] = columns.view(stop - start, -1, len(_COLUMNS)).mean(1).cpu().numpy()
            if progress is not None:
                progress(stop, len(rows))
    results = {}
    for name, per_window in values.items():
        if not np.isfinite(per_window).all():
            raise ValueError(f"Student {name!r} or {against!r} gives values that are not finite; check its weights.")
        results[name] = HeldOut(
            student=name,
            against=against,
            text=text,
            window=rows.shape[1],
            windows=len(rows),
            tokens=int((labels != IGNORE_LABEL).sum()),
            precision=student.precision if isinstance(student := students[name], EngineModel) else precision,
            **_held_out_figures(per_window, generator(seed, text), resamples),
        )
    return results


def _windows(tokens: Tensor, window: int, text: str) -> Tensor:
    if tokens.dim() == 1:
        if window < 2:
            raise ValueError(f"window is {window}; it needs 2 tokens or more, because its first one is not predicted.")
        tokens = tokens[: len(tokens) // window * window].view(-1, window)
    if not tokens.numel() or tokens.shape[1] < 2:
        raise ValueError(f"{text} has too few tokens for one window of {window}; give more text or a smaller window.")
    return tokens


def _labels(rows: Tensor, documents: Tensor, text: str) -> Tensor:
    """Next tokens (windows, window - 1), none where the next token begins a document."""
    if documents.shape != rows.shape:
        raise ValueError(
            f"{text} has rows {tuple(rows.shape)} and document_ids {tuple(documents.shape)}; give one each."
        )
    labels = rows[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], IGNORE_LABEL)
    if bool((labels == IGNORE_LABEL).all()):
        raise ValueError(f"{text} has only documents of one token, none of which can be predicted; give longer ones.")
    return labels


def _check_vocabulary(
    students: Mapping[str, PreTrainedModel], teacher: PreTrainedModel, ids: Tensor, against: str
) -> None:
    size = teacher.config.vocab_size
    for name, student in students.items():
        if student.config.vocab_size != size:
            raise ValueError(
                f"Student {name!r} has {student.config.vocab_size} words and {against!r} has {size}; "
                "compare models of one vocabulary."
            )
    if not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"Token id {int(ids.max())} is outside a vocabulary of {size}; use the teacher's tokenizer.")


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = autocast_dtype(precision)
    return torch.autocast(device.type, dtype=getattr(torch, dtype) if dtype else None, enabled=dtype is not None)


def _measured(
    student: PreTrainedModel, inputs: dict[str, Tensor], hidden: Tensor, head: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """`compare_hidden` with the teacher's hidden states and head."""
    if not isinstance(student, EngineModel):
        return compare_hidden(*_hidden_and_head(student, inputs), hidden, head, labels)
    parts, start = [], 0
    for logits in student.logit_blocks(inputs["input_ids"], inputs["document_ids"]):
        part = slice(start, start + len(logits))
        parts.append(compare_hidden(logits.to(hidden.device), None, hidden[part], head, labels[part]))
        start = part.stop
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _hidden_and_head(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Final hidden states of all positions but the last, (batch * (window - 1), d), and the head (V, d)."""
    hidden = last_hidden(model, inputs)[:, :-1]
    return hidden.reshape(-1, hidden.shape[-1]), model.get_parameter("lm_head.weight")


def _held_out_figures(
    per_window: Float[np.ndarray, "windows columns"], rng: np.random.Generator, resamples: int
) -> dict[str, Any]:
    """The estimates of `HeldOut` from each window's means of `_COLUMNS` over all its positions."""
    point, means = per_window.mean(0), resampled_means(per_window, rng, resamples)
    # Windows differ in how many of their tokens are predicted, so a mean over tokens is a ratio of two means.
    student, teacher, kl, reverse_kl, agree = (np.append(means[:, k], point[k]) for k in range(5))
    valid = np.append(means[:, 5], point[5])

    def estimate(figure: np.ndarray) -> Estimate:
        if len(per_window) == 1:
            return Estimate(float(figure[-1]), None, None, "one window gives no interval")
        return _estimate(figure[-1], figure[:-1])

    return {
        "ppl": estimate(np.exp(student / valid)),
        "teacher_ppl": estimate(np.exp(teacher / valid)),
        "ppl_ratio": estimate(np.exp((student - teacher) / valid)),
        "kl": estimate(kl / valid),
        "reverse_kl": estimate(reverse_kl / valid),
        "agreement": estimate(agree / valid),
    }


def resampled_means(
    values: Float[np.ndarray, "items columns"], rng: np.random.Generator, resamples: int
) -> Float[np.ndarray, "resamples columns"]:
    """Column means of bootstrap resamples of the rows; one resample takes the same rows in every column."""
    items = len(values)
    means = np.empty((resamples, values.shape[1]))
    chunk = max(1, _RESAMPLE_CELLS // items)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, items, size=(size, items)) + items * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * items).reshape(size, items)
        means[start : start + size] = counts @ values / items
    return means


def _estimate(value: float | np.floating, resampled: np.ndarray) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class TaskComparison:
    """Student and teacher on the same items of one task, by one metric.

    in_table: whether the paper's table prints this metric. chance: expected score of a blind guess. majority: score of
    always giving the most frequent answer. difference: student - teacher. agreement: share of items where both choose
    the same answer, right or wrong. kept: (student - chance) / (teacher - chance).
    """

    task: str
    metric: str
    in_table: bool
    items: int
    chance: float
    majority: float
    student: Estimate
    teacher: Estimate
    difference: Estimate
    agreement: Estimate
    kept: Estimate


@dataclass(frozen=True)
class Comparison:
    """A student's paired task results against a teacher.

    kept: mean over HellaSwag, ARC-Easy (both normed) and PIQA of what the student kept above chance. student_mean,
    teacher_mean: the paper's six-task means, and retention: their ratio.
    """

    student: str
    against: str
    tasks: list[TaskComparison]
    kept: Estimate
    student_mean: Estimate
    teacher_mean: Estimate
    retention: Estimate
    resamples: int
    seed: int

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per task and metric, for a table; each estimate as value, `<name>_low` and `<name>_high`."""
        rows = []
        for entry in self.tasks:
            row: dict[str, Any] = {"model": self.student, "against": self.against}
            for name, value in asdict(entry).items():
                row |= _flat(name, value) if isinstance(value, dict) else {name: value}
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def _flat(name: str, estimate: dict[str, Any]) -> dict[str, Any]:
    return {name: estimate["value"], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}


def kept_above_chance(student: float, teacher: float, chance: float) -> float | None:
    """(student - chance) / (teacher - chance), or None where the teacher is not above chance."""
    return (student - chance) / (teacher - chance) if teacher > chance else None


def compare_tasks(
    results: TaskResults, student: str, against: str, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Item-by-item comparison of two models of `results` on every task and metric that was run.

    Ratios to the teacher are undefined, with a note, unless the teacher beats chance in every resample: near chance
    the denominator is noise. Raises ValueError for a model that was not run.
    """
    for task, models in results.items.items():
        for model in (student, against):
            if model not in models:
                raise ValueError(f"Model {model!r} was not run on {task}; run were {', '.join(models)}.")
    tasks, points, resampled = [], {}, {}
    for task in results.items:
        for metric in results.metrics(task):
            in_table = PAPER_METRICS[task] == metric
            scores = _paired_scores(results, task, metric, student, against)
            point, means = scores.mean(0), resampled_means(scores, generator(seed, task), resamples)
            tasks.append(_compare(results, task, metric, in_table, len(scores), point, means))
            if in_table:
                points[task], resampled[task] = point, means
    kept = _mean_kept({entry.task: entry for entry in tasks if entry.in_table}, resampled)
    student_mean, teacher_mean, retention = _six_task_means(points, resampled)
    return Comparison(student, against, tasks, kept, student_mean, teacher_mean, retention, resamples, seed)


def _paired_scores(results: TaskResults, task: str, metric: str, student: str, against: str) -> np.ndarray:
    """Columns student score, teacher score, same choice: (items, 3)."""
    scores = [results.scores(task, model, metric) for model in (student, against)]
    choices = [results.predictions(task, model, metric) for model in (student, against)]
    return np.stack([*scores, choices[0] == choices[1]], axis=1)


def _compare(
    results: TaskResults, task: str, metric: str, in_table: bool, items: int, point: np.ndarray, means: np.ndarray
) -> TaskComparison:
    chance = results.chance(task)
    return TaskComparison(
        task,
        metric,
        in_table,
        items,
        chance,
        majority=results.majority(task),
        student=_estimate(point[0], means[:, 0]),
        teacher=_estimate(point[1], means[:, 1]),
        difference=_estimate(point[0] - point[1], means[:, 0] - means[:, 1]),
        agreement=_estimate(point[2], means[:, 2]),
        kept=_kept(point[0], point[1], chance, means),
    )


def _kept(student: float, teacher: float, chance: float, means: np.ndarray) -> Estimate:
    value = kept_above_chance(student, teacher, chance)
    if value is None or means[:, 1].min() <= chance:
        return _undefined(f"the teacher ({teacher:.3f}) is not clearly above chance ({chance:.3f}) on these items")
    return _estimate(value, _kept_resampled(means, chance))


def _kept_resampled(means: np.ndarray, chance: float) -> np.ndarray:
    return (means[:, 0] - chance) / (means[:, 1] - chance)


def _mean_kept(table: dict[str, TaskComparison], resampled: dict[str, np.ndarray]) -> Estimate:
    if missing := [task for task in KEPT_TASKS if task not in table]:
        return _undefined(f"{', '.join(missing)} was not run")
    values = {task: table[task].kept.value for task in KEPT_TASKS}
    defined = [value for value in values.values() if value is not None]
    if len(defined) < len(values):
        near = ", ".join(task for task, value in values.items() if value is None)
        return _undefined(f"the teacher is not clearly above chance on {near}")
    ratios = [_kept_resampled(resampled[task], table[task].chance) for task in KEPT_TASKS]
    return _estimate(np.mean(defined), np.mean(ratios, axis=0))


def _six_task_means(
    points: dict[str, np.ndarray], resampled: dict[str, np.ndarray]
) -> tuple[Estimate, Estimate, Estimate]:
    """Student mean, teacher mean and their ratio."""
    if missing := [task for task in PAPER_METRICS if task not in points]:
        undefined = _undefined(f"{', '.join(missing)} was not run")
        return undefined, undefined, undefined
    student, teacher, _ = np.mean([points[task] for task in PAPER_METRICS], axis=0)
    means = np.mean([resampled[task] for task in PAPER_METRICS], axis=0)
    retention = _undefined("the teacher answers almost nothing right")
    if means[:, 1].min() > 0:
        retention = _estimate(student / teacher, means[:, 0] / means[:, 1])
    return _estimate(student, means[:, 0]), _estimate(teacher, means[:, 1]), retention


def _undefined(reason: str) -> Estimate:
    return Estimate(None, None, None, f"undefined: {reason}")
