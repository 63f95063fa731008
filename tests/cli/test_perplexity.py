"""`hybrid perplexity`: the mathematics against plain numpy, the file of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import CapacityError, ConfigError, ModelError, RequestError
from hybrid.logprob_file import LogprobKey, LogprobReader, LogprobWriter
from hybrid.perplexity import Estimate, Moments, cut_windows, evaluate, log_softmax

VOCAB = 50


class StubModel:
    """Logits that depend on the token and its position; pieces of uneven length."""

    vocab_size = VOCAB

    def __init__(self, seed: int = 0, noise: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32) * 3
        self.table += noise * np.random.default_rng(99).standard_normal(self.table.shape).astype(np.float32)
        self.seen: list[list[int]] = []

    def all_logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        return self.table[ids] * (1 + 0.01 * np.arange(len(ids), dtype=np.float32)[:, None])

    def logits(self, token_ids: npt.NDArray[np.int32], first: int) -> Iterator[npt.NDArray[np.float32]]:
        self.seen.append(token_ids.tolist())
        wanted = self.all_logits(token_ids)[first : len(token_ids) - 1]
        for start in range(0, len(wanted), 37):
            yield wanted[start : start + 37]


def text_tokens(count: int) -> list[int]:
    return np.random.default_rng(7).integers(0, VOCAB, count).tolist()


def last(estimates: Iterator[Estimate]) -> Estimate:
    return list(estimates)[-1]


def plain_log_probs(model: StubModel, windows: npt.NDArray[np.int32]) -> tuple[np.ndarray, np.ndarray]:
    """float64 log-probabilities of scored positions, and their targets, straight from the definition."""
    half = windows.shape[1] // 2
    rows, targets = [], []
    for window in windows:
        logits = model.all_logits(window).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows.append(log_probs[half:-1])
        targets.append(window[half + 1 :])
    return np.concatenate(rows), np.concatenate(targets)


def test_perplexity_is_the_definition() -> None:
    model = StubModel()
    windows = cut_windows(text_tokens(1000), 128, bos_id=1)
    result = last(evaluate(model, windows))
    log_probs, targets = plain_log_probs(model, windows)
    nll = -log_probs[np.arange(len(targets)), targets]
    assert result.nll.count == len(nll) == 7 * (128 - 64 - 1)
    # Log-probabilities are rounded to float32: half an ulp of the largest of them, and e^x carries it over.
    slack = np.abs(log_probs).max() * 2**-24
    assert result.nll.mean == pytest.approx(nll.mean(), abs=slack)
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=2 * slack)
    error = nll.std() / math.sqrt(len(nll) - 1)
    assert result.perplexity_error == pytest.approx(math.exp(nll.mean()) * error, rel=1e-4)


def test_estimate_runs_window_by_window() -> None:
    windows = cut_windows(text_tokens(500), 100, bos_id=None)
    done = [(e.windows_done, e.nll.count) for e in evaluate(StubModel(), windows)]
    assert done == [(n, n * 49) for n in range(1, 6)]


def test_windows_share_nothing_and_begin_with_bos() -> None:
    tokens = text_tokens(350)
    model = StubModel()
    last(evaluate(model, cut_windows(tokens, 100, bos_id=3)))
    assert model.seen == [[3, *tokens[start + 1 : start + 100]] for start in (0, 100, 200)]
    assert cut_windows(tokens, 100, bos_id=None)[1].tolist() == tokens[100:200]
    assert len(cut_windows(tokens, 100, None, max_windows=2)) == 2


def test_divergence_is_the_definition(tmp_path: Path) -> None:
    base, other = StubModel(), StubModel(noise=0.5)
    windows = cut_windows(text_tokens(1000), 128, bos_id=1)
    file = str(tmp_path / "base.logprobs")
    last(evaluate(base, windows, save=file))
    result = last(evaluate(other, windows, base=file))
    p, targets = plain_log_probs(base, windows)
    q, _ = plain_log_probs(other, windows)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    report = result.report()
    slack = 2 * max(np.abs(p).max(), np.abs(q).max()) * 2**-24
    assert report["kl_mean"] == pytest.approx(kl.mean(), abs=slack)
    assert report["kl_max"] == pytest.approx(kl.max(), abs=slack)
    assert report["kl_median"] == pytest.approx(np.median(kl), abs=slack)
    assert report["top1_agreement"] == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    index = np.arange(len(targets)), targets
    assert report["log_perplexity_ratio"] == pytest.approx((p[index] - q[index]).mean(), abs=slack)
    assert report["base_perplexity"] == pytest.approx(math.exp(-p[index].mean()), rel=2 * slack)
    assert report["kl_mean"] > 0.01 and report["top1_agreement"] < 1


def test_a_model_does_not_diverge_from_itself(tmp_path: Path) -> None:
    windows = cut_windows(text_tokens(300), 64, bos_id=None)
    file = str(tmp_path / "base.logprobs")
    last(evaluate(StubModel(), windows, save=file))
    report = last(evaluate(StubModel(), windows, base=file)).report()
    assert report["kl_mean"] == report["kl_max"] == report["log_perplexity_ratio"] == 0
    assert report["top1_agreement"] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30))
def test_log_softmax_sums_to_one(values: list[float]) -> None:
    row = log_softmax(np.array([values], dtype=np.float32))
    assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1, rel=1e-5)
    # Values closer than float32 tells apart after the subtraction may tie.
    assert row[0, np.argmax(values)] == row.max()


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=60), st.integers(1, 59))
def test_moments_do_not_depend_on_the_pieces(values: list[float], cut: int) -> None:
    whole, pieces = Moments(), Moments()
    array = np.array(values)
    whole.add(array)
    pieces.add(array[:cut])
    pieces.add(array[cut:])
    assert pieces.mean == pytest.approx(array.mean(), abs=1e-10)
    # The variance is a difference of squares: exact to a few ulp of the squares, hence the root of that.
    assert pieces.error == pytest.approx(array.std() / math.sqrt(len(values) - 1), abs=1e-5)
    assert whole.count == pieces.count


@pytest.mark.parametrize(
    ("tokens", "n_ctx", "chunks", "message"),
    [
        (10, 3, None, "at least 4"),
        (10, 11, None, "10 tokens, fewer than one window of 11"),
        (10, 5, 0, "--chunks 0"),
    ],
)
def test_refused_windows(tokens: int, n_ctx: int, chunks: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cut_windows(text_tokens(tokens), n_ctx, None, chunks)


def test_nan_is_an_error_and_no_perplexity(tmp_path: Path) -> None:
    model = StubModel()
    model.table[7, 3] = np.nan
    saved = tmp_path / "base.bin"
    windows = cut_windows([1] * 64 + [7] * 64, 64, bos_id=None)
    with pytest.raises(ModelError, match="window 2 of 2: the logits are not numbers"):
        last(evaluate(model, windows, save=str(saved)))
    assert list(tmp_path.iterdir()) == []


def test_token_outside_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="token ids reach 50, but the model has 50"):
        last(evaluate(StubModel(), cut_windows([VOCAB] * 20, 10, None)))


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.logprobs"
    last(evaluate(StubModel(), cut_windows(text_tokens(300), 64, None), save=str(path)))
    return path


def test_base_file_has_the_documented_layout(base_file: Path) -> None:
    data = base_file.read_bytes()
    assert data[:8] == b"HYBRIDLP"
    assert np.frombuffer(data, "<u4", 4, 8).tolist() == [1, VOCAB, 64, 32]
    assert np.frombuffer(data, "<u8", 1, 24)[0] == 4
    assert len(data) == 64 + 4 * 4 * 31 * VOCAB
    rows = np.frombuffer(data, "<f4", offset=64).reshape(-1, VOCAB)
    expected, _ = plain_log_probs(StubModel(), cut_windows(text_tokens(300), 64, None))
    np.testing.assert_allclose(rows, expected, atol=np.abs(expected).max() * 2**-23)


@pytest.mark.parametrize(
    ("tokens", "n_ctx", "chunks", "message"),
    [
        (text_tokens(300), 32, None, "context differs .run again with -c 64."),
        (text_tokens(300), 64, 3, "number of chunks differs .use --chunks 4."),
        ([0, *text_tokens(300)], 64, None, "tokens differs .same text and tokeniser"),
    ],
)
def test_base_of_another_run_is_refused(
    base_file: Path, tokens: list[int], n_ctx: int, chunks: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        last(evaluate(StubModel(), cut_windows(tokens, n_ctx, None, chunks), base=str(base_file)))


def test_base_of_another_vocabulary_is_refused(base_file: Path) -> None:
    windows = cut_windows(text_tokens(300), 64, None)
    with pytest.raises(ConfigError, match="vocabulary size differs"):
        LogprobReader(base_file, LogprobKey.of(windows, 32, VOCAB + 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"GGUF" + data[4:], "no file of log-probabilities"),
        (lambda data: data[:8] + b"\x02" + data[9:], "unknown version"),
        (lambda data: data[:-1], "incomplete"),
        (lambda data: data[:20], "no file of log-probabilities"),
        (lambda data: b"", "no file of log-probabilities"),
    ],
)
def test_damaged_base(base_file: Path, damage: object, message: str) -> None:
    base_file.write_bytes(damage(base_file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        last(evaluate(StubModel(), cut_windows(text_tokens(300), 64, None), base=str(base_file)))


def test_missing_base() -> None:
    with pytest.raises(ConfigError, match="/nowhere: cannot open"):
        last(evaluate(StubModel(), cut_windows(text_tokens(300), 64, None), base="/nowhere"))


def test_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    estimates = evaluate(StubModel(), cut_windows(text_tokens(300), 64, None), save=str(tmp_path / "out"))
    next(estimates)
    estimates.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_full_disk_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    key = LogprobKey.of(cut_windows(text_tokens(300), 64, None), 32, VOCAB)
    with pytest.raises(CapacityError, match="10 left"):
        LogprobWriter(tmp_path / "out", key)
    assert not list(tmp_path.iterdir())
