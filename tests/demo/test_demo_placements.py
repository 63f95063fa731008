"""The demo model divided over devices: every placement computes the same, and lies where its plan says.

Texts are teacher-forced. The test devices round the inputs of quantised products to int8 as the CPU does, so
placements differ by the order of float32 sums alone, and by the int8 codes that this tips over: logits, of
deviation 2.8, by `ERROR`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.backends.base import Backend
from hybrid.backends.fake import FakeBackend
from hybrid.backends.registry import create_backend
from hybrid.config import model_path
from hybrid.forward import SingleSequence
from hybrid.gguf import GGUFFile
from hybrid.gguf.read_ahead import Request
from hybrid.gguf.reader import Range
from hybrid.models import weights as weights_module
from hybrid.models.loader import Model, load_model
from hybrid.moe import experts as experts_module
from hybrid.placement.capabilities import kind_of, matrix_bytes
from hybrid.placement.plan import ExpertShare, Plan
from hybrid.placement.planner import plan
from hybrid.placement.roles import role_of
from hybrid.tokenizer import Tokenizer

TEXTS, LENGTH, EXPERTS = 8, 256, 16
ERROR = 0.03  # root of the mean square over all logits
MEAN_KL = 1e-4

Shares = dict[str, tuple[int, ...]]
LAYERS = [({"layers": 1}, "fake:0"), ({"layers": 3}, "fake:1")]
IN_THREES: Shares = {
    device: tuple(range(first, EXPERTS, 3)) for first, device in enumerate(["cpu", "fake:0", "fake:1"])
}
SPLITS: dict[str, tuple[list[tuple[dict[str, Any], str]], Shares]] = {
    "all on fake:0": ([({"name": "*"}, "fake:0")], {}),
    "by layer": (LAYERS, {}),
    "by expert": ([], IN_THREES),
    "by expert, off the cpu": ([], {"fake:1": (0, 1, 2, 9), "fake:0": (*range(3, 9), *range(10, 16))}),
    "by layer and expert": (LAYERS, IN_THREES),
    "experts in the cpu": ([({"role": "routed_experts"}, "cpu"), ({"name": "*"}, "fake:0")], {}),
}


def make_plan(file: GGUFFile, split: str) -> Plan:
    places, shares = SPLITS[split]
    rules = [{"select": select, "place": {"device": device}} for select, device in places]
    planned = plan(file, {"version": 1, "rules": rules} if rules else "auto")
    return divide(file, planned, shares) if shares else planned


def divide(file: GGUFFile, planned: Plan, shares: Shares) -> Plan:
    """The plan with the experts of every layer divided."""
    placements = dict(planned.placements)
    for name, placement in placements.items():
        if role_of(name) == "routed_experts":
            info = file.tensors[name]
            parts = tuple(
                ExpertShare(
                    device,
                    "auto",
                    experts,
                    matrix_bytes(info.type, kind_of(device), (len(experts), *info.shape[1:])),
                )
                for device, experts in shares.items()
            )
            placements[name] = replace(
                placement, device=parts[0].device, n_bytes=sum(p.n_bytes for p in parts), shares=parts
            )
    return replace(planned, placements=placements)


def create(device: str, num_threads: int | None = None) -> Backend:
    if device.startswith("fake"):
        return FakeBackend(device, activation="q8")
    return create_backend(device, num_threads)


@pytest.fixture(scope="module")
def file() -> Iterator[GGUFFile]:
    with GGUFFile.open(model_path("demo")) as opened:
        yield opened


@pytest.fixture(scope="module")
def texts(file: GGUFFile, part: Callable[[str], ModuleType]) -> np.ndarray:
    """int32 ``[TEXTS, LENGTH]``: stories like those the model was trained on."""
    documents = itertools.islice(part("corpus").documents(seed=12345), 20)
    ids = Tokenizer.from_gguf(file).encode("\n".join(document.text for document in documents))
    return np.array(ids[: TEXTS * LENGTH], dtype=np.int32).reshape(TEXTS, LENGTH)


Load = Callable[[Plan], Model]


@pytest.fixture
def load(file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Loads a model by its plan; closed at the end."""
    monkeypatch.setattr(weights_module, "create_backend", create)
    models: list[Model] = []

    def load_(planned: Plan) -> Model:
        models.append(load_model(file, plan=planned, max_model_len=LENGTH, num_threads=2, kv_format="f32"))
        return models[-1]

    yield load_
    for model in models:
        model.close()


def logits_of(model: Model, texts: np.ndarray) -> torch.Tensor:
    """``[TEXTS * LENGTH, vocab]``, what follows every token of every text."""
    model.allocate_cache(LENGTH // 64)
    rows = []
    with torch.inference_mode():
        for text in texts:
            sequence = SingleSequence(model, LENGTH)
            rows += [model.compute_logits(hidden) for hidden in sequence.extend(text)]
    return torch.cat(rows)


@pytest.fixture(scope="module")
def expected(file: GGUFFile, texts: np.ndarray) -> torch.Tensor:
    """Logits with everything on the CPU."""
    model = load_model(file, plan=plan(file), max_model_len=LENGTH, num_threads=2, kv_format="f32")
    try:
        return logits_of(model, texts)
    finally:
        model.close()


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits ``[n, vocab]`` are equal: the same best token wherever it leads by four times the error,
    distributions and logits as close as stated."""
    best = expected.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 4 * ERROR
    assert clear.float().mean() > 0.7
    same = bool((found.argmax(-1) == expected.argmax(-1))[clear].all())
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return same and kl <= MEAN_KL and float((found - expected).square().mean().sqrt()) <= ERROR


@pytest.mark.parametrize("split", SPLITS)
def test_placements_compute_the_same(
    file: GGUFFile, texts: np.ndarray, expected: torch.Tensor, load: Load, split: str
) -> None:
    planned = make_plan(file, split)
    assert planned.devices != ["cpu"]
    found = logits_of(load(planned), texts)
    assert agree(found, expected)


def test_single_steps_of_divided_experts(
    file: GGUFFile, texts: np.ndarray, expected: torch.Tensor, load: Load
) -> None:
    model = load(make_plan(file, "by expert"))
    model.allocate_cache(LENGTH // 64)
    sequence = SingleSequence(model, LENGTH)
    with torch.inference_mode():
        found = torch.cat([sequence.next_logits(texts[0, i : i + 1]) for i in range(LENGTH)])
    assert agree(found, expected[:LENGTH])


def test_the_comparison_notices_an_expert_that_is_lost(
    file: GGUFFile,
    texts: np.ndarray,
    expected: torch.Tensor,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = experts_module._places

    def losing(*args: Any) -> torch.Tensor:
        found = places(*args)
        assert found is not None
        found[11] = -1
        return found

    monkeypatch.setattr(experts_module, "_places", losing)
    found = logits_of(load(make_plan(file, "by expert")), texts)
    assert not agree(found, expected)


@pytest.mark.parametrize("split", SPLITS)
def test_every_share_takes_the_bytes_that_are_planned(
    file: GGUFFile, load: Load, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    planned = make_plan(file, split)
    read: dict[str, list[tuple[int, int]]] = {}
    read_into, request = GGUFFile.read_into, GGUFFile.request

    def noting_ahead(self: GGUFFile, entry: Range) -> Request:
        read.setdefault(entry.tensor, []).append((entry.offset, entry.offset + entry.n_bytes))
        return request(self, entry)

    def noting(self: GGUFFile, name: str, buffer: Any, offset: int = 0, length: int | None = None) -> None:
        count = file.tensors[name].n_bytes - offset if length is None else length
        read.setdefault(name, []).append((offset, offset + count))
        read_into(self, name, buffer, offset, length)

    monkeypatch.setattr(GGUFFile, "read_into", noting)
    monkeypatch.setattr(GGUFFile, "request", noting_ahead)
    loaded = load(planned).loaded_bytes
    for name, placement in planned.placements.items():
        for share in placement.shares or (placement,):
            assert loaded.pop((name, share.device)) == share.n_bytes, (name, share)
        ranges = sorted(read.pop(name))
        # All of the file's bytes, each once: no device reads what another has.
        assert ranges[0][0] == 0
        assert ranges[-1][1] == file.tensors[name].n_bytes
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert not loaded
    assert not read
