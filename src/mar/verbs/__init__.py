"""What each verb of the command line does, as plain functions from settings to figures.

Does: load, call the library, return JSON-ready figures. Does not: parse or print results. mar.cli makes the command
line from these signatures and docstrings: what comes before the `/` is given by position, the rest as options. Heavy
modules are imported inside the verbs, so that `mar --help` is quick.
"""

from __future__ import annotations

from mar.verbs.making import Result, convert, insert, pack, quickstart, refine, report, retune, train
from mar.verbs.using import chat, energy, evaluate, generate, info, spikes

__all__ = [
    "Result",
    "chat",
    "convert",
    "energy",
    "evaluate",
    "generate",
    "info",
    "insert",
    "pack",
    "quickstart",
    "refine",
    "report",
    "retune",
    "spikes",
    "train",
]
