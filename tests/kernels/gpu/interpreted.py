"""Every row of the registry in the interpreter; `test_interpreted.py` runs this in a process of its own."""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels.gpu.op import shape_name
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.verify import verify

CASES = [
    pytest.param(op, shape, dtype, id=f"{op.name}-{shape_name(shape)}-{str(dtype)[6:]}")
    for op in OPS.values()
    if op.interpreted
    for shape in op.test_shapes
    for dtype in (torch.float32, *((torch.float16,) if op.any_dtype else ()))
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op, shape, dtype", CASES)
def test_kernel_and_reference_agree(op, shape, dtype):
    assert verify(op, shape, dtype, torch.device("cpu")) <= 1
