"""The processes that a launcher such as torchrun started, and the device that each of them computes on.

Does: find both out, once, the same for every part of the package. Does not: exchange tensors (mar.train does).
"""

from __future__ import annotations

import os
from datetime import timedelta

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
