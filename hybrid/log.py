"""Logging. The library logs to the `hybrid` logger and adds no handlers of its own."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass ``__name__``."""
    return logging.getLogger(name)


logging.getLogger("hybrid").addHandler(logging.NullHandler())
