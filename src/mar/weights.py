"""The safetensors that hold a model folder's weights: one file, or several that an index names.

Does: find them. Does not: read them, or fetch any from a hub (transformers does).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(folder: Path, remedy: str) -> list[Path]:
    """The files in order.

    Raises FileNotFoundError, with `remedy` as its advice, where one is missing, and ValueError for a damaged index and
    where all there is are pickles.
    """
    index = folder / INDEX
    names = ["model.safetensors"] if (folder / "model.safetensors").is_file() or not index.is_file() else _shards(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return [folder / name for name in names]
    if folder.is_dir() and (pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)):
        raise ValueError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; convert it to "
            "safetensors (load it where you trust it, then `save_pretrained`)."
        )
    if len(missing) < len(names):
        raise FileNotFoundError(f"{folder} holds no {missing[0]}, which its {INDEX} names; restore it.")
    raise FileNotFoundError(f"{folder} holds no {missing[0]}; {remedy}.")


def damaged_files(files: list[Path]) -> str:
    """Names of the files that safetensors cannot open; of all of them where it opens each."""
    broken = []
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError:
            broken.append(file.name)
    return " or ".join(broken or [file.name for file in files])


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({error}); restore it.") from error
    # An index comes from elsewhere and may name any file of this machine.
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} names {', '.join(names) or 'no files'}, not files beside it; restore it.")
    return names
