"""What a run shows on stderr: a line of its own, and other libraries' lines not.

Does: silence transformers, datasets and lm-eval for a block; say where a run stands. Does not: hide errors.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


def say(text: str) -> None:
    """One line on stderr, at once: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' and datasets' bars, load reports and lm-eval's warnings: mar turns what matters in them
    into errors. The bar that lm-eval shows while a model answers stays."""
    logger = logging.getLogger("lm_eval")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    # Looked up, because importing datasets takes seconds, and unless someone did there is nothing to silence.
    datasets = sys.modules.get("datasets")
    noisy = None if datasets is None or datasets.are_progress_bars_disabled() else datasets
    bars = transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if noisy:
        noisy.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if noisy:
            noisy.enable_progress_bars()
