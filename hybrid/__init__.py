"""hybrid: a CPU/GPU Mixture-of-Experts runtime.

Names are loaded on first use (PEP 562), so ``import hybrid.gguf`` pulls in no torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _distribution_version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.llm import LLM as LLM
    from hybrid.outputs import CompletionOutput as CompletionOutput
    from hybrid.outputs import RequestOutput as RequestOutput
    from hybrid.sampling_params import SamplingParams as SamplingParams

_EXPORTS = {
    "LLM": "hybrid.llm",
    "SamplingParams": "hybrid.sampling_params",
    "RequestOutput": "hybrid.outputs",
    "CompletionOutput": "hybrid.outputs",
}

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _distribution_version("hybrid-moe")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
