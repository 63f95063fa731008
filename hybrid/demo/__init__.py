"""The bundled demo model; README.md in this folder is its card."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """The GGUF that ships with the package."""
    return Path(str(files("hybrid.demo") / "stories.gguf"))
