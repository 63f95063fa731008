"""What the server knows of its model besides the engine: names, sizes, the template's text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.chat.template import KEY
from hybrid.gguf import GGUFFile
from hybrid.server.engine_api import AsyncEngine


@dataclass(frozen=True)
class ModelCard:
    """``names`` are those that requests may use, ``meta`` goes to /v1/models as it is."""

    names: tuple[str, ...]
    architecture: str = ""
    chat_template_text: str | None = None
    max_model_len: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    @classmethod
    def of(cls, path: Path, names: tuple[str, ...], engine: AsyncEngine) -> ModelCard:
        """The card of the file that ``engine`` has loaded."""
        with GGUFFile.open(path) as file:
            architecture = file.architecture
            template = file.metadata.get(KEY)
            meta = {
                "architecture": architecture,
                "n_vocab": engine.tokenizer.vocab_size,
                "n_ctx": engine.max_model_len,
                "n_ctx_train": file.metadata.get(f"{architecture}.context_length"),
                "n_embd": file.metadata.get(f"{architecture}.embedding_length"),
                "n_params": sum(tensor.n_elements for tensor in file.tensors.values()),
                "size": sum(tensor.n_bytes for tensor in file.tensors.values()),
                "description": engine.describe(),
            }
        text = template if isinstance(template, str) else None
        return cls(names, architecture, text, engine.max_model_len, meta=meta)

    def json(self) -> dict[str, Any]:
        """An entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "hybrid",
            "aliases": list(self.names[1:]),
            "max_model_len": self.max_model_len,
            "meta": self.meta,
        }
