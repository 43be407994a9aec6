"""The native CPU engine: a MAR model that runs without torch, and reads only the weights that spikes ask for.

Does: `Engine`, which packs a model folder once and then generates, streams and scores. Does not: train, or tokenise.
"""

from __future__ import annotations

from mar.engine.engine import Engine

__all__ = ["Engine"]
