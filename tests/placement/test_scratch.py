"""The kernels' working memory as planned: the kernels' own constants, and slices of feed-forward blocks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hybrid.kernels import cpu

from hybrid.gguf import GGMLType, random_blocks
from hybrid.placement import scratch

SOURCES = Path(__file__).parents[2] / "kernels" / "cpu"
# file, C++ name -> what the plan takes it for
CONSTANTS = {
    ("kernel_abi.h", "kActBlock"): scratch._ACT_BLOCK,
    ("kernel_abi.h", "kMostTileTokens"): scratch._MOST_TILE_TOKENS,
    ("token_tile.h", "kTileWorthwhile"): scratch._TILE_WORTHWHILE,
    ("moe.cc", "kFewPairs"): scratch._FEW_PAIRS,
    ("moe.cc", "kChunkBytes"): scratch._MOE_CHUNK_BYTES,
    ("moe.cc", "kSliceBytes"): scratch._MOE_SLICE_BYTES,
    ("moe.cc", "kUnitsPerThread"): 4,
    ("flash_attention.h", "kKeySplit"): scratch._KEY_SPLIT,
    ("flash_attention.cc", "kRowsPerUnit"): scratch._ROWS_PER_UNIT,
    ("flash_attention.cc", "kMostStateFloats"): scratch._MOST_STATE_FLOATS,
    ("ops_table.h", "kLanes"): scratch._LANES,
    ("ops_table.h", "kKeyBlock"): scratch._KEY_BLOCK,
    ("ops_table.h", "kPanel"): scratch._PANEL,
    ("absorb.cc", "kTileTokens"): scratch._ABSORB_TOKENS,
    ("absorb.cc", "kTileColumns"): scratch._ACT_BLOCK,
    ("scratch.cc", "kHugePage"): scratch._HUGE_PAGE,
    ("scratch.cc", "kSmallestChunk"): scratch._MIB,
}


@pytest.mark.parametrize(("place", "planned"), CONSTANTS.items(), ids=lambda value: str(value))
def test_constants_are_those_of_the_kernels(place, planned):
    file, name = place
    found = re.search(rf"constexpr \w+ {name} = ([^;]+);", (SOURCES / file).read_text())
    assert found is not None, f"{file} has no {name} any more"
    text = re.sub(r"(?:u?int64_t|size_t)\{(\d+)\}", r"\1", found[1])
    assert re.fullmatch(r"[\d <]+", text), text
    number, _, shift = text.partition("<<")
    assert int(number) << int(shift or 0) == planned


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_experts_in_slices_take_what_is_planned(tokens, slices):
    experts, k, hidden, width, threads = 8, 2, 512, 768, 3
    pool = cpu.ThreadPool(threads, [], [])
    cuts = [0, *(width // 3 * n for n in range(1, slices)), width]

    def stack(rows, cols, division):
        nodes, at = ([], []) if slices == 1 else ([-1] * slices, cuts)
        layout = (division, nodes, at) if slices > 1 else ("none", [], [])
        matrix = cpu.PackedMatrix(int(GGMLType.Q8_0), experts, rows, cols, *layout)
        data = random_blocks(GGMLType.Q8_0, rows, cols, np.random.default_rng(0))
        for expert in range(experts):
            matrix.pack_rows(pool, expert, 0, rows, data.ctypes.data)
        return matrix

    gate, up, down = (
        stack(width, hidden, "rows"),
        stack(width, hidden, "rows"),
        stack(hidden, width, "cols"),
    )
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    x, weights = np.ones((tokens, hidden), np.float32), np.ones((tokens, k), np.float32)
    out = np.empty_like(x)
    cpu.release_scratch()
    before = cpu.scratch_bytes()
    for _ in range(2):
        cpu.moe(
            pool, gate, up, down, x.ctypes.data, tokens, ids.ctypes.data, weights.ctypes.data, k,
            out.ctypes.data,
        )  # fmt: skip
    taken = cpu.scratch_bytes() - before
    planned = scratch._Scratch()
    for _ in range(2):
        planned.run(scratch._moe(tokens, k, experts, hidden, width, threads, slices))
    # Shares are counted as the most there can be.
    assert abs(planned.total - taken) <= max(0.05 * taken, 1 << 20), (planned.total, taken)
