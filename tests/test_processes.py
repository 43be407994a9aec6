import pytest
import torch

from mar.processes import this_process


def test_one_process_is_the_main_one() -> None:
    process = this_process()
    assert (process.num_processes, process.is_main_process) == (1, True)
    assert torch.zeros(1, device=process.device).device.type != "mps"
    with process.main_process_first():
        assert this_process().process_index == 0


def test_processes_that_accelerate_overlooked_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    this_process()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"^3 processes were launched, but accelerate sees 1; call mar before"):
        this_process()
