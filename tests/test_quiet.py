import logging
import sys

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from mar.quiet import quiet


def settings() -> tuple[object, ...]:
    return (
        logging.getLogger("lm_eval").level,
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )


@pytest.mark.parametrize("bars", [True, False])
def test_everything_is_as_before_afterwards(bars: bool) -> None:
    outside = settings()
    try:
        if not bars:
            transformers_logging.disable_progress_bar()
            datasets.disable_progress_bars()
        before = settings()
        with quiet():
            assert settings() == (logging.ERROR, logging.ERROR, False, True)
        assert settings() == before
        with pytest.raises(KeyError), quiet():
            raise KeyError
        assert settings() == before
    finally:
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
    assert settings() == outside


def test_warnings_are_not_shown_and_errors_are() -> None:
    logger = transformers_logging.get_logger("transformers.somewhere")
    with quiet():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    assert logger.isEnabledFor(logging.WARNING)


def test_datasets_is_not_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "datasets")
    with quiet():
        assert "datasets" not in sys.modules
