"""The paper's six zero-shot tasks, run by lm-eval with the prompts and metrics of the installed package.

Does: load the official task files of lm-eval and, if asked, feed them from local files instead of the hub; draw the
same items for every model; keep the answer to every item. Does not: compare models (mar.evaluate) or print.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mar.quiet import quiet

Document = dict[str, Any]

PAPER_METRICS = {
    "piqa": "acc",
    "boolq": "acc",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc",
}
"""The six tasks in the order of the paper's Table 1, each with the metric that the table prints."""

_FOLDERS = ("piqa", "super_glue/boolq", "winogrande", "hellaswag", "arc")
_FIELDS = {
    "piqa": ("goal", "sol1", "sol2", "label"),
    "boolq": ("passage", "question", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
}


@dataclass(frozen=True)
class ItemResult:
    """One model's answer to one item.

    item: its row in the task's split. gold: index of the right choice. loglikelihoods: one per choice. prediction and
    prediction_norm: the choice with the best log-likelihood, plain and per character. acc and acc_norm: lm-eval's own
    score (0 or 1). The two `norm` fields are None where the official task has no such metric.
    """

    item: int
    gold: int
    loglikelihoods: list[float]
    prediction: int
    prediction_norm: int | None
    acc: float
    acc_norm: float | None


@dataclass(frozen=True)
class TaskResults:
    """Answers of several models to the same items: `items[task][model]` is a list in the same order for every model.

    source: `hub` or the folder the items came from. limit: the most items a task could give (None: all), drawn with
    `seed`. context: tokens that a prompt may have before it loses its beginning, the same for every model.
    """

    items: dict[str, dict[str, list[ItemResult]]]
    source: str
    limit: int | None
    seed: int
    precision: str
    context: int
    lm_eval: str

    def scores(self, task: str, model: str, metric: str) -> np.ndarray:
        """lm-eval's score of each item, (items,)."""
        return np.array([getattr(item, metric) for item in self.items[task][model]], dtype=np.float64)

    def predictions(self, task: str, model: str, metric: str) -> np.ndarray:
        """The choice that `acc` or `acc_norm` scored, (items,)."""
        name = {"acc": "prediction", "acc_norm": "prediction_norm"}[metric]
        return np.array([getattr(item, name) for item in self.items[task][model]])

    def metrics(self, task: str) -> list[str]:
        """The metrics of one task: `acc`, and `acc_norm` where the official task has it."""
        first = next(iter(self.items[task].values()))[0]
        return ["acc"] if first.acc_norm is None else ["acc", "acc_norm"]

    def chance(self, task: str) -> float:
        """Expected accuracy of a blind guess: the mean over items of 1 / (number of choices)."""
        first = next(iter(self.items[task].values()))
        return float(np.mean([1 / len(item.loglikelihoods) for item in first]))

    def majority(self, task: str) -> float:
        """Share of the most frequent right choice: what always giving one answer would score."""
        first = next(iter(self.items[task].values()))
        return float(np.bincount([item.gold for item in first]).max() / len(first))

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per task and model, for a table."""
        rows = []
        for task, models in self.items.items():
            blind = {"chance": self.chance(task), "majority": self.majority(task)}
            for model, items in models.items():
                means = {metric: self.scores(task, model, metric).mean().item() for metric in self.metrics(task)}
                rows.append({"task": task, "model": model, "items": len(items), "acc_norm": None, **means, **blind})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every item included."""
        return asdict(self)


def run_tasks(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    tasks: Sequence[str] = tuple(PAPER_METRICS),
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "fp32",
) -> TaskResults:
    """Every model's answers to the same items of each task, zero-shot and without a chat template.

    models: name to (model, tokenizer). data_dir: folder with `<task>.jsonl.gz` (or .jsonl); None takes the hub. limit:
    items per task, a random sample that depends on `seed` and the task alone. precision: `fp32` runs the weights as
    they are, `bf16` under autocast with the log-softmax in fp32.

    Raises ValueError for an unknown task, precision or limit and for bad items, FileNotFoundError for a missing file,
    ConnectionError where the hub cannot be reached.
    """
    if not models:
        raise ValueError("No model was given; name at least one with its tokenizer.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; ask for at least 1 item per task, or None for all.")
    autocast = autocast_dtype(precision)
    context = min(getattr(model.config, "max_position_embeddings", 2048) for model, _ in models.values())
    items: dict[str, dict[str, list[ItemResult]]] = {task: {} for task in tasks}
    loaded = load_tasks(tasks, data_dir)
    drawn = {name: sample_items(len(task.eval_docs), limit, seed, name) for name, task in loaded.items()}
    for name, (model, tokenizer) in models.items():
        samples = _answer(model, tokenizer, loaded, drawn, batch_size, context, autocast)
        for task in tasks:
            items[task][name] = [_item_result(loaded[task], sample) for sample in samples[task]]
    source = "hub" if data_dir is None else str(data_dir)
    return TaskResults(items, source, limit, seed, precision, context, version("lm_eval"))


def load_tasks(tasks: Sequence[str], data_dir: str | Path | None = None) -> dict[str, Any]:
    """Name to lm-eval's own task object; with `data_dir` only the data set is replaced and no network is needed.

    Raises ValueError for an unknown or repeated task and for bad items, FileNotFoundError for a missing file,
    ConnectionError where the hub cannot be reached.
    """
    for task in tasks:
        if task not in PAPER_METRICS:
            raise ValueError(f"Unknown task {task!r}; use some of {', '.join(PAPER_METRICS)}.")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"The tasks are {list(tasks)}; name at least one, and each once.")
    import lm_eval.tasks as official

    root = Path(official.__path__[0])
    # The whole index takes some 14 seconds to read; these folders hold the six tasks.
    manager = official.TaskManager(include_defaults=False, include_path=[root / folder for folder in _FOLDERS])
    overrides = {task: {} if data_dir is None else _local(task, Path(data_dir)) for task in tasks}
    try:
        # A group is lm-eval's own way to take a registered task and override some of its fields.
        members = [{"task": task, **overrides[task]} for task in tasks]
        with quiet():
            loaded = manager.load({"group": "mar", "task": members})["tasks"]
    except Exception as error:
        if data_dir is not None:
            raise
        # What an unreachable hub raises differs between the versions of datasets and huggingface-hub.
        raise ConnectionError(
            f"Could not load {', '.join(tasks)} from the Hugging Face hub ({type(error).__name__}); "
            "pass --data-dir with a folder that holds <task>.jsonl.gz files."
        ) from error
    for task in loaded.values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


def sample_items(total: int, limit: int | None, seed: int, task: str) -> Sequence[int]:
    """Sorted rows of a split with `total` items: all, or a random `limit` of them.

    The draw depends on `seed` and `task` alone, and a smaller limit gives a subset of a larger one's items.
    """
    if limit is None or limit >= total:
        return range(total)
    return sorted(generator(seed, task).permutation(total)[:limit].tolist())


def generator(seed: int, name: str) -> np.random.Generator:
    """A random generator of its own for each name, so that adding a task changes nothing for the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def autocast_dtype(precision: str) -> str | None:
    """The dtype that `precision` autocasts to, or None where the weights run as they are."""
    known = {"fp32": None, "bf16": "bfloat16"}
    if precision not in known:
        raise ValueError(f"precision is {precision!r}; use one of {', '.join(known)}.")
    return known[precision]


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode inside, each back in its own mode afterwards."""
    before = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    drawn: dict[str, Sequence[int]],
    batch_size: int,
    context: int,
    autocast: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's logged samples of each task for one model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    shared: Any = getattr(model, "continuations", None)

    class ReadOnce(HFLM):
        """For the engine: what the choices of an item have in common is read once, and no batch is padded."""

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            choices: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
            for index, (_, before, choice) in enumerate(requests):
                whole = (before + choice)[-(context + 1) :]
                choices.setdefault(tuple(whole[: -len(choice)]), []).append((index, choice))
            answers: dict[int, tuple[float, bool]] = {}
            for before, group in choices.items():
                found = shared(before, [choice for _, choice in group])
                answers |= zip((index for index, _ in group), found, strict=True)
            return [answers[index] for index in range(len(requests))]

    settings: dict[str, Any] = {"mixed_precision_dtype": autocast, "softmax_dtype": "float32", "backend": "causal"}
    with evaluation_mode(model), quiet():
        # A copy, because lm-eval gives a tokenizer without a pad token one.
        kind = ReadOnce if shared else HFLM
        lm = kind(model, tokenizer=deepcopy(tokenizer), batch_size=batch_size, max_length=context, **settings)  # type: ignore[arg-type]
        results: Any = evaluate(lm, {"tasks": tasks}, samples=drawn, bootstrap_iters=0)  # type: ignore[arg-type]
    return results["samples"]


def _item_result(task: Any, sample: dict[str, Any]) -> ItemResult:
    """One of lm-eval's logged samples, reduced to what a comparison needs."""
    doc = sample["doc"]
    loglikelihoods = [float(value) for value, _ in sample["filtered_resps"]]
    normed = None
    if "acc_norm" in sample:
        normed = int(np.argmax(np.array(loglikelihoods) / [len(choice) for choice in task.doc_to_choice(doc)]))
    return ItemResult(
        item=sample["doc_id"],
        # Where every choice is a prompt of its own (WinoGrande), lm-eval keeps the right index in the text slot.
        gold=int(task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)),
        loglikelihoods=loglikelihoods,
        prediction=int(np.argmax(loglikelihoods)),
        prediction_norm=normed,
        acc=float(sample["acc"]),
        acc_norm=float(sample["acc_norm"]) if "acc_norm" in sample else None,
    )


def _local(task: str, folder: Path) -> dict[str, Any]:
    """The fields of an official task that make it read `folder` instead of the hub."""
    documents = read_documents(task, folder)

    def custom_dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"validation": Dataset.from_list(documents)}

    splits = {"training_split": None, "validation_split": "validation", "test_split": None}
    return {"custom_dataset": custom_dataset, **splits}


def read_documents(task: str, folder: Path) -> list[Document]:
    """Items of `<folder>/<task>.jsonl.gz` (or .jsonl), in the fields that the official task reads.

    Raises FileNotFoundError for a missing file and ValueError, naming file and line, for an item that cannot be used.
    """
    candidates = [folder / f"{task}{suffix}" for suffix in (".jsonl.gz", ".jsonl")]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"Task {task} needs {candidates[0]} (or .jsonl); put it there or leave the task out.")
    documents = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    documents.append(_document(task, line, f"{path}, line {number}"))
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again.") from error
    if not documents:
        raise ValueError(f"{path} holds no items; fetch it again or leave task {task} out.")
    return documents


def _document(task: str, line: str, where: str) -> Document:
    try:
        document = _ADAPTERS[task](json.loads(line))
        return {field: document[field] for field in _FIELDS[task]}
    except KeyError as error:
        raise ValueError(f"{where} has no field {error}; task {task} needs {', '.join(_FIELDS[task])}.") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is no item of task {task} ({error}); one JSON object per line is needed.") from error


def _index(value: Any, choices: int) -> int:
    """A label as an integer from 0 to choices - 1."""
    if int(value) not in range(choices):
        raise ValueError(f"the right choice is {value!r}, not 0 to {choices - 1}")
    return int(value)


def piqa_document(document: Document) -> Document:
    """Label as an integer."""
    return {**document, "label": _index(document["label"], 2)}


def boolq_document(document: Document) -> Document:
    """SuperGLUE's form (label 0 or 1, passage "Title -- text") from itself or from BoolQ's own (answer, title)."""
    if "label" in document:
        return {**document, "label": _index(document["label"], 2)}
    passage = f"{document['title']} -- {document['passage']}" if "title" in document else document["passage"]
    return {**document, "passage": passage, "label": _index(document["answer"], 2)}


def winogrande_document(document: Document) -> Document:
    """Answer as the string "1" or "2"."""
    if "_" not in document["sentence"]:
        raise ValueError("the sentence has no blank _")
    return {**document, "answer": str(_index(int(document["answer"]) - 1, 2) + 1)}


def hellaswag_document(document: Document) -> Document:
    """Label as a string, as on the hub; the official task cleans the text itself."""
    return {**document, "label": str(_index(document["label"], len(document["endings"])))}


def arc_document(document: Document) -> Document:
    """The hub's form ({"text": [...], "label": [...]}) from itself or from AI2's own (question stem and choices)."""
    question = document["question"]
    if isinstance(question, str):
        choices = document["choices"]
    else:
        choices = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
        question = question["stem"]
    if document["answerKey"] not in choices["label"]:
        raise ValueError(f"the right choice is {document['answerKey']!r}, not one of its labels")
    return {**document, "question": question, "choices": choices}


_ADAPTERS: dict[str, Callable[[Document], Document]] = {
    "piqa": piqa_document,
    "boolq": boolq_document,
    "winogrande": winogrande_document,
    "hellaswag": hellaswag_document,
    "arc_easy": arc_document,
    "arc_challenge": arc_document,
}
