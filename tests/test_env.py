"""The table of environment variables agrees with what it configures."""

from __future__ import annotations

import pytest

from hybrid import env
from hybrid.config import KV_FORMATS
from hybrid.errors import ConfigError


def test_formats_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KV_FORMATS:
        monkeypatch.setenv("HYBRID_KV_FORMAT", name)
        assert env.get("HYBRID_KV_FORMAT") == name
    monkeypatch.setenv("HYBRID_KV_FORMAT", "q4_0")
    with pytest.raises(ConfigError) as error:
        env.get("HYBRID_KV_FORMAT")
    assert all(name in str(error.value) for name in KV_FORMATS)
