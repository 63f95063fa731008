"""hybrid: a CPU/GPU Mixture-of-Experts runtime.

Names are loaded on first use (PEP 562), so ``import hybrid.gguf`` pulls in no torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _distribution_version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.async_llm import AsyncLLM as AsyncLLM
    from hybrid.errors import HybridError as HybridError
    from hybrid.llm import LLM as LLM
    from hybrid.outputs import CompletionOutput as CompletionOutput
    from hybrid.outputs import RequestOutput as RequestOutput
    from hybrid.sampling_params import SamplingParams as SamplingParams
    from hybrid.structured import StructuredOutputs as StructuredOutputs

_EXPORTS = {
    "AsyncLLM": "hybrid.async_llm",
    "LLM": "hybrid.llm",
    "SamplingParams": "hybrid.sampling_params",
    "RequestOutput": "hybrid.outputs",
    "CompletionOutput": "hybrid.outputs",
    "HybridError": "hybrid.errors",
    "StructuredOutputs": "hybrid.structured",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "HybridError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _distribution_version("hybrid-moe")
    if name in _EXPORTS:
        try:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("hybrid.kernels"):
                raise
            raise ImportError(
                f"{__path__[0]} is the source folder, which has no compiled kernels and hides the installed "
                "package; run Python from another folder, or with -P"
            ) from None
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
