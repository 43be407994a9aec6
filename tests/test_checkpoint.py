import errno
import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

import mar.checkpoint
from mar.checkpoint import (
    DiskFull,
    load_checkpoint,
    random_state,
    replace_atomically,
    save_checkpoint,
    set_random_state,
    write_json_atomically,
)


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"parameters": {"w": torch.full((300,), float(step))}, "optimizer": {"w.step": torch.tensor(1.5)}}
    return save_checkpoint(folder, step, tensors, {"note": [step, 0.1]}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "new" / "folder", 7)
    found = load_checkpoint(tmp_path / "new" / "folder")
    assert found is not None
    assert (found.step, found.state) == (7, {"note": [7, 0.1]})
    assert torch.equal(found.tensors["parameters"]["w"], torch.full((300,), 7.0))
    assert torch.equal(found.tensors["optimizer"]["w.step"], torch.tensor(1.5))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") is None


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9999999, 10000000):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-000000010", "step-009999999", "step-010000000"]


def test_later_checkpoints_and_leftovers_go_with_the_next_save(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / f"{mar.checkpoint.TEMPORARY}x").mkdir()
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000001", "step-000000002"]


@pytest.mark.parametrize("file", ["parameters.safetensors", "optimizer.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    content = (newest / file).read_bytes()
    if damage == "missing":
        (newest / file).unlink()
    elif damage == "truncated":
        (newest / file).write_bytes(content[:-9])
    else:
        (newest / file).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.warns(UserWarning, match=f"The checkpoint .*{newest.name} is damaged"):
        found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match="delete that folder to start from the beginning"),
    ):
        load_checkpoint(tmp_path)


def fail_with(error: Exception) -> Any:
    def writer(*_: Any, **__: Any) -> None:
        raise error

    return writer


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("save_file", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        ("_write", OSError(errno.ENOSPC, "No space left on device")),
        ("_sync", OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(mar.checkpoint, function, fail_with(error))
        with pytest.raises(DiskFull, match=r"^The disk is full at .*; free some space and run the same command again"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000001"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), SafetensorError("bad header")])
def test_other_errors_while_writing_are_os_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(mar.checkpoint, "save_file", fail_with(error))
    with pytest.raises(OSError, match=r"Permission denied|could not be written: bad header") as caught:
        save(tmp_path, 1)
    assert not isinstance(caught.value, DiskFull)
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json_atomically(tmp_path / "a.json", {"old": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr(mar.checkpoint, "_write", fail_with(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskFull):
            replace_atomically(tmp_path / "a.json", b"new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text() == '{\n  "old": 0.1\n}\n'
    assert names(tmp_path) == ["a.json"]


@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(0, 3))
def test_random_state_comes_back(seed: int, draws: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    def draw() -> tuple[float, float, list[float]]:
        return random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(3).tolist()

    for _ in range(draws):
        draw()
    state = random_state()
    expected = [draw(), draw()]
    set_random_state(state)
    assert [draw(), draw()] == expected


def test_a_kill_at_any_moment_of_a_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    for moment in itertools.count(1):
        child = os.fork()
        if child == 0:
            syncs = iter(range(1, moment))
            mar.checkpoint._sync = lambda _, syncs=syncs: next(syncs, None) or os.kill(os.getpid(), signal.SIGKILL)
            try:
                save(tmp_path, 3)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        found = load_checkpoint(tmp_path)
        assert found is not None
        assert found.step == (3 if found.path.name.endswith("3") else 2)
        assert torch.equal(found.tensors["parameters"]["w"], torch.full((300,), float(found.step)))
        if status == 0:
            break
    # Killed at each of four files, at the checkpoint's folder, and at the folder of all checkpoints.
    assert moment == 7
    assert names(tmp_path) == ["step-000000002", "step-000000003"]
