"""Products with quantised matrices stay bound by memory: instructions a weight, counted in the machine code.

Model of an RTX 3090 (sm_86): 82 multiprocessors of 4 schedulers, each of which starts one instruction of a
warp of 32 threads a cycle at 1.7 GHz; 936 GB/s of memory. It counts every instruction as one, and the loop
alone.
"""

from __future__ import annotations

import pytest
import torch
from hybrid.kernels.gpu.aot import compile_launch, loop_instructions
from hybrid.kernels.gpu.formats import FORMATS
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.target import TARGETS
from hybrid.kernels.gpu.verify import make_arguments

pytestmark = pytest.mark.aot

INSTRUCTIONS_S = 82 * 4 * 32 * 1.7e9
BYTES_S = 936e9


def one_token_launch(name, target):
    op = OPS[name]
    args = make_arguments(op, op.production_shapes[0], torch.bfloat16, torch.device("meta"))
    return op.plan(target, **args).launches[0]


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_products_take_at_most_60_percent_of_the_memory_time(name, record_property):
    fmt = FORMATS[name]
    counts = loop_instructions(compile_launch(one_token_launch(f"gemv_{name}", TARGETS[86]), TARGETS[86]))
    weights = 4 * sum(n for instruction, n in counts.items() if instruction.startswith("IDP.4A"))
    assert weights == 16 * fmt.parts, f"a thread takes 16 columns of each part in a pass, not {weights}"
    per_weight = counts.total() / weights
    record_property("instructions_per_weight", round(per_weight, 2))
    share = per_weight / INSTRUCTIONS_S / (fmt.block_bytes / fmt.block_cols / BYTES_S)
    print(f"{name}: {per_weight:.2f} instructions a weight, {share:.0%} of the memory time")
    assert share <= 0.6, f"{name}: {per_weight:.2f} instructions a weight, {share:.0%} of the memory time"
    assert not any(instruction.startswith("BAR") for instruction in counts), "the loop waits for other warps"


def test_float_products_take_at_most_60_percent_of_the_memory_time():
    counts = loop_instructions(compile_launch(one_token_launch("gemv_float", TARGETS[86]), TARGETS[86]))
    weights = sum(n for instruction, n in counts.items() if instruction.startswith("FFMA"))
    per_weight = counts.total() / weights
    assert per_weight / INSTRUCTIONS_S / (2 / BYTES_S) <= 0.6, f"{per_weight:.2f} instructions a weight"
