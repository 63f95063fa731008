"""What a plan counts when a stack of experts is divided over devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid.placement.plan import ExpertShare, Placement, Plan

GATE = "blk.1.ffn_gate_exps.weight"
NORM = "blk.1.ffn_norm.weight"


def share(device: str, *experts: int, n_bytes: int = 0, **rest: str) -> ExpertShare:
    return ExpertShare(device, "auto", experts, n_bytes or 10 * len(experts), **rest)


def divided(*shares: ExpertShare) -> Plan:
    placement = Placement(shares[0].device, "auto", sum(s.n_bytes for s in shares), shares=shares)
    return Plan({GATE: placement, NORM: Placement("cpu", "auto", 5)})


SPLIT = (share("cpu", 0, 1, 5), share("fake:0", 2, 4), share("fake:1", 3))


def test_every_share_counts_where_it_lies() -> None:
    plan = divided(*SPLIT)
    assert plan.devices == ["cpu", "fake:0", "fake:1"]
    assert {device: plan.bytes_on(device) for device in plan.devices} == {
        "cpu": 35,
        "fake:0": 20,
        "fake:1": 10,
    }
    assert sum(map(plan.bytes_on, plan.devices)) == sum(p.n_bytes for p in plan.placements.values())


def test_devices_that_hold_nothing_but_shares_are_named() -> None:
    line = divided(*SPLIT).one_line()
    assert line.startswith("cpu: norm, routed_experts (")
    assert "fake:0: routed_experts (" in line and "fake:1: routed_experts (" in line


def test_a_divided_stack_says_which_experts_are_where() -> None:
    assert str(divided(*SPLIT).placements[GATE]) == (
        "cpu experts=0-1,5; fake:0 experts=2,4; fake:1 experts=3"
    )


@pytest.mark.parametrize(
    "shares",
    [
        (share("cpu", 0, 1), share("fake:0", 2, 4, 5), share("fake:1", 3)),
        (share("cpu", 0, 1, 5), share("fake:1", 2, 4), share("fake:0", 3)),
        (share("cpu", 0, 1, 5), share("fake:0", 2, 4), replace(SPLIT[2], format="Q4_K")),
        (share("cpu", 0, 1, 5), share("fake:0", 2, 4), replace(SPLIT[2], numa="shard")),
    ],
    ids=["experts", "devices", "format", "numa"],
)
def test_the_digest_tells_divisions_apart(shares: tuple[ExpertShare, ...]) -> None:
    assert divided(*shares).digest() != divided(*SPLIT).digest()


def test_the_digest_ignores_where_a_decision_came_from() -> None:
    renamed = tuple(replace(s, rule="other.yaml:3:5") for s in SPLIT)
    assert divided(*renamed).digest() == divided(*SPLIT).digest()
