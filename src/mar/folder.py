"""A student on disk: a plain Hugging Face folder with provenance.json beside the weights.

Does: write folders that Auto classes load, read them with clear errors, digest them. Does not: know recipes or stages.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mar.checkpoint import explain_disk_full, write_json_atomically
from mar.model import MarForCausalLM
from mar.teachers import load_teacher


def save_student(
    student: MarForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, provenance: dict[str, Any]
) -> None:
    """Write a plain Hugging Face folder, provenance.json last: a folder that has it is whole."""
    with explain_disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(student, provenance))
        write_json_atomically(folder / "provenance.json", provenance)


def load_student(folder: str | Path) -> MarForCausalLM:
    """A student from its folder, in fp32 and eval mode.

    Raises FileNotFoundError or ValueError, in one sentence, for what is no whole MAR folder.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; give a folder that `mar refine` or `mar convert` wrote."
            )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "mar":
        raise ValueError(f"{folder} holds a {kind!r} model, not a MAR one; convert it first.")
    try:
        return MarForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is damaged ({error}); restore it or refine again.") from error


def digest(folder: Path) -> str:
    """SHA-256 over config and weights of a model folder."""
    sha = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
    return sha.hexdigest()


def model_card(student: MarForCausalLM, provenance: dict[str, Any]) -> str:
    """A short README for the folder: what it is, where it comes from, how to load it."""
    source = provenance["teacher"]
    kind = "dense" if student.config.neurons is None else "spiking"
    return f"""---
library_name: transformers
tags: [mar, state-space-model, {kind}]
base_model: {source.get("name", "unknown")}
license: {source.get("license", "other").lower()}
---

# {provenance["step"]}: a {kind} MAR model

Made from {source.get("name")} ({source.get("note", source.get("kind"))}) by the step `{provenance["step"]}` of a MAR
recipe, after {provenance["tokens"]:,} training tokens in this step. `provenance.json` holds the recipe, the parent's
digest, package versions and final metrics.

```python
import mar
model, tokenizer = mar.load("path/to/this/folder")
```
"""


def load(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (fp32, eval mode) and tokenizer of a MAR folder, or of anything `mar.teachers.load_teacher` takes."""
    folder = Path(name)
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("model_type") == "mar":
        return load_student(folder), AutoTokenizer.from_pretrained(folder)
    teacher = load_teacher(name)
    return teacher.model, teacher.tokenizer
