"""What a run is given, where it comes from: an option, else the rule file, else the model or a default."""

from __future__ import annotations

from hybrid.config import DEFAULT_MAX_MODEL_LEN, ExpertUse
from hybrid.placement.rules import RuleSet

DEFAULT_KV_FORMAT = "f16"


def context_of(asked: int | None, rule_set: RuleSet | None, longest: int) -> int:
    """Tokens of a request: those asked for (0: as many as the model was made for), else the rules'
    ``kv_cache.max_tokens``, else ``longest`` up to a limit."""
    stated = None if rule_set is None else rule_set.kv_cache.max_tokens
    if asked is None:
        return min(longest, DEFAULT_MAX_MODEL_LEN) if stated is None else stated
    return asked or longest


def kv_format_of(asked: str | None, rule_set: RuleSet | None) -> str:
    """The format of the cache."""
    stated = None if rule_set is None else rule_set.kv_cache.format
    return asked or stated or DEFAULT_KV_FORMAT


def experts_of(asked: ExpertUse, rule_set: RuleSet | None) -> ExpertUse:
    """Which experts of a token are run. A threshold of 0 that is asked for takes the rules' back."""
    if rule_set is None:
        return asked
    stated = rule_set.experts
    return ExpertUse(
        stated.per_token if asked.per_token is None else asked.per_token,
        stated.threshold if asked.threshold is None else asked.threshold,
    )
