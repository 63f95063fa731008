"""Which experts get copies: against all choices there are, and in plans."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

from hybrid.cli.main import main
from hybrid.errors import PlacementError
from hybrid.gguf import GGUFFile
from hybrid.placement.hot_experts import LayerExperts, choose, choose_slots
from hybrid.placement.machine import GIB, Device, Machine
from hybrid.placement.memory import RunSize
from hybrid.placement.planner import Planner
from hybrid.placement.sections import EXPERT_CACHE
from hybrid.placement.usage import Usage, UsageProfile, identify, write_profile
from hybrid.synth import resolve_shape, synthesise


def random_layers(seed, sizes=(10,), num_layers=3, num_experts=4):
    rng = np.random.default_rng(seed)
    return [
        LayerExperts(
            layer, str(layer % len(sizes)), sizes[layer % len(sizes)],
            dict(enumerate(rng.dirichlet([0.4] * num_experts) * 2)), float(rng.uniform(0.5, 2)),
        )
        for layer in range(num_layers)
    ]  # fmt: skip


def best_by_force(layers, capacity, layer_s):
    everything = [(layer, expert) for layer in layers for expert in layer.rates]
    best = 0.0
    for count in range(len(everything) + 1):
        for some in itertools.combinations(everything, count):
            if sum(layer.n_bytes for layer, _ in some) <= capacity:
                gain = sum(layer.rates[expert] * layer.saved_s for layer, expert in some)
                best = max(best, gain - layer_s * len({layer.layer for layer, _ in some}))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [0, 9, 10, 35, 60, 1000])
def test_no_choice_of_equal_experts_saves_more(seed, capacity):
    layers = random_layers(seed)
    found = choose(layers, capacity)
    assert found.n_bytes == 10 * found.num_experts <= capacity
    assert found.saved_s == pytest.approx(best_by_force(layers, capacity, 0.0), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_of_unequal_experts_one_at_most_is_lost(seed):
    layers = random_layers(seed, sizes=(7, 11, 13))
    most = max(rate * layer.saved_s for layer in layers for rate in layer.rates.values())
    for capacity in (20, 40, 77):
        found = choose(layers, capacity)
        assert found.n_bytes <= capacity
        assert found.saved_s >= best_by_force(layers, capacity, 0.0) - most


@pytest.mark.parametrize("seed", range(8))
def test_layers_that_do_not_earn_their_cost_get_none(seed):
    layers = random_layers(seed)
    for layer_s in (0.2, 0.8, 5.0):
        found = choose(layers, 60, layer_s)
        for layer in layers:
            experts = found.experts.get(layer.layer, ())
            assert not experts or sum(layer.rates[e] for e in experts) * layer.saved_s >= layer_s
        assert 0 <= found.saved_s <= best_by_force(layers, 60, layer_s) + 1e-12
        assert found.saved_s >= choose(layers, 60).saved_s - layer_s * 3 - 1e-12


def test_the_rate_of_hits_is_that_of_the_uses():
    layers = [LayerExperts(1, "a", 1, {0: 0.5, 1: 1.5}, 1.0), LayerExperts(2, "a", 1, {0: 1.0, 1: 1.0}, 1.0)]
    found = choose(layers, 2)
    assert found.experts == {1: (1,), 2: (0,)} and found.hit_rate == 2.5 / 4


def test_where_nothing_is_saved_the_most_used_are_taken():
    layers = [LayerExperts(1, "a", 1, {0: 0.5, 1: 1.5}, 0.0)]
    found = choose(layers, 1, layer_s=1.0)
    assert found.experts == {1: (1,)} and found.saved_s == -1.0


def test_without_a_profile_copies_are_spread():
    layers = [
        LayerExperts(n, "ab"[n % 2], 10 + 5 * (n % 2), dict.fromkeys(range(8), 0.5), 1.0) for n in range(4)
    ]
    found = choose_slots(layers, 200)
    assert [len(found.experts[n]) for n in range(4)] == [4, 4, 4, 4]
    assert found.hit_rate == 0.5 and found.n_bytes == 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Layers 0-2, of which 1 and 2 have 8 experts, and a profile in which experts 5 and 6 take most uses."""
    folder = tmp_path_factory.mktemp("hot")
    synthesise(folder / "tiny.gguf", resolve_shape("tiny", num_experts=8))
    with GGUFFile.open(folder / "tiny.gguf") as file:
        counts = {"prompt": (0,) * 8, "decode": (40, 5, 5, 5, 5, 90, 100, 50)}
        usage = Usage({"prompt": 0, "decode": 100}, dict.fromkeys((1, 2), counts))
        write_profile(UsageProfile(identify(file), 8, 4, usage), folder / "usage.json")
    return folder


MACHINE = Machine((Device("cpu", 8 * GIB), Device("cuda:0", 8 * GIB)), num_threads=4)
EXPERT = 3 * 256 * 256 * 144 // 256  # bytes of three Q4_K matrices


def rules(folder, profile="usage.json", policy="static", size=4 * EXPERT, device="cuda:0"):
    path = folder / "rules.yaml"
    named = f", profile: {profile}" if profile else ""
    path.write_text(
        "version: 1\nrules:\n  - select: {role: routed_experts}\n    place: {device: cpu}\n"
        '  - select: {name: "*"}\n    place: {device: "' + device + '"}\n'
        f'experts:\n  cache: {{device: "{device}", bytes: {size}B, policy: {policy}{named}}}\n'
    )
    return path


def planned(folder, header_only=False, **options):
    with GGUFFile.open(folder / "tiny.gguf", header_only=header_only) as file:
        return Planner(file, rules(folder, **options), MACHINE).plan(RunSize(256))


def test_a_plan_names_the_copies_and_what_they_do(tiny):
    found = planned(tiny)
    cache = found.expert_cache
    assert cache.chosen.experts == {1: (5, 6), 2: (5, 6)} and cache.num_experts == 16
    assert cache.chosen.hit_rate == pytest.approx(190 / 300)
    assert found.memory["cuda:0"].scratch_parts[EXPERT_CACHE] == cache.chosen.n_bytes == 4 * EXPERT
    assert found.placements["blk.1.ffn_up_exps.weight"].device == "cpu"  # a copy frees no RAM
    assert cache.pays == (cache.decode_tps > cache.without_tps)


@pytest.mark.parametrize("bandwidth, pays", [(10e9, True), (3000e9, False)])
def test_the_verdict_follows_the_rates(tmp_path, bandwidth, pays):
    """Experts of V3's size: slow RAM makes copies worth it, RAM faster than the GPU's does not."""
    path = tmp_path / "v3.gguf"
    synthesise(path, resolve_shape("deepseek-v3"), header_only=True)
    machine = Machine(
        (Device("cpu", 900 * GIB, bandwidth), Device("cuda:0", 24 * GIB)), num_threads=9999, imagined=True
    )
    with GGUFFile.open(path, header_only=True) as file:
        plan = Planner(file, "hot-experts", machine).plan(RunSize(4096))
    assert plan.expert_cache.pays is pays
    assert ("it pays" in str(plan.expert_cache)) is pays
    assert any("it does not pay" in warning for warning in plan.warnings) is not pays


def test_a_dynamic_cache_needs_no_profile(tiny):
    cache = planned(tiny, policy="dynamic", profile=None).expert_cache
    assert {n: len(experts) for n, experts in cache.chosen.experts.items()} == {1: 2, 2: 2}
    assert cache.chosen.hit_rate == 0.25 and "used alike" in str(cache)


def test_the_plan_prints_the_decision(tiny, capsys):
    argv = ["plan", str(tiny / "tiny.gguf"), "--rules", str(rules(tiny)), "--vram", "8GiB", "-c", "256"]
    for output in ("md", "html"):
        assert main([*argv, "-o", output]) == 0
        printed = capsys.readouterr().out
        # Which of the layers' experts, and so how many uses, is a matter of this machine's rates.
        assert re.search(r"copies of 4 of 16 experts, static, [0-9.]+% of uses expected to find one", printed)
    assert main([*argv, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["expert_cache"]
    assert sum(map(len, found["layers"].values())) == found["copies"] == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"profile": None}, r"rules.yaml:8:\d+: policy: static needs a profile"),
        (
            {"profile": "absent.json"},
            r"rules.yaml:8:\d+: profile: .*absent.json: cannot read the usage profile",
        ),
        ({"size": EXPERT - 1}, r"rules.yaml:8:\d+: bytes: expected at least the \d+ bytes of one expert"),
    ],
)
def test_what_is_wrong_has_its_place(tiny, options, message):
    with pytest.raises(PlacementError, match=message):
        planned(tiny, **options)


def test_a_profile_of_another_model_is_refused(tiny, tmp_path):
    synthesise(tmp_path / "tiny.gguf", resolve_shape("tiny", num_experts=8), seed=7)
    profile = str(tiny / "usage.json")
    with pytest.raises(PlacementError, match=r"rules.yaml:8:\d+: profile: .*routers' weights differ"):
        planned(tmp_path, profile=profile)
    assert planned(tmp_path, profile=profile, header_only=True).expert_cache is not None


def test_experts_that_are_placed_get_no_copies(tiny):
    with GGUFFile.open(tiny / "tiny.gguf") as file:
        placed = {
            "version": 1,
            "rules": [{"select": {"name": "*"}, "place": {"device": "cuda:0"}}],
            "experts": {"cache": {"device": "cuda:0", "bytes": "1GiB"}},
        }
        with pytest.raises(PlacementError, match="no routed experts are on the CPU"):
            Planner(file, placed, MACHINE).plan(RunSize(256))
