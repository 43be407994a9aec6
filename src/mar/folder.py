"""A student on disk: a plain Hugging Face folder with provenance.json beside the weights.

Does: write folders that Auto classes load, read them with clear errors, digest them. Does not: know recipes or stages.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from copy import deepcopy
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mar.checkpoint import TEMPORARY, explain_disk_full, write_json_atomically
from mar.compact import DamagedWeights, compress
from mar.model import MarForCausalLM
from mar.quiet import quiet
from mar.teachers import load_teacher
from mar.weights import GIVE_A_FOLDER, damaged_files, model_type, read_config, require_mar, weight_files

MOST_BYTES = 45_000_000
"""Of one weight file of a compact folder: Git hosts and mail take them so."""


def save_student(
    student: MarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    provenance: dict[str, Any],
    compact: dict[str, str] | None = None,
    moments: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a plain Hugging Face folder, provenance.json last: a folder that has it is whole.

    All files are written aside first, so that a full disk or a kill leaves what `folder` held before.

    provenance: JSON values, among them `step`, `teacher` and `tokens`; date and package versions are added. compact:
    `precision` and `head` of a compact folder (see mar.compact), in fewer bytes throughout; ValueError if unknown.
    moments: of what its linears and head multiply, to calibrate their rounding on (`mar.layers.input_moments`).
    """
    tensors = None
    if compact is not None:
        weights = {name: tensor.detach().float().cpu().numpy() for name, tensor in student.named_parameters()}
        tensors = compress(student.config.to_dict(), weights, **compact, moments=moments)
    made = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: version(name) for name in ("mar", "torch", "transformers", "accelerate")},
    }
    with explain_disk_full(folder), quiet():
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as work:
            draft = Path(work)
            if tensors is None:
                student.save_pretrained(draft)
            else:
                named = {name: _tensor(array) for name, array in tensors.items()}
                save_torch_state_dict(named, draft, max_shard_size=MOST_BYTES, metadata={"format": "pt"})
                config = deepcopy(student.config)
                config.compact = compact
                config.save_pretrained(draft)
                student.generation_config.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            if compact is not None:
                _minify(draft / "tokenizer.json")
            (draft / "README.md").write_text(model_card(student, provenance, compact), encoding="utf-8")
            # config.json after the others: where it lies, a new folder counts as taken.
            for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(folder / file.name)
        write_json_atomically(folder / "provenance.json", {**provenance, **made})


def _tensor(array: np.ndarray) -> torch.Tensor:
    """What mar.compact gives, where uint16 stands for bf16, for safetensors."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def _minify(file: Path) -> None:
    """Write a tokenizer's JSON without white space and each merge as one string: less than half of the bytes."""
    content = json.loads(file.read_text(encoding="utf-8"))
    merges = content["model"].get("merges")
    # The older of the format's two forms for them, which takes no piece with a space in it; byte-level BPE has none.
    if merges and not any(" " in piece for merge in merges for piece in merge):
        content["model"]["merges"] = [" ".join(merge) for merge in merges]
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_student(folder: str | Path) -> MarForCausalLM:
    """A student from its folder, in fp32 and eval mode.

    Raises FileNotFoundError or ValueError, in one sentence, for what is no whole MAR folder with finite weights.
    """
    folder = Path(folder)
    require_mar(folder)
    files = weight_files(folder, GIVE_A_FOLDER)
    try:
        with quiet():
            # Wrong sizes come back in `info`, which names the tensor.
            loaded: Any = MarForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (SafetensorError, DamagedWeights) as error:
        names = damaged_files(files)
        raise ValueError(f"{folder / names} is truncated or damaged ({error}); restore it or refine again.") from error
    except Exception as error:  # a config shows what is wrong with it as errors of several libraries
        problem = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{folder / 'config.json'} describes no MAR model ({problem}); restore it.") from error
    student, info = loaded
    if student.config.tie_word_embeddings:
        for path in files:
            with safe_open(path, framework="pt") as file:  # transformers passes over a head that tying replaces
                info["unexpected_keys"] |= {name for name in file.keys() if name.startswith("lm_head.")}  # noqa: SIM118
    wrong = sorted([*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if wrong:
        raise ValueError(
            f"config.json and weights of {folder} do not belong together (see {wrong[0]!r}); restore them, or refine "
            "again."
        )
    for name, weight in student.named_parameters():
        if not all(bool(extreme.isfinite()) for extreme in weight.detach().aminmax()):
            raise ValueError(f"{folder} has NaN or infinite elements in {name!r}; restore it or refine again.")
    return student.eval()


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """provenance.json as it stands. Raises ValueError where it is damaged, FileNotFoundError where there is none."""
    file = Path(folder) / "provenance.json"
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
        dict(found["teacher"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or remove {folder} and make it again.") from error
    return found


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder. Raises FileNotFoundError or ValueError where none fits the model."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json; copy the teacher's tokenizer there.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as with a config
        problem = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The tokenizer in {folder} cannot be read ({problem}); copy the teacher's there.") from error
    size, last = read_config(folder).get("vocab_size", 0), max(tokenizer.get_vocab().values(), default=-1)
    if last >= size:
        raise ValueError(
            f"The tokenizer in {folder} has ids up to {last}, but the model's vocabulary has {size} entries; copy the "
            "teacher's tokenizer there."
        )
    return tokenizer


def digest(folder: Path) -> str:
    """SHA-256 over config and weights of a model folder."""
    sha = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder, GIVE_A_FOLDER)):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()


def model_card(student: MarForCausalLM, provenance: dict[str, Any], compact: dict[str, str] | None = None) -> str:
    """A short README for the folder: what it is, where it comes from, how to load it."""
    source = provenance["teacher"]
    kind = "dense" if student.config.neurons is None else "spiking"
    stored = ""
    if compact is not None:
        stored = f"\n\nLinears are stored in {compact['precision']}, embedding and head in {compact['head']}."
    return f"""---
library_name: transformers
tags: [mar, state-space-model, {kind}]
base_model: {source.get("name", "unknown")}
license: {source.get("license", "other").lower()}
---

# {provenance["step"]}: a {kind} MAR model

Made from {source.get("name")} ({source.get("note", source.get("kind"))}) by the step `{provenance["step"]}` of a MAR
recipe, after {provenance["tokens"]:,} training tokens in this step. `provenance.json` holds the recipe, the parent's
digest, package versions and final metrics.{stored}

```python
import mar
model, tokenizer = mar.load("path/to/this/folder")
```
"""


def load(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (fp32, eval mode) and tokenizer of a MAR folder, or of anything `mar.teachers.load_teacher` takes."""
    if (Path(name) / "config.json").is_file() and model_type(name) == "mar":
        return load_student(name), load_tokenizer(name)
    teacher = load_teacher(name)
    return teacher.model, teacher.tokenizer
