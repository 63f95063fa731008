"""Formats that a plan asks for are made while loading, as if the file had been quantised so."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid.backends.source import TensorSource
from hybrid.errors import ModelError, PlacementError
from hybrid.gguf import QUANTIZABLE, GGMLType, GGUFFile, GGUFWriter, dequantize, quantize
from hybrid.models.loader import load_model
from hybrid.placement.capabilities import can_multiply
from hybrid.placement.plan import ExpertShare
from hybrid.placement.planner import plan

TARGETS = sorted(type_.name for type_ in QUANTIZABLE if can_multiply(type_, "cpu"))


def place(file, placed):
    """An all-CPU plan that stores matrices as ``placed(name)`` says; ``None``: as in the file."""
    planned = plan(file)
    changed = {name: replace(p, format=placed(name)) for name, p in planned.placements.items()}
    return replace(planned, placements=changed)


def load(path, placed, **options):
    with GGUFFile.open(path) as file:
        return load_model(file, plan=place(file, placed), max_model_len=512, kv_format="f32", **options)


@pytest.fixture(scope="module")
def wide(make_reference):
    """A model all of whose rows are whole blocks of 256 weights, but those of `attn_kv_b`."""
    return make_reference("v3-wide-experts")


def is_expert(name):
    return "_exps." in name


@pytest.mark.parametrize("target", TARGETS)
def test_the_bits_are_those_of_a_file_quantised_before(wide, open_model, write_model, tmp_path, target):
    keys, tensors = wide.contents(split_kv_b=False)
    wanted = {name for name in tensors if is_expert(name) or "token_embd" in name or name == "output.weight"}
    path = write_model(
        tmp_path / "f16.gguf", keys, tensors, lambda name: GGMLType.F16 if name in wanted else GGMLType.F32
    )
    with GGUFFile.open(path) as file:  # what a quantiser reads
        stored = {n: dequantize(file.data(n), i.type, i.shape) for n, i in file.tensors.items()}
    offline = write_model(
        tmp_path / "offline.gguf",
        keys,
        stored,
        lambda name: GGMLType[target] if name in wanted else GGMLType.F32,
    )
    expected = open_model(offline).logits(wide.ids)
    runner = open_model(path)
    plain = runner.logits(wide.ids)
    with GGUFFile.open(path) as file:
        planned = place(file, lambda name: target if name in wanted else None)
        runner.model = load_model(file, plan=planned, max_model_len=512, kv_format="f32")
        found = runner.logits(wide.ids)
    sizes = runner.model.loaded_bytes
    runner.model.close()
    assert torch.equal(found, expected)
    if target not in ("F16", "F32"):
        assert not torch.equal(found, plain)
    with GGUFFile.open(offline) as file:
        assert sizes == {(name, "cpu"): p.n_bytes for name, p in plan(file).placements.items()}


def test_shares_of_one_device_have_formats_of_their_own(wide, open_model, write_model, tmp_path):
    """Experts 0 to 2 in Q4_K and the rest as they are: two stacks on one device, of float32 products."""
    everywhere = {"version": 1, "rules": [{"select": {"name": "*"}, "place": {"device": "fake:0"}}]}
    runner = open_model(wide.path, everywhere)
    with GGUFFile.open(wide.path) as file:
        changed = dict(runner.model.plan.placements)
        for name, p in changed.items():
            if is_expert(name):
                shares = (
                    ExpertShare("fake:0", "auto", (0, 1, 2), 0, format="Q4_K"),
                    ExpertShare("fake:0", "auto", (3, 4, 5, 6, 7), 0),
                )
                changed[name] = replace(p, shares=shares)
        planned = replace(runner.model.plan, placements=changed)
        runner.model = load_model(file, plan=planned, max_model_len=512, kv_format="f32")
    found = runner.logits(wide.ids)
    runner.model.close()
    keys, tensors = wide.contents(split_kv_b=False)
    for name, values in tensors.items():
        if is_expert(name):
            rounded = dequantize(quantize(values[:3], GGMLType.Q4_K), GGMLType.Q4_K, values[:3].shape)
            tensors[name] = np.concatenate([rounded, values[3:]])
    expected = open_model(write_model(tmp_path / "rounded.gguf", keys, tensors), everywhere).logits(wide.ids)
    scale = expected.max() - expected.min()
    assert (found - expected).abs().max() <= 1e-5 * scale
    assert (found - wide.logits).abs().max() > 1e-2 * scale


def source_of(tmp_path, rows, cols, target, values=None):
    path = tmp_path / "source.gguf"
    if values is None:
        values = np.random.default_rng(0).standard_normal((rows, cols), dtype=np.float32)
    with GGUFWriter(path) as writer:
        writer.add_tensor("a", (rows, cols), GGMLType.F32)
        writer.write_tensor("a", values.view(np.uint8))
    file = GGUFFile.open(path)
    return TensorSource(file, file.tensors["a"], 1, rows, cols, format=target), values


@pytest.mark.parametrize("rows, cols", [(7, 256), (2000, 256), (3, 1 << 19)])
def test_pieces_make_the_whole(tmp_path, rows, cols):
    """Rows are quantised piece by piece; where pieces end shows nowhere."""
    source, values = source_of(tmp_path, rows, cols, GGMLType.Q4_K)
    with source.file:
        out = np.full(rows * source.row_bytes + 1, 0xAA, dtype=np.uint8)
        source.read_rows(0, 0, rows, out)
        assert (out[:-1] == quantize(values, GGMLType.Q4_K).reshape(-1)).all()
        assert out[-1] == 0xAA
        source.read_rows(0, 2, 1, out)
        assert (out[: source.row_bytes] == quantize(values[2], GGMLType.Q4_K)).all()


def test_memory_for_it_is_bounded(tmp_path):
    """However large the matrix: what is converted at once is 1 MiB of float32 and the quantiser's copies."""
    peaks = []
    for rows in (1024, 8192):
        source, _ = source_of(tmp_path, rows, 1024, GGMLType.Q4_0)
        with source.file:
            out = np.empty(rows * source.row_bytes, dtype=np.uint8)
            tracemalloc.start()
            source.read_rows(0, 0, rows, out)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0] <= 24 << 20


@pytest.mark.parametrize(
    "bad, problem", [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "is too large for Q4_K")]
)
def test_weights_that_the_format_cannot_hold_are_named(tmp_path, bad, problem):
    values = np.ones((4, 256), dtype=np.float32)
    values[2, 7] = bad
    source, _ = source_of(tmp_path, 4, 256, GGMLType.Q4_K, values)
    with source.file, pytest.raises(ModelError, match=f"tensor 'a' cannot be stored as Q4_K: .*{problem}"):
        source.read_rows(0, 0, 4, np.empty(4 * source.row_bytes, dtype=np.uint8))


@pytest.mark.parametrize(
    "target, problem",
    [
        ("IQ1_S", r"there is no quantiser for IQ1_S; choose one of BF16, F16, F32, .*Q8_0, TQ1_0, TQ2_0$"),
        ("Q4_K", r"its rows of 96 weights are no whole blocks of Q4_K, which have 256$"),
        ("I32", r"there is no quantiser for I32"),
    ],
)
def test_formats_that_cannot_be_made_are_refused_before_reading(make_reference, monkeypatch, target, problem):
    reference = make_reference("v3")
    monkeypatch.setattr(GGUFFile, "read_into", lambda *args: pytest.fail("read"))
    with pytest.raises(
        PlacementError, match=f"^auto: .*_exps.weight cannot be stored as {target}: {problem}"
    ):
        load(reference.path, lambda name: target if "gate_exps" in name or "up_exps" in name else None)


def test_the_format_after_quantising_is_what_needs_a_kernel(wide, write_model, tmp_path):
    keys, tensors = wide.contents(split_kv_b=False)
    path = write_model(tmp_path / "f64.gguf", keys, tensors,
                       lambda name: GGMLType.F64 if is_expert(name) else GGMLType.F32)  # fmt: skip
    with pytest.raises(ModelError, match=r"F64 has no kernel on cpu \(.*\) and is the format of blk\.1\.ffn"):
        load(path, lambda name: None)
    load(path, lambda name: "Q8_0" if is_expert(name) else None).close()
