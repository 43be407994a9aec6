"""mar: refine a LLaMA checkpoint into a spiking state-space model, and measure what that costs and saves.

Does: offer the whole Python API, loaded on first use so that `import mar` is quick. Does not: hold any code of its own.
`import mar` also makes the Auto classes of transformers know the model type `mar`, as soon as those are loaded.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mar.conversion import convert_llama as convert  # noqa: F401
    from mar.costs import energy as energy
    from mar.engine import Engine as Engine
    from mar.folder import load as load
    from mar.generate import stream as stream
    from mar.recipe import read_recipe as read_recipe
    from mar.refinement import refine as refine
    from mar.spikes import SpikeMonitor as SpikeMonitor

__version__ = "0.1.0"

_HOME = {
    "Engine": "engine.Engine",
    "SpikeMonitor": "spikes.SpikeMonitor",
    "convert": "conversion.convert_llama",
    "energy": "costs.energy",
    "load": "folder.load",
    "read_recipe": "recipe.read_recipe",
    "refine": "refinement.refine",
    "stream": "generate.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mar' has no attribute {name!r}; its API is {', '.join(_HOME)}.")
    module, attribute = _HOME[name].split(".")
    return getattr(importlib.import_module(f"mar.{module}"), attribute)


_AUTO = "transformers.models.auto.configuration_auto"


class _Registration(importlib.abc.MetaPathFinder):
    """Imports mar.config, which registers itself, right after transformers' AutoConfig; the models follow on use."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("mar.config")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    importlib.import_module("mar.config")
else:
    sys.meta_path.insert(0, _Registration())
