"""mar: refine a LLaMA checkpoint into a spiking state-space model, and measure what that costs and saves.

Does: offer the whole Python API, loaded on first use so that `import mar` is quick. Does not: hold any code of its own.
`import mar` also makes the Auto classes of transformers know the model type `mar`, as soon as transformers is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mar.api import load as load
    from mar.convert import convert_llama as convert
    from mar.energy import compare as energy
    from mar.generate import stream as stream
    from mar.recipe import read_recipe as read_recipe
    from mar.refine import refine as refine
    from mar.spikes import SpikeMonitor as SpikeMonitor

__version__ = "0.1.0"
