"""The processes that a launcher such as torchrun started, the device that each of them computes on, and Ctrl-C.

Does: find the first two out, once, the same for every part of the package; let a step end before Ctrl-C stops it. Does
not: exchange tensors (mar.train does).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

WAIT = timedelta(days=1)
"""How long processes wait for the main one, which alone writes text and measures students."""


def this_process() -> PartialState:
    """This process among those of the launch; its `device` is a GPU of its own where there is one, else the CPU.

    `main_process_first()` is how only one of them writes: the others enter the block later, and find what was written.
    Apple's GPUs count as none, because sums here are fp64, which they lack. Raises ValueError where accelerate
    overlooks the other processes.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    # accelerate sees several processes on CPU only when told so by whoever asks first.
    process = PartialState(cpu=found is None or found.type == "mps", timeout=WAIT)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if process.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {process.num_processes}; call mar before "
            "anything else asks accelerate, or launch one process."
        )
    return process


@contextmanager
def noted_interrupts() -> Iterator[threading.Event]:
    """Set the event at the first Ctrl-C instead of raising; the second one raises KeyboardInterrupt as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(_number: int, _frame: Any) -> None:
        event.set()
        # No print: the handler may have interrupted one.
        os.write(2, b"\nFinishing this step and saving; Ctrl-C again stops at once.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
