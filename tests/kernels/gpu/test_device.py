"""Every row of the registry on a GPU, in the types models run in."""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels.gpu.op import shape_name
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

MOST_OPS = 2e10  # what a float64 reference on the CPU does in seconds

CASES = [
    pytest.param(op, shape, dtype, id=f"{op.name}-{shape_name(shape)}-{str(dtype)[6:]}")
    for op in OPS.values()
    for shape in (*op.test_shapes, *(s for s in op.production_shapes if op.work(s).ops <= MOST_OPS))
    for dtype in (torch.bfloat16, *((torch.float16,) if op.any_dtype else ()))
]


@pytest.mark.parametrize("op, shape, dtype", CASES)
def test_kernel_and_reference_agree(op, shape, dtype):
    assert verify(op, shape, dtype, torch.device("cuda")) <= 1
