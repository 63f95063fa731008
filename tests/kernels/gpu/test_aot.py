"""Every kernel at production shapes, compiled for every target: it fits, and nothing spills."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from hybrid.kernels.gpu.aot import compile_launch, key
from hybrid.kernels.gpu.registry import OPS
from hybrid.kernels.gpu.target import INTERPRETED, TARGETS
from hybrid.kernels.gpu.verify import make_arguments

pytestmark = pytest.mark.aot

CASES = [(name, capability) for name, op in OPS.items() for capability in op.targets]


def launches(op, target):
    """The different launches of an operation's production shapes."""
    found = {}
    for shape in op.production_shapes:
        args = make_arguments(op, shape, torch.bfloat16, torch.device("meta"))
        for launch in op.plan(target, **args).launches:
            found.setdefault(key(launch), launch)
    return list(found.values())


def compiled(name, capability):
    """In a worker: two compile while the tests look at results."""
    target = TARGETS[capability]
    return [compile_launch(launch, target) for launch in launches(OPS[name], target)]


@pytest.fixture(scope="module")
def results(request):
    assert not INTERPRETED, "run without TRITON_INTERPRET"
    chosen = {item.callspec.id for item in request.session.items if item.path == request.path}
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(compiled, *case) for case in CASES if f"{case[0]}-{case[1]}" in chosen}


@pytest.mark.timeout(600)  # the first test waits for the start of the workers
@pytest.mark.parametrize("name, capability", CASES, ids=[f"{name}-{cc}" for name, cc in CASES])
def test_kernels_fit_every_target(results, name, capability):
    kernels = results[name, capability].result()
    assert kernels
    for kernel in kernels:
        found = f"{kernel.name} for sm_{capability}: {kernel.registers} registers"
        assert kernel.shared_bytes <= TARGETS[capability].shared_bytes, found
        assert kernel.stack_bytes == 0, found
        assert kernel.local_bytes == 0, found
