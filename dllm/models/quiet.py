"""Without the warnings of transformers, where they would say what is meant so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warnings() -> Iterator[None]:
    """Let transformers report errors alone, for as long as this lasts."""
    from transformers.utils import logging

    told = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(told)
