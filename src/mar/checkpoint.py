"""Checkpoints of a training run: tensors in safetensors, the rest in JSON, no pickle.

Does: write a checkpoint whole or not at all, keep the newest few, verify one by its digests before use and pass over a
damaged one, hold the state of the random generators. Does not: know what is being trained.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TEMPORARY = ".unfinished-"
STATE = "state.json"
DIGESTS = "digests.json"
LOCK = "lock"


class DiskFull(OSError):
    """No space was left while writing; what had been written whole before is still there."""


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given. tensors: file stem → tensor name → tensor; state: JSON values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
) -> Path:
    """Write folder/step-N and then drop all but the newest `keep`, and any from a later step (they were passed over).

    Everything is written and synced under a temporary name in the same folder and renamed at the end, so that a kill
    at any moment leaves the checkpoints before it as they were. Raises DiskFull, or another OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    path = _path(folder, step)
    with explain_disk_full(folder):
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            for stem, named in tensors.items():
                _write_tensors(temporary / f"{stem}.safetensors", named)
            _write_json(temporary / STATE, {"step": step, **state})
            _write_json(temporary / DIGESTS, {file.name: _digest(file) for file in sorted(temporary.iterdir())})
            _sync(temporary)
            _remove(path)
            temporary.rename(path)
            _sync(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    kept = [other for other in _checkpoints(folder) if other <= path][-keep:]
    for other in _checkpoints(folder):
        if other not in kept:
            _remove(other)
    return path


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`, or None where there is none at all.

    A damaged one is passed over with a warning that names it. Raises ValueError where all are damaged: to start from
    the beginning would then lose work, so that is left to the user.
    """
    found = _checkpoints(folder)
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warnings.warn(f"The checkpoint {path} is damaged ({error}) and is passed over.", stacklevel=2)
    if found:
        raise ValueError(f"Every checkpoint in {folder} is damaged; delete that folder to start from the beginning.")
    return None


def write_json_atomically(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all. Raises DiskFull, or another OSError."""
    replace_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def replace_atomically(path: Path, content: bytes) -> None:
    """Give `path` this content, so that a kill leaves the old or the new one. Raises DiskFull, or another OSError."""
    with explain_disk_full(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        try:
            _write(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that is being written; the lock goes with its process, however that ends.

    Raises ValueError where another process has it.
    """
    with explain_disk_full(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(f"Another process is at work in {folder}; wait for it, or use another folder.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explain_disk_full(folder: Path) -> Iterator[None]:
    """Turn "no space left", as Python or safetensors reports it, into DiskFull with one sentence about `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust, and passes the operating system's error on as text only.
        in_text = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else in_text and int(in_text[1])
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk is full at {folder}; free some space and run the same command again, "
                "which goes on from the last checkpoint that was written whole."
            ) from error
        if isinstance(error, OSError):
            raise
        raise OSError(f"{folder} could not be written: {error}") from error


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (and the current GPU's, if any), as JSON values."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _read(path: Path) -> Checkpoint:
    digests = json.loads((path / DIGESTS).read_text())
    for name, digest in digests.items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} does not match its digest")
    state = json.loads((path / STATE).read_text())
    stems = [Path(name).stem for name in digests if name.endswith(".safetensors")]
    return Checkpoint(path, state.pop("step"), {stem: load_file(path / f"{stem}.safetensors") for stem in stems}, state)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, allow_nan=False).encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    # Renamed first: a kill half way through the deletion must not leave something that looks like a checkpoint.
    if path.exists():
        doomed = path.with_name(f"{TEMPORARY}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
