"""Which experts of a layer are loaded together, by the placements of their three tensors."""

from __future__ import annotations

import pytest

from hybrid.errors import PlacementError
from hybrid.moe.groups import ExpertGroup, group_experts
from hybrid.placement.plan import ExpertShare, Placement

NAMES = ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight")


def divided(*shares: tuple[str, tuple[int, ...]], format: str | None = None) -> Placement:
    parts = tuple(
        ExpertShare(device, f"rules.yaml:{line}:3", experts, len(experts), format=format)
        for line, (device, experts) in enumerate(shares, 1)
    )
    return Placement(parts[0].device, parts[0].rule, sum(p.n_bytes for p in parts), shares=parts)


def on(device: str) -> Placement:
    return Placement(device, "auto", 4)


def group(*placements: Placement) -> list[ExpertGroup]:
    return group_experts(dict(zip(NAMES, placements, strict=True)), 4)


def test_one_device_takes_all() -> None:
    assert group(*[on("cpu")] * 3) == [ExpertGroup("cpu", None)]


def test_shares_become_groups_in_the_order_of_their_experts() -> None:
    found = group(*[divided(("fake:1", (1, 3)), ("cpu", (0, 2)))] * 3)
    assert found == [ExpertGroup("cpu", (0, 2)), ExpertGroup("fake:1", (1, 3))]


def test_shares_of_one_device_and_format_are_loaded_together() -> None:
    assert group(*[divided(("cpu", (0,)), ("cpu", (1, 2, 3)))] * 3) == [ExpertGroup("cpu", None)]
    found = group(*[divided(("cpu", (0,)), ("fake:0", (1, 2)), ("cpu", (3,)))] * 3)
    assert found == [ExpertGroup("cpu", (0, 3)), ExpertGroup("fake:0", (1, 2))]


def test_tensors_may_be_divided_into_shares_differently() -> None:
    whole = divided(("cpu", (0, 1)), ("fake:0", (2, 3)))
    finer = divided(("cpu", (0,)), ("cpu", (1,)), ("fake:0", (2, 3)))
    assert group(whole, finer, whole) == [ExpertGroup("cpu", (0, 1)), ExpertGroup("fake:0", (2, 3))]


def test_formats_divide_the_experts_of_a_device() -> None:
    shares = (
        ExpertShare("cpu", "a:1:1", (0, 1), 2, format="Q4_K"),
        ExpertShare("cpu", "a:2:1", (2, 3), 2, format="Q8_0"),
    )
    down = Placement("cpu", "a:1:1", 4, shares=shares)
    found = group(on("cpu"), on("cpu"), down)
    assert found == [ExpertGroup("cpu", (0, 1)), ExpertGroup("cpu", (2, 3))]


def test_weights_of_an_expert_on_different_devices_are_refused() -> None:
    one, other = divided(("cpu", (0, 1)), ("fake:0", (2, 3))), divided(("cpu", (0, 1, 2)), ("fake:0", (3,)))
    with pytest.raises(PlacementError) as error:
        group(one, one, other)
    assert str(error.value) == (
        "weights of expert 2 that are computed together are on different devices: "
        "blk.1.ffn_up_exps.weight on fake:0 (by rules.yaml:2:3), "
        "blk.1.ffn_down_exps.weight on cpu (by rules.yaml:1:3). "
        "Place them by role, or all of these by one rule."
    )
    with pytest.raises(PlacementError, match="weights of expert 2"):
        group(on("cpu"), on("cpu"), one)


@pytest.mark.parametrize(
    "shares", [[("cpu", (0, 1)), ("fake:0", (2,))], [("cpu", (0, 1, 2)), ("fake:0", (2, 3))],
               [("cpu", (0, 1)), ("fake:0", (2, 3, 4))]], ids=["missing", "twice", "too many"],
)  # fmt: skip
def test_shares_hold_every_expert_once(shares: list[tuple[str, tuple[int, ...]]]) -> None:
    with pytest.raises(PlacementError, match=r"each of the 4 experts once, found cpu experts=0-"):
        group(*[divided(*shares)] * 3)
