"""Routed experts divided over devices against one stack of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hybrid.backends.fake import FakeBackend, FloatMatrix
from hybrid.moe.experts import Experts, ExpertStack

NUM_EXPERTS, TOKENS, HIDDEN, WIDTH = 6, 9, 8, 5
DIVISIONS: dict[str, list[tuple[int, ...]]] = {
    "runs": [(0, 1, 2), (3, 4, 5)],
    "interleaved": [(1, 3, 5), (0, 2, 4)],
    "three devices": [(5,), (0, 4), (1, 2, 3)],
    "one each": [(e,) for e in range(NUM_EXPERTS)],
}


class Device(FakeBackend):
    """Keeps the ids that its experts were called with, and says what it received."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ids: list[torch.Tensor] = []

    def moe(
        self,
        x: torch.Tensor,
        gate: FloatMatrix,
        up: FloatMatrix,
        down: FloatMatrix,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        self.ids.append(topk_ids)
        return super().moe(x, gate, up, down, topk_ids, topk_weights)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = [
    noise(NUM_EXPERTS, WIDTH, HIDDEN, seed=1),
    noise(NUM_EXPERTS, WIDTH, HIDDEN, seed=2),
    noise(NUM_EXPERTS, HIDDEN, WIDTH, seed=3),
]
X = noise(TOKENS, HIDDEN, seed=4)
# Three different experts a token; some of them dropped, of the last token all.
IDS = torch.stack([torch.randperm(NUM_EXPERTS, generator=torch.Generator().manual_seed(t))[:3]
                   for t in range(TOKENS)]).int()  # fmt: skip
IDS[2, 1] = IDS[5, 0] = -1
IDS[-1] = -1
SHARES = noise(TOKENS, 3, seed=5).abs()


def stack(device: FakeBackend, experts: Sequence[int] | None) -> ExpertStack:
    chosen = list(range(NUM_EXPERTS) if experts is None else experts)
    gate, up, down = (FloatMatrix(w[chosen], quantized=False) for w in WEIGHTS)
    return ExpertStack(device, gate, up, down, experts)


@pytest.mark.parametrize("division", DIVISIONS)
def test_parts_sum_to_the_whole(division: str) -> None:
    whole = Experts([stack(FakeBackend(), None)], NUM_EXPERTS)(X, IDS, SHARES)
    devices = [Device(f"fake:{i}") for i in range(len(DIVISIONS[division]))]
    parts = [stack(device, experts) for device, experts in zip(devices, DIVISIONS[division], strict=True)]
    found = Experts(parts, NUM_EXPERTS)(X, IDS, SHARES)
    # Three terms a token, added in another order.
    assert torch.allclose(found, whole, rtol=0, atol=3 * 2.0**-24 * float(whole.abs().max()))
    assert whole[:-1].abs().amin() > 0
    assert not found[-1].any()
    for device, experts in zip(devices, DIVISIONS[division], strict=True):
        (ids,) = device.ids
        assert ids.dtype is torch.int32
        expected = [[experts.index(e) if e in experts else -1 for e in row] for row in IDS.tolist()]
        assert ids.tolist() == expected


def test_parts_are_summed_in_the_order_of_the_devices() -> None:
    parts = [stack(FakeBackend(f"fake:{i}"), experts) for i, experts in enumerate([(0, 3), (1, 4), (2, 5)])]
    first, second, third = (Experts([part], NUM_EXPERTS)(X, IDS, SHARES) for part in parts)
    assert torch.equal(Experts(parts, NUM_EXPERTS)(X, IDS, SHARES), (first + second) + third)


def test_inputs_are_left_as_they_are() -> None:
    before = X.clone(), IDS.clone(), SHARES.clone()
    Experts([stack(FakeBackend(), (0, 1)), stack(FakeBackend("fake:1"), (2, 3, 4, 5))], NUM_EXPERTS)(
        X, IDS, SHARES
    )
    assert all(torch.equal(a, b) for a, b in zip(before, (X, IDS, SHARES), strict=True))


def test_an_undivided_layer_passes_ids_on() -> None:
    device = Device("fake:0")
    experts = Experts([stack(device, None)], NUM_EXPERTS)
    experts(X, IDS, SHARES)
    assert device.ids[0] is IDS
    assert experts.can_record


def test_looked_up_ids_are_not_recorded() -> None:
    assert not Experts([stack(FakeBackend(), (0, 1, 2, 3, 4, 5))], NUM_EXPERTS).can_record
