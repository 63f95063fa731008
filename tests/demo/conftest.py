"""The demo model's package, which lies beside the examples and is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="session")
def part() -> Callable[[str], ModuleType]:
    """``part("train")`` -> that module of examples/demo_model."""
    spec = importlib.util.spec_from_file_location(
        "demo_model", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    sys.modules["demo_model"] = importlib.util.module_from_spec(spec)
    return lambda name: importlib.import_module(f"demo_model.{name}")
