"""Every kernel at production shapes, compiled for every target: it fits, and nothing spills."""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels.gpu.aot import compile_launch, key
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.target import INTERPRETED, TARGETS
from hybrid.kernels.gpu.verify import make_arguments

pytestmark = pytest.mark.aot


def launches(op, target):
    """The different launches of an operation's production shapes."""
    found = {}
    for shape in op.production_shapes:
        args = make_arguments(op, shape, torch.bfloat16, torch.device("meta"))
        for launch in op.plan(target, **args).launches:
            found.setdefault(key(launch), launch)
    return list(found.values())


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_kernels_fit_every_target(op, capability):
    assert not INTERPRETED, "run without TRITON_INTERPRET"
    target = TARGETS[capability]
    compiled = [compile_launch(launch, target) for launch in launches(op, target)]
    assert compiled
    for kernel in compiled:
        found = f"{kernel.name} for sm_{capability}: {kernel.registers} registers"
        assert kernel.shared_bytes <= target.shared_bytes, found
        assert kernel.stack_bytes == 0, found
        assert kernel.local_bytes == 0, found
