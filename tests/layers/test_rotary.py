"""Tables of cosines and sines against the transformers library, whose formulas are the models' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hybrid.layers.rotary import YarnConfig, inverse_frequencies, rope_table


def reference(dim, base, yarn, mscale):
    parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **({"mscale": mscale, "mscale_all_dim": mscale} if mscale else {}),
    }
    config = DeepseekV3Config(
        qk_rope_head_dim=dim, rope_parameters=parameters, max_position_embeddings=4096 * 40
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


@pytest.mark.parametrize(
    "dim, base, yarn, mscale",
    [
        (64, 10000.0, YarnConfig(40.0, 4096, log_multiplier=0.0707), 0.707),  # V2-Lite
        (64, 10000.0, YarnConfig(40.0, 4096, log_multiplier=0.1), 1.0),  # V3
        (64, 50000.0, YarnConfig(32.0, 4096, beta_fast=1.0, log_multiplier=0.1), 1.0),  # Kimi-K2
        (32, 10000.0, YarnConfig(8.0, 64), 0.0),
    ],
)
def test_yarn_is_that_of_transformers(dim, base, yarn, mscale):
    expected, factor = reference(dim, base, yarn, mscale)
    # transformers computes them in float32
    assert torch.allclose(inverse_frequencies(dim, base, yarn).float(), expected, rtol=1e-5)
    assert yarn.magnitude == pytest.approx(factor)
    mscale_factor = 0.1 * mscale * math.log(yarn.factor) + 1
    assert yarn.softmax_scale == pytest.approx(mscale_factor**2, rel=1e-6)


def test_plain_frequencies():
    assert inverse_frequencies(4, 100.0, None).tolist() == pytest.approx([1.0, 0.1])


def test_yarn_keeps_fast_and_slows_slow_dimensions():
    yarn = YarnConfig(10.0, 4096, log_multiplier=0.1)
    ratio = inverse_frequencies(64, 10000.0, None) / inverse_frequencies(64, 10000.0, yarn)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(10)
    assert (ratio.diff() >= 0).all()


def test_table():
    yarn = YarnConfig(4.0, 16)
    table = rope_table(9, 8, 10000.0, yarn)
    assert table.shape == (9, 4, 2)
    assert table.dtype == torch.float32
    assert table.is_contiguous()
    angles = 7 * inverse_frequencies(8, 10000.0, yarn)
    expected = torch.stack((angles.cos(), angles.sin()), -1) * (0.1 * math.log(4) + 1)
    assert torch.equal(table[7], expected.float())


def test_positions_far_out_are_exact():
    # In float32, 163,839 radians are known to 1/64 only.
    table = rope_table(163_840, 4, 10000.0, None)
    assert table[-1, 0, 0].item() == pytest.approx(math.cos(163_839), abs=1e-7)
