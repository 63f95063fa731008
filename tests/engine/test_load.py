"""What is refused before a model is read."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from hybrid import LLM, calibration
from hybrid.config import DEFAULT_MAX_MODEL_LEN, model_path
from hybrid.engine.load import LoadOptions, engine_config, load
from hybrid.errors import CapacityError, ConfigError
from hybrid.gguf import GGUFFile


def test_the_context_is_what_is_asked_for_or_a_limited_default():
    assert engine_config(LoadOptions(), 4096).max_model_len == 4096
    assert engine_config(LoadOptions(), 163840).max_model_len == DEFAULT_MAX_MODEL_LEN
    assert engine_config(LoadOptions(max_model_len=0), 163840).max_model_len == 163840
    assert engine_config(LoadOptions(max_model_len=100), 4096).max_model_len == 100
    with pytest.raises(ConfigError, match="at most the 4096"):
        engine_config(LoadOptions(max_model_len=4097), 4096)
    with pytest.raises(ConfigError, match="max_model_len"):
        engine_config(LoadOptions(max_model_len=-1), 4096)


@pytest.mark.parametrize(
    "bad",
    [{"kv_format": "q8"}, {"num_threads": 0}, {"num_threads": True}, {"ram_bytes": 0}, {"ram_bytes": 1.5}],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LoadOptions(**bad)


def test_a_forked_child_is_told_to_be_spawned(tmp_path):
    """torch's threads do not survive a fork: loading would hang."""
    with LLM("demo", max_model_len=64):
        child = os.fork()
        if child == 0:
            try:
                LLM("demo", max_model_len=64)
            except ConfigError as error:
                (tmp_path / "message").write_text(str(error))
            os._exit(0)
        os.waitpid(child, 0)
    assert "spawn" in (tmp_path / "message").read_text()


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(calibration, "available_memory", lambda: calibration.RAM_MARGIN_BYTES + (8 << 20))
    read = []
    monkeypatch.setattr(GGUFFile, "read_into", lambda *args: read.append(args))
    with pytest.raises(CapacityError, match=r"does not fit on cpu \(.*\n.* weights .*\n  cpu .* 8\.0 MiB "):
        load(None, LoadOptions(max_model_len=512))
    assert not read


def test_names_of_models(tmp_path):
    assert model_path(None) == model_path("demo")
    assert model_path(str(tmp_path)) == tmp_path
    for bad in (5, "", b"x"):
        with pytest.raises(ConfigError, match="model"):
            model_path(bad)


def test_a_model_is_fitted_into_the_ram_it_may_take():
    options = LoadOptions(ram_bytes=20 << 20)
    with pytest.raises(CapacityError, match=r"(?s) 20\.0 MiB .*a context of \d+ tokens"):
        load(None, options)
    loaded = load(None, replace(options, fit=True))
    try:
        planned = loaded.plan
        assert planned.memory["cpu"].total_bytes <= 20 << 20
        assert loaded.engine.config.max_model_len == planned.size.max_model_len < 2048
        assert loaded.engine.config.max_num_batched_tokens == planned.size.max_num_batched_tokens
    finally:
        loaded.engine.close()
