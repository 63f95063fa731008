"""From a header and rules to a plan."""

from __future__ import annotations

import pytest

from hybrid.errors import PlacementError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter
from hybrid.placement.planner import plan

SHAPES = {
    "token_embd.weight": (64, 32),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.1.attn_q.weight": (32, 32),
    "blk.1.ffn_up_exps.weight": (4, 64, 32),
    "output.weight": (64, 32),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for name, shape in SHAPES.items():
            writer.add_tensor(name, shape, GGMLType.F32)
    with GGUFFile.open(path, header_only=True) as opened:
        yield opened


def rules(*entries, **extra):
    listed = [{"select": select, "place": {"device": device}} for select, device in entries]
    return {"version": 1, "rules": listed, **extra}


def test_auto_puts_everything_on_the_cpu(file):
    found = plan(file)
    assert list(found.placements) == list(SHAPES)
    assert found.devices == ["cpu"]
    assert all(placement.rule == "auto" for placement in found.placements.values())
    assert found.bytes_on("cpu") == sum(info.n_bytes for info in file.tensors.values())


@pytest.mark.parametrize("name", ["default", "all-cpu"])
def test_shipped_rules_place_like_auto(file, name):
    assert plan(file, name).digest() == plan(file).digest()


def test_first_match_wins_and_the_rest_is_on_the_cpu(file):
    found = plan(file, rules(({"role": "attention", "layers": 1}, "fake:1"), ({"layers": "0-1"}, "fake:0")))
    devices = {name: placement.device for name, placement in found.placements.items()}
    assert devices == {
        "token_embd.weight": "cpu",
        "blk.0.attn_q.weight": "fake:0",
        "blk.0.ffn_up.weight": "fake:0",
        "blk.1.attn_q.weight": "fake:1",
        "blk.1.ffn_up_exps.weight": "fake:0",
        "output.weight": "cpu",
    }
    assert found.devices == ["cpu", "fake:0", "fake:1"]


def test_rule_that_matches_nothing(file):
    with pytest.raises(PlacementError, match=r"<rules>.rules\[0\]: this rule matches no tensor"):
        plan(file, rules(({"role": "router"}, "cpu")))


def test_rule_that_is_never_reached(file):
    with pytest.raises(
        PlacementError,
        match=r"rules\[1\]: this rule decides nothing: all 2 tensors .* taken by <rules>.rules\[0\]",
    ):
        plan(file, rules(({"layers": "0-1"}, "fake:0"), ({"role": "attention"}, "cpu")))


def test_rules_for_another_architecture(file):
    with pytest.raises(PlacementError, match="are for llama"):
        plan(file, rules(({"name": "*"}, "cpu"), architecture=["llama"]))
    assert plan(file, rules(({"name": "*"}, "cpu"), architecture="deepseek2")).devices == ["cpu"]


def test_digest_depends_on_devices_alone(file):
    everywhere = plan(file, rules(({"name": "*"}, "cpu")))
    assert everywhere.digest() == plan(file).digest()
    assert len(everywhere.digest()) == 8
    assert plan(file, rules(({"role": "output"}, "fake:0"))).digest() != everywhere.digest()


def test_one_line(file):
    assert plan(file).one_line() == "all 2 layers on cpu (0.00 GiB)"
    line = plan(file, rules(({"role": ["attention", "output"]}, "fake:0"))).one_line()
    assert (
        line == "cpu: dense_ffn, embedding, routed_experts (0.00 GiB); fake:0: attention, output (0.00 GiB)"
    )
