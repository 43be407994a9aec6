"""A model folder without torch: its config, and the safetensors that hold its weights, one file or several in an index.

Does: read the config, find the files. Does not: read weights, or fetch any from a hub (transformers does).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

GIVE_A_FOLDER = "give a folder that `mar refine`, `mar train` or `mar convert` wrote"


def require_mar(folder: str | Path) -> None:
    """Raises FileNotFoundError or ValueError, in one sentence, for what has no config.json of a MAR model."""
    if (kind := model_type(folder)) != "mar":
        raise ValueError(f"{folder} holds a {kind!r} model, not a MAR one; convert it first.")


def model_type(folder: str | Path) -> str | None:
    """The architecture that config.json names. Raises FileNotFoundError or ValueError where it cannot be read."""
    return read_config(folder).get("model_type")


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as it stands. Raises FileNotFoundError or ValueError where it cannot be read."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {file.name}; {GIVE_A_FOLDER}.")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it.") from error


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
