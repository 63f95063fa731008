"""Imports point strictly down: every import statement is parsed, those inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top first. A module may import what stands in a lower line, and its own package.
LEVELS = (
    ("hybrid.__main__",),
    ("hybrid.cli",),
    (
        "hybrid.bench",
        "hybrid.bench_load",
        "hybrid.bench_serve",
        "hybrid.perplexity",
        "hybrid.profiling",
        "hybrid.server",
    ),
    ("hybrid.doctor",),
    ("hybrid.llm", "hybrid.async_llm"),
    ("hybrid.forward",),
    ("hybrid.engine",),
    ("hybrid.models",),
    ("hybrid.layers",),
    ("hybrid.moe",),
    ("hybrid.backends",),
    ("hybrid.kvcache",),
    ("hybrid.describe", "hybrid.synth", "hybrid.calibration", "hybrid.pull"),
    ("hybrid.placement", "hybrid.chat", "hybrid.logprob_file"),
    ("hybrid.tokenizer",),
    ("hybrid.gguf",),
    (
        "hybrid.config",
        "hybrid.env",
        "hybrid.free_memory",
        "hybrid.gpus",
        "hybrid.log",
        "hybrid.sampling_params",
        "hybrid.trace",
        "hybrid.outputs",
    ),
    ("hybrid.structured", "hybrid.system_files"),
    ("hybrid.errors",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
KERNEL_USERS = {
    *("hybrid.backends", "hybrid.engine", "hybrid.bench", "hybrid.doctor", "hybrid.moe", "hybrid.quantize"),
    "hybrid.calibration",
    "hybrid.cli",  # which ISA there is; the modules named above do the rest
}
# Packages that a part must not import, directly or through others.
FORBIDDEN = {
    "hybrid": ("torch", "numpy"),
    "hybrid.gguf": ("torch", "gguf", "jinja2", "tokenizers", "yaml"),
    "hybrid.placement.planner": ("torch", "gguf"),
    "hybrid.kernels.cpu": ("torch", "numpy"),
    "hybrid.cli.main": ("torch", "numpy"),
}


def part_of(module: str) -> str:
    """``hybrid.gguf.reader`` -> ``hybrid.gguf``; modules right in the package are their own part."""
    return ".".join(module.split(".")[:2])


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import. ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules() -> list[tuple[Path, str]]:
    """Every Python file of the package and its module name."""
    found = []
    for folder, package in (("hybrid", "hybrid"), ("kernels", "hybrid.kernels"), ("rules", "hybrid.rules")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append((path, ".".join((package, *parts))))
    return found


MODULES = modules()


def problem(module: str, imported: str) -> str | None:
    """Why ``module`` must not import ``imported``; ``None`` where it may."""
    here, there = part_of(module), part_of(imported)
    if not imported.startswith("hybrid.") or here == there or here == "hybrid":
        return None
    if here == "hybrid.kernels":
        return "hybrid.kernels is a leaf and imports nothing of the package"
    if there == "hybrid.kernels":
        return None if here in KERNEL_USERS else f"only {', '.join(sorted(KERNEL_USERS))} may use kernels"
    if there not in LEVEL_OF:  # from hybrid import __version__
        return None
    if here not in LEVEL_OF:
        return f"{here} is not in LEVELS of this test"
    if LEVEL_OF[there] <= LEVEL_OF[here]:
        return f"{there} is not below {here}"
    return None


def test_imports_point_down():
    assert len(MODULES) > 60
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {imported}: {reason}"
        for path, module in MODULES
        for line, imported in imports_of(path, module)
        if (reason := problem(module, imported))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_part_has_its_level():
    parts = {part_of(module) for _, module in MODULES} - {
        "hybrid",
        "hybrid.kernels",
        "hybrid.rules",
        "hybrid.demo",
    }
    assert parts <= set(LEVEL_OF), f"without a level: {sorted(parts - set(LEVEL_OF))}"


@pytest.mark.parametrize(
    "module, imported, allowed",
    [
        ("hybrid.gguf.reader", "hybrid.errors.GGUFError", True),
        ("hybrid.gguf.reader", "hybrid.tokenizer", False),
        ("hybrid.placement.rules", "hybrid.backends.base", False),
        ("hybrid.models.loader", "hybrid.engine.engine", False),
        ("hybrid.layers.mlp", "hybrid.kernels.cpu", False),
        ("hybrid.backends.cpu", "hybrid.kernels.cpu", True),
        ("hybrid.kernels.bench", "hybrid.errors", False),
        ("hybrid.unheard.of", "hybrid.errors", False),
        ("hybrid.gguf.reader", "numpy", True),
    ],
)
def test_the_rule_itself(module, imported, allowed):
    assert (problem(module, imported) is None) == allowed


def test_relative_imports_are_resolved(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("from ..engine import engine\nfrom . import b\ndef f():\n    import hybrid.llm\n")
    assert list(imports_of(path, "hybrid.models.a")) == [
        (1, "hybrid.engine.engine"),
        (2, "hybrid.models.b"),
        (4, "hybrid.llm"),
    ]


@pytest.mark.parametrize("module", FORBIDDEN)
def test_heavy_packages_stay_out(module):
    code = f"import sys, {module}; print(*(set({FORBIDDEN[module]!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), f"import {module} also imports {done.stdout.strip()}"


def test_kernels_import_torch_triton_and_numpy_alone():
    allowed = {"torch", "triton", "numpy", "hybrid"} | set(sys.stdlib_module_names)
    for path, module in MODULES:
        if part_of(module) == "hybrid.kernels":
            for line, imported in imports_of(path, module):
                assert imported.split(".")[0] in allowed, f"{path}:{line}: {imported}"
