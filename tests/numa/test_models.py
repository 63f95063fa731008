"""Whole models in every mode: the same tokens, all pages local, and a node without room refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid import LLM, SamplingParams
from hybrid.errors import CapacityError, PlacementError
from hybrid.gguf import GGMLType
from hybrid.synth import Formats, resolve_shape, synthesise

PageNodes = Callable[[int, int], list[int]]

pytestmark = pytest.mark.numa

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = "Once upon a time"
EXACT = ("none", "replicate", "interleave", "node:{0}", "node:{1}")


def matrices(llm: LLM) -> list[cpu.PackedMatrix]:
    """Every packed matrix of a loaded model, wherever layers keep them."""
    found: dict[int, cpu.PackedMatrix] = {}
    seen: set[int] = set()

    def walk(value: object) -> None:
        if isinstance(value, cpu.PackedMatrix):
            found[id(value)] = value
        elif id(value) not in seen and not isinstance(value, str | bytes | int | float):
            seen.add(id(value))
            for inner in (
                value if isinstance(value, list | tuple) else vars(value).values() if _plain(value) else ()
            ):
                walk(inner)

    walk(llm._loaded.engine.model._network)
    return list(found.values())


def _plain(value: object) -> bool:
    return hasattr(value, "__dict__") and type(value).__module__.startswith("hybrid.")


def local_share(llm: LLM, page_nodes: PageNodes) -> float:
    """Of pages that have a node of their own, how many are there: by this test's own calls."""
    local = total = 0
    for matrix in matrices(llm):
        for part in matrix.parts:
            if part["node"] >= 0:
                pages = page_nodes(part["address"], part["nbytes"])
                local += sum(node == part["node"] for node in pages)
                total += len(pages)
    assert total
    return local / total


def tokens(llm: LLM) -> list[int]:
    return list(llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with LLM("demo", max_model_len=64, num_threads=1, numa="none") as llm:
        return tokens(llm)


@pytest.mark.parametrize("mode", [*EXACT, "auto"])
def test_the_demo_model_writes_the_same_in_every_mode(
    mode: str, nodes: list[int], expected: list[int], page_nodes: PageNodes
) -> None:
    with LLM("demo", max_model_len=64, num_threads=2, numa=mode.format(*nodes)) as llm:
        assert tokens(llm) == expected
        if mode == "auto":
            assert llm.plan().numa == "replicate"
        if mode in ("auto", "replicate") or mode.startswith("node"):
            assert local_share(llm, page_nodes) == 1
            locality = llm._loaded.locality
            assert locality is not None and (locality.share, locality.method) == (1.0, "move_pages")
            assert "100% local by move_pages" in llm.describe()


def test_the_demo_model_with_its_dense_block_in_slices(
    nodes: list[int], expected: list[int], page_nodes: PageNodes
) -> None:
    """768 wide: two blocks of 256 for the first node, one for the second. Experts of one are refused."""
    rules = {
        "version": 1,
        "rules": [{"select": {"role": "dense_ffn"}, "place": {"device": "cpu", "numa": "shard"}}],
    }
    with LLM("demo", rules, max_model_len=64, num_threads=2, numa="replicate") as llm:
        assert llm.plan().placements["blk.0.ffn_down.weight"].numa == "shard"
        down = next(m for m in matrices(llm) if m.division == "cols")
        assert [part["cols"] for part in down.parts] == [(0, 512), (512, 768)]
        assert local_share(llm, page_nodes) == 1
        assert tokens(llm) == expected
    with pytest.raises(PlacementError, match="blocks of 256"):
        LLM("demo", max_model_len=64, num_threads=2, numa="shard")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose experts are 768 wide."""
    path = tmp_path_factory.mktemp("numa") / "wide.gguf"
    shape = resolve_shape("tiny", num_layers=2, num_experts=4, moe_intermediate_size=768)
    synthesise(path, shape, Formats(experts=GGMLType.Q4_K, down=GGMLType.Q6_K))
    return path


def test_a_model_in_slices_writes_the_same(wide: Path, nodes: list[int], page_nodes: PageNodes) -> None:
    found = {}
    for mode in ("none", "shard", "replicate"):
        with LLM(wide, max_model_len=64, num_threads=2, numa=mode) as llm:
            found[mode] = tokens(llm)
            if mode != "none":
                assert local_share(llm, page_nodes) == 1
            if mode == "shard":
                kinds = {matrix.division for matrix in matrices(llm)}
                assert {"rows", "cols"} <= kinds
    assert found["shard"] == found["none"] == found["replicate"]


def test_corrupting_the_second_nodes_copy_changes_its_workers_rows_alone(
    pool: cpu.ThreadPool, nodes: list[int], page_nodes: PageNodes
) -> None:
    rng = np.random.default_rng(5)
    rows, cols = 512, 256
    blocks = np.ascontiguousarray(rng.standard_normal((rows, cols), np.float32))
    matrix = cpu.PackedMatrix(int(GGMLType.F32), 1, rows, cols, "copies", nodes, [])
    matrix.pack_rows(pool, 0, 0, rows, blocks.ctypes.data)
    x, out = rng.standard_normal((1, cols)).astype(np.float32), np.empty((2, rows), np.float32)
    cpu.linear(pool, matrix, x.ctypes.data, 1, cols, out[0].ctypes.data, rows)
    second = matrix.parts[1]
    ctypes.memset(second["address"], 0x11, second["nbytes"])
    assert set(page_nodes(second["address"], second["nbytes"])) == {nodes[1]}
    cpu.linear(pool, matrix, x.ctypes.data, 1, cols, out[1].ctypes.data, rows)
    changed = out[0] != out[1]
    # One worker on each node: the second one's rows are the second half.
    assert changed[rows // 2 :].all() and not changed[: rows // 2].any()


def test_a_node_that_lacks_memory_is_refused(nodes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.numa_nodes

    def crowded(*args: object) -> list[cpu.NumaNode]:
        found = real(*args)
        for node in found:
            if node["node"] == nodes[1]:
                node["available_bytes"] = 1 << 20
        return found

    monkeypatch.setattr(cpu, "numa_nodes", crowded)
    with pytest.raises(CapacityError, match=f"NUMA node {nodes[1]}: .*--numa auto"):
        LLM("demo", max_model_len=64, num_threads=2, numa="replicate")
    with LLM("demo", max_model_len=64, num_threads=2) as llm:
        assert llm.plan().numa == "none"
