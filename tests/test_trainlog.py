import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mar.checkpoint import DiskFull
from mar.trainlog import TrainLog


def open_log(folder: Path, step: int = 0, **changes: Any) -> TrainLog:
    settings = {"title": "align", "steps": 6, "every": 1, "bar": False, "tensorboard": False, "active": True}
    return TrainLog(folder, step=step, **{**settings, **changes})


def record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 32 * step,
        "relative_mse": 0.5 / step,
        "loss": 1 / step,
        "tokens_per_second": 1234.5,
    }


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_a_step_with_exact_numbers(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(record(step))
            assert steps_in(tmp_path)[-1] == step
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(
        map(record, (1, 2, 3))
    )


def test_every_nth_and_the_last_step(tmp_path: Path) -> None:
    with open_log(tmp_path, every=4) as log:
        for step in range(1, 7):
            log.write(record(step))
    assert steps_in(tmp_path) == [4, 6]


@pytest.mark.parametrize("tail", ['{"step": 5, "lo', "\0\0\0", "", json.dumps(record(5))])
def test_steps_after_the_checkpoint_and_torn_lines_go(tmp_path: Path, tail: str) -> None:
    whole = "".join(json.dumps(record(step)) + "\n" for step in (1, 2, 3, 4))
    (tmp_path / "log.jsonl").write_text(whole + tail)
    with open_log(tmp_path, step=5 if tail else 2) as log:
        log.write(record(6))
    kept = [1, 2, 3, 4, 5] if tail.endswith("}") else [1, 2, 3, 4] if tail else [1, 2]
    assert steps_in(tmp_path) == [*kept, 6]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path, active=False) as log:
        log.write(record(1))
    assert list(tmp_path.iterdir()) == []


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, bar=True) as log:
        for step in range(1, 7):
            log.write(record(step))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "align: step 6 of 6, relative_mse 0.08333, 1,234 tok/s\n"


def test_the_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with open_log(tmp_path, bar=True) as log:
        log.write(record(3))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(part in captured.err for part in ("align", "3/6", "relative_mse 0.1667", "1,234 tok/s"))


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    with open_log(tmp_path) as log:
        log.file.close()
        log.file = Full()
        with pytest.raises(DiskFull, match="free some space"):
            log.write(record(1))


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"install mar\[tensorboard\]"):
        open_log(tmp_path, tensorboard=True)
