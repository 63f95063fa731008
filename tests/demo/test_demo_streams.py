"""The demo model over devices with streams, its experts in RAM: decode steps compute what the CPU alone does.

Texts are teacher-forced. What crosses to the CPU is bfloat16, so the CPU alone rounds its experts' inputs
too; then the tolerance is that of `test_demo_placements`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.backends.base import Backend
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.fake import FakeBackend
from hybrid.backends.fake_gpu import FakeGpuBackend
from hybrid.backends.fake_streams import FakeOptions
from hybrid.backends.registry import create_backend
from hybrid.gguf import GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models import weights as weights_module
from hybrid.models.loader import Model, load_model
from hybrid.placement.planner import plan

spec = importlib.util.spec_from_file_location(
    "demo_placements_of_tests", Path(__file__).with_name("test_demo_placements.py")
)
assert spec is not None and spec.loader is not None
placements = importlib.util.module_from_spec(spec)
spec.loader.exec_module(placements)
EXPERTS, LENGTH, TEXTS = placements.EXPERTS, placements.LENGTH, placements.TEXTS
file, texts = placements.file, placements.texts

EXPERTS_IN_RAM: list[tuple[dict[str, Any], str]] = [({"role": "routed_experts"}, "cpu")]
TO_SECOND: list[tuple[dict[str, Any], str]] = [({"layers": "2-3"}, "fakegpu:1")]
REST: list[tuple[dict[str, Any], str]] = [({"name": "*"}, "fakegpu:0")]
SPLITS: dict[str, tuple[list[tuple[dict[str, Any], str]], dict[str, tuple[int, ...]]]] = {
    "one device": (EXPERTS_IN_RAM + REST, {}),
    "two devices": (EXPERTS_IN_RAM + TO_SECOND + REST, {}),
    "embedding and output in RAM": (
        [*EXPERTS_IN_RAM, ({"role": ["embedding", "output"]}, "cpu"), *REST],
        {},
    ),
    "embedding and output on the other device": (
        [
            *EXPERTS_IN_RAM,
            ({"role": "embedding"}, "fakegpu:1"),
            *TO_SECOND,
            ({"role": "output"}, "fakegpu:0"),
            *REST,
        ],
        {},
    ),
    "experts in RAM and on devices": (
        TO_SECOND + REST,
        {
            "cpu": tuple(range(0, EXPERTS, 2)),
            "fakegpu:0": tuple(range(1, EXPERTS, 4)),
            "fakegpu:1": tuple(range(3, EXPERTS, 4)),
        },
    ),
    "all on devices": (TO_SECOND + REST, {}),
}


class RoundingCpu(CpuBackend):
    """Experts get hidden states as bfloat16, as those do that are handed over."""

    def moe(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().moe(x.to(torch.bfloat16).float(), *args)


class RoundingDevice(FakeBackend):
    """The same for experts on a device, so that where they are makes no difference."""

    def moe(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().moe(x.to(torch.bfloat16).float(), *args)


@pytest.fixture(scope="module")
def expected(file: GGUFFile, texts: np.ndarray) -> Iterator[torch.Tensor]:
    """Logits with everything on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_module, "create_backend", lambda device, threads=None: RoundingCpu(threads))
        model = load_model(file, plan=plan(file), max_model_len=LENGTH, num_threads=2, kv_format="f32")
    logits: torch.Tensor = placements.logits_of(model, texts)
    model.close()
    yield logits


@pytest.fixture
def load(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Model]]:
    """``load(split, options)``; closed at the end."""
    models: list[Model] = []

    def load_(split: str, options: FakeOptions) -> Model:
        def create(device: str, num_threads: int | None = None) -> Backend:
            if device.startswith("fakegpu"):
                backend = FakeGpuBackend(device, "q8", options)
                backend._operations = RoundingDevice(device, "q8")
                return backend
            return RoundingCpu(num_threads) if device == "cpu" else create_backend(device, num_threads)

        monkeypatch.setattr(weights_module, "create_backend", create)
        places, shares = SPLITS[split]
        rules = [{"select": select, "place": {"device": device}} for select, device in places]
        planned = plan(file, {"version": 1, "rules": rules})
        planned = placements.divide(file, planned, shares) if shares else planned
        models.append(load_model(file, plan=planned, max_model_len=LENGTH, num_threads=2, kv_format="f32"))
        return models[-1]

    yield load_
    for model in models:
        model.close()


def decode_logits(model: Model, rows: np.ndarray) -> torch.Tensor:
    """Logits ``[len(rows) * LENGTH, vocab]`` of texts that are decoded together, a token of each at a
    time."""
    count, blocks = len(rows), LENGTH // BLOCK_SIZE
    model.allocate_cache(count * blocks)
    tables = torch.arange(count * blocks, dtype=torch.int32).view(count, blocks)
    found = []
    with torch.inference_mode():
        for position in range(LENGTH):
            positions = torch.full((count,), position, dtype=torch.int32)
            batch = AttentionBatch(
                positions=positions,
                slot_mapping=tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE,
                query_start=torch.arange(count + 1, dtype=torch.int32),
                seq_lens=positions + 1,
                block_tables=tables,
            )
            found.append(model.decode(torch.from_numpy(rows[:, position].copy()), batch))
    return torch.stack(found, 1).flatten(0, 1)


@pytest.mark.parametrize("split", SPLITS)
def test_decode_steps_compute_what_the_cpu_does(
    texts: np.ndarray, expected: torch.Tensor, load: Callable[..., Model], split: str
) -> None:
    found = decode_logits(load(split, FakeOptions(seed=5, max_delay_s=2e-4)), texts)
    assert placements.agree(found, expected)


def test_a_single_text(texts: np.ndarray, expected: torch.Tensor, load: Callable[..., Model]) -> None:
    found = decode_logits(load("two devices", FakeOptions(seed=6, max_delay_s=2e-4)), texts[:1])
    assert placements.agree(found, expected[:LENGTH])


def test_prompts_run_over_streams_too(
    texts: np.ndarray, expected: torch.Tensor, load: Callable[..., Model]
) -> None:
    model = load("experts in RAM and on devices", FakeOptions(seed=7, max_delay_s=2e-4))
    assert placements.agree(placements.logits_of(model, texts), expected)
