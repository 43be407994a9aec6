"""Files in large pages of memory, where the system has them.

Does: read a file into memory of this process's own. Does not: check what it says.

A page of 4 KB has to be looked up whenever its part of the weights is read, in a virtual machine twice over; one of
2 MB holds 512 times as much. Files that are mapped get small pages, hence the copy.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIZE = 2 << 20
"""Bytes of a large page of x86-64 and of most others."""

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Linux's own switch: `always`, `madvise` or `never`, the one that holds in brackets."""


def large_pages() -> bool:
    """Whether memory that asks for large pages can get them."""
    try:
        return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in SWITCH.read_text()
    except OSError:
        return False


def read_into_large_pages(place: Path) -> NDArray[np.uint8]:
    """A file's bytes, read-only. Raises OSError where it cannot be read whole, or memory is short."""
    with open(place, "rb") as file:
        count = file.seek(0, 2)
        file.seek(0)
        try:
            memory = mmap.mmap(-1, count + SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise OSError(
                f"{place} takes {count >> 20:,} MB of memory, which this process cannot have ({error.strerror}); "
                "free some, or map the file with share=True."
            ) from error
        whole = np.frombuffer(memory, np.uint8)
        start = -whole.ctypes.data % SIZE
        whole = whole[start : start + count]
        if file.readinto(whole.data) != count:
            raise OSError(f"{place} became shorter while it was read; try again.")
    whole.flags.writeable = False
    return whole
