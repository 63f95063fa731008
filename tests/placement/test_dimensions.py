"""Sizes a plan counts with, from headers that tell them in different ways."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter
from hybrid.placement.dimensions import read_dimensions


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 8 * (32 + 32)),
        ({"attention.head_count_kv": 2}, 2 * (32 + 32)),
        ({"attention.head_count_kv": 2, "attention.key_length": 48}, 2 * (48 + 32)),
        ({"attention.head_count_kv": [2, 4, 2], "attention.value_length": 16}, 4 * (32 + 16)),
    ],
)
def test_cache_of_plain_attention_is_never_forgotten(tmp_path, keys, width):
    with GGUFWriter(tmp_path / "m.gguf") as writer:
        writer.add_metadata("general.architecture", "qwen3moe")
        writer.add_metadata("qwen3moe.block_count", 3)
        writer.add_metadata("qwen3moe.attention.head_count", 8)
        for key, value in keys.items():
            writer.add_metadata(
                f"qwen3moe.{key}", np.array(value, np.int32) if isinstance(value, list) else value
            )
        writer.add_tensor("token_embd.weight", (16, 256), GGMLType.F32)
        writer.write_tensor("token_embd.weight", np.zeros(16 * 256 * 4, np.uint8))
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert read_dimensions(file).cache_width == width
