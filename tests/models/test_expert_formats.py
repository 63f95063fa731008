"""Every format as the experts' weights of a whole model: the CPU loses what int8 activations lose, no more.

Three models share exactly the same quantised experts. The float model multiplies their dequantised weights.
The rounded model does too, but rounds each input of an expert product to int8, one scale for 256 columns.
The CPU may differ from the float model by as much as the rounded one does, and a fifth more.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hybrid.backends.fake import FakeBackend
from hybrid.gguf import GGMLType, random_blocks
from hybrid.models import weights as weights_module

FORMATS = [
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4"),
]
# F32 models stand for both here: their products differ in the order of their sums alone.
ROUNDING_FREE = 1e-10


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over positions of KL(reference || other)."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def wide_reference(make_reference):
    """A model whose expert rows are whole 256-column blocks."""
    return make_reference("v3-wide-experts")


@pytest.mark.parametrize("format_", FORMATS)
def test_kl_is_that_of_int8_activations(
    wide_reference, open_model, write_model, tmp_path, monkeypatch, format_
):
    type_ = GGMLType[format_]
    keys, tensors = wide_reference.contents(split_kv_b=False)
    rng = np.random.default_rng(int(type_))
    for name, values in tensors.items():
        if "_exps." in name:
            experts, rows, cols = values.shape
            blocks = random_blocks(type_, experts * rows, cols, rng, cols**-0.5)
            tensors[name] = blocks.reshape(experts, rows, -1)
    path = write_model(
        tmp_path / "model.gguf", keys, tensors, lambda name: type_ if "_exps." in name else GGMLType.F32
    )
    plain = {"version": 1, "rules": [{"select": {"name": "*"}, "place": {"device": "fake:0"}}]}
    ids = wide_reference.ids
    on_cpu = open_model(path).logits(ids)
    in_float = open_model(path, plain).logits(ids)
    rounded_backend = functools.partial(FakeBackend, activation="q8")
    monkeypatch.setattr(weights_module, "create_backend", lambda device, num_threads: rounded_backend(device))
    rounded = open_model(path, plain).logits(ids)

    allowed = mean_kl(in_float, rounded)
    if type_ in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        assert torch.equal(rounded, in_float), "activations of float products are not rounded"
        allowed = ROUNDING_FREE
    else:
        assert allowed > 100 * ROUNDING_FREE
    assert mean_kl(in_float, on_cpu) <= 1.2 * allowed
