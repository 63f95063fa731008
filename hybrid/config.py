"""Options of the engine as one frozen value, and the file that a model's name means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hybrid.errors import ConfigError

KVFormat = Literal["f32", "f16", "bf16"]
CACHE_BYTES: dict[KVFormat, int] = {"f32": 4, "f16": 2, "bf16": 2}
BLOCK_SIZE = 64  # tokens per cache block; a power of two, and a divisor of the 512-token KV split
DEFAULT_MAX_MODEL_LEN = 8192  # context when none is asked for and the model has more
MAX_WHOLE_LOGPROBS_BYTES = 2 << 30  # one request's log-probabilities of the whole vocabulary


@dataclass(frozen=True)
class EngineConfig:
    """What the engine is sized for.

    Attributes:
        max_model_len: tokens of prompt and text together in one request.
        max_num_seqs: texts that are written at once.
        max_num_batched_tokens: tokens of one step; longer prompts are computed in chunks.
        seed: requests without a seed of their own draw one from this.
        kv_cache_tokens: tokens the cache holds, whole blocks at least; ``None``: ``max_num_seqs`` contexts.
    """

    max_model_len: int
    max_num_seqs: int = 1
    max_num_batched_tokens: int = 512
    seed: int = 0
    kv_cache_tokens: int | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        if self.kv_cache_tokens is not None:
            return -(-self.kv_cache_tokens // BLOCK_SIZE)
        return self.max_num_seqs * -(-self.max_model_len // BLOCK_SIZE)

    def __post_init__(self) -> None:
        for field, minimum in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("seed", 0),
            ("kv_cache_tokens", 1),
        ):
            value = getattr(self, field)
            if value is None and field == "kv_cache_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{field}: expected an integer >= {minimum}, found {value!r}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens: expected at least max_num_seqs = {self.max_num_seqs}, "
                f"found {self.max_num_batched_tokens}"
            )
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.max_model_len:
            raise ConfigError(
                f"kv_cache_tokens: expected at least max_model_len = {self.max_model_len}, so that any "
                f"request can run alone, found {self.kv_cache_tokens}"
            )


@dataclass(frozen=True)
class ExpertUse:
    """How many of the routed experts that a model chooses for a token are run.

    Attributes:
        per_token: the best so many; ``None``: the model's own number.
        threshold: of those, the ones whose weight is at least this share of the token's largest; ``None`` and
            0: all.

    Raises:
        ConfigError: a value is no number, or out of range.
    """

    per_token: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.per_token is not None and (type(self.per_token) is not int or self.per_token < 1):
            raise ConfigError(f"experts_per_token: expected an integer >= 1, found {self.per_token!r}")
        threshold = 0.0 if self.threshold is None else self.threshold
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise ConfigError(f"expert_threshold: expected a number from 0 to 1, found {threshold!r}")


DEMO_MODEL = "demo"
_DEMO_FILE = Path(__file__).parent / "demo" / "demo.gguf"


def model_path(model: str | Path | None) -> Path:
    """The file of ``model``; ``None`` and ``"demo"`` mean the bundled one. Whether it exists is not checked.

    Raises:
        ConfigError: not a path.
    """
    if model is None or model == DEMO_MODEL:
        return _DEMO_FILE
    if not isinstance(model, str | Path) or not str(model):
        raise ConfigError(f"model: expected a GGUF file or {DEMO_MODEL!r}, found {model!r}")
    if "://" in str(model):
        raise ConfigError(f"model: expected a file, found the address {model}; download it first")
    return Path(model).expanduser()
