"""The CPU backend: quantised SIMD kernels on packed weights; the contract is in `base`.

Tensors cross to the kernels as addresses. Everything passed is float32 (or int32 where ids are meant) and
contiguous, which the layers guarantee; results are made like their input, whatever torch's defaults are.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.backends.base import Backend, Recording, RouterConfig
from hybrid.backends.locality import Locality, locality_of
from hybrid.backends.packed_cache import PackedFile, PackedWriter, entry_key, packed_bytes
from hybrid.backends.source import TensorSource
from hybrid.calibration import workers_of
from hybrid.config import KVFormat
from hybrid.errors import ConfigError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.gguf.read_ahead import PIECE_BYTES, ReadAhead, Request
from hybrid.kernels import cpu
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.log import get_logger
from hybrid.placement.capabilities import GROUP_ROWS, cache_row_bytes
from hybrid.placement.numa import layout

logger = get_logger(__name__)

_HOST = torch.device("cpu")
_CACHE_DTYPES: dict[KVFormat, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "q8_0": torch.uint8,
}


@dataclass(frozen=True)
class LatentCache:
    """The latent cache of a layer: ``[num_blocks * BLOCK_SIZE, latent_dim + rope_dim]``, flat; of q8_0 the
    codes, and behind them the scales (`kernels/cpu/attention.h`)."""

    data: torch.Tensor
    fmt: KVFormat
    num_blocks: int
    latent_dim: int
    rope_dim: int

    @property
    def address(self) -> int:
        return self.data.data_ptr()


class _CpuRecording:
    """Operations of a backend, with what they work on."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend, self._pool = backend, backend.pool
        self._recording = cpu.Recording()
        self._results: list[torch.Tensor] = []

    def __enter__(self) -> Recording:
        self._recording.start()
        self._backend.recorded = self._results
        return self

    def __exit__(self, *_: object) -> None:
        self._backend.recorded = None
        self._recording.stop()

    def run(self) -> None:
        self._recording.run()


class CpuBackend(Backend):
    """``num_threads`` workers on a physical core each, spread over the nodes of the machine; ``None`` takes
    all cores. More workers than CPUs are left to the operating system to place.

    Attributes:
        nodes: NUMA nodes with workers, in the order of the pool's groups.
        locality: after loading, whether weights are where they were meant to be; ``None``: none were bound.
    """

    name = "cpu"
    device = _HOST
    can_record = True
    serves_handoff = True

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads: expected at least 1, found {num_threads}")
        self.num_threads = num_threads or len(cpu.physical_cores())
        workers = workers_of(cpu.numa_nodes(), self.num_threads)
        self.nodes = workers.nodes
        self.pool = cpu.ThreadPool(self.num_threads, workers.cpus, workers.groups)
        self._bound: list[cpu.PackedMatrix] = []  # those with pages on nodes of their own
        self.locality: Locality | None = None
        self._reader: ReadAhead | None = None
        self._cache: PackedFile | None = None
        self._mapped: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None = None
        self._mapped_address = 0
        self.recorded: list[torch.Tensor] | None = None  # results of the operations being recorded

    def can_multiply(self, type_: GGMLType) -> bool:
        return bool(cpu.has_kernel(int(type_), cpu.current_isa()))

    def describe(self) -> str:
        return f"cpu ({cpu.current_isa()})"

    def load_vector(self, source: TensorSource) -> torch.Tensor:
        return torch.from_numpy(source.dequantized().reshape(source.cols))

    def load_matrix(self, source: TensorSource) -> Any:
        shape = len(source.matrices), source.num_rows, source.cols
        found = layout(source.numa, source.side, shape, self.nodes)
        entry = None if self._cache is None else self._cache.entries.get(entry_key(source))
        if entry is not None and not found.nodes:
            source.on_read(source.n_bytes)
            return cpu.PackedMatrix.over(int(source.type), *shape, self._mapped_address + entry[0])
        matrix = cpu.PackedMatrix(
            int(source.type), *shape, found.division, list(found.nodes), list(found.cuts)
        )
        if found.nodes:
            self._bound.append(matrix)
        if entry is not None:
            self._copy_packed(matrix, source)
        elif self._reader is not None and source.type is source.info.type:
            self._pack_ahead(matrix, source, self._reader)
        else:
            self._pack(matrix, source)
        return matrix

    def _pack_ahead(self, matrix: cpu.PackedMatrix, source: TensorSource, reader: ReadAhead) -> None:
        """From what was read meanwhile."""
        for piece in source.pieces(PIECE_BYTES):
            view = np.frombuffer(reader.next(), dtype=np.uint8)
            matrix.pack_ranges(self.pool, piece.rows, view.ctypes.data)
            source.on_read(piece.range.n_bytes)

    def _copy_packed(self, matrix: cpu.PackedMatrix, source: TensorSource) -> None:
        """From a cache, to the nodes the matrix is for."""
        assert self._reader is not None
        done = 0
        total = packed_bytes(source)
        for start, n_bytes, rows in source.packed_pieces(PIECE_BYTES):
            view = np.frombuffer(self._reader.next(), dtype=np.uint8)
            matrix.pack_ranges(self.pool, rows, view.ctypes.data, packed=True)
            end = source.n_bytes * (start + n_bytes) // total
            source.on_read(end - done)
            done = end

    def _pack(self, matrix: cpu.PackedMatrix, source: TensorSource) -> None:
        """From rows that are quantised anew, or read one piece after another."""
        row_bytes = source.row_bytes
        step = max(GROUP_ROWS, PIECE_BYTES // row_bytes // GROUP_ROWS * GROUP_ROWS)
        staging = np.empty(min(step, source.num_rows) * row_bytes, dtype=np.uint8)
        for index, number in enumerate(source.matrices):
            for row in range(0, source.num_rows, step):
                count = min(step, source.num_rows - row)
                source.read_rows(number, row, count, staging)
                matrix.pack_rows(self.pool, index, row, count, staging.ctypes.data)

    def prepare(self, file: GGUFFile, sources: Sequence[TensorSource]) -> None:
        self._reader = ReadAhead(list(self._requests(file, sources)))

    def _requests(self, file: GGUFFile, sources: Sequence[TensorSource]) -> Iterator[Request]:
        """What `load_matrix` will ask the reader for."""
        for source in sources:
            entry = None if self._cache is None else self._cache.entries.get(entry_key(source))
            shape = len(source.matrices), source.num_rows, source.cols
            if self._cache is not None and entry is not None:
                if layout(source.numa, source.side, shape, self.nodes).nodes:
                    for start, n_bytes, _ in source.packed_pieces(PIECE_BYTES):
                        yield Request(self._cache, entry[0] + start, n_bytes, source.info.name)
            elif source.type is source.info.type:
                yield from (file.request(piece.range) for piece in source.pieces(PIECE_BYTES))

    def use_cache(self, cache: PackedFile) -> None:
        """Takes weights from a cache of their model file; it is closed when loading is over.

        What is not for certain nodes is used where it is mapped, in pages of 4 KiB: the file must not be
        changed while the model is in use.
        """
        self._cache = cache
        mapping = mmap.mmap(cache.fd, 0, access=mmap.ACCESS_READ)
        mapping.madvise(mmap.MADV_WILLNEED)
        self._mapped = np.frombuffer(mapping, dtype=np.uint8)
        self._mapped_address = self._mapped.ctypes.data

    def write_cache(self, file: GGUFFile, sources: Sequence[TensorSource], path: Path) -> None:
        """Packs matrices one after another into a cache file.

        Raises:
            CapacityError, OSError: see `PackedWriter`.
        """
        plain = [replace(source, numa="none") for source in sources]
        self.prepare(file, plain)
        try:
            with PackedWriter(path, file, plain) as writer:
                for source in plain:
                    matrix = self.load_matrix(source)
                    content = (ctypes.c_char * matrix.nbytes).from_address(matrix.address)
                    writer.write(entry_key(source), memoryview(content).cast("B"))
                writer.finish()
        finally:
            self._end_reading()

    def loading_done(self) -> None:
        self._end_reading()
        if self._cache is not None:
            self._cache.close()
            self._cache = None
        self.locality = locality_of(self._bound)
        self._bound.clear()
        if self.locality is not None and self.locality.warning:
            logger.warning("%s", self.locality.warning)

    def weight_bytes(self, weight: Any) -> int:
        return int(weight.nbytes)

    def allocate_latent_cache(self, num_blocks: int, latent_dim: int, rope_dim: int, fmt: KVFormat) -> Any:
        dtype = _CACHE_DTYPES[fmt]
        n_bytes = num_blocks * BLOCK_SIZE * cache_row_bytes(latent_dim + rope_dim, fmt)
        data = torch.zeros(n_bytes // dtype.itemsize, dtype=dtype, device=_HOST)
        return LatentCache(data, fmt, num_blocks, latent_dim, rope_dim)

    def copy_cache_blocks(self, cache: Any, pairs: list[tuple[int, int]]) -> None:
        blocks = cache.data.view(cache.num_blocks, BLOCK_SIZE, -1)
        for source, target in pairs:
            blocks[target].copy_(blocks[source])

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.is_cpu else x.to(self.device)

    def record(self) -> AbstractContextManager[Recording]:
        return _CpuRecording(self)

    def _end_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def close(self) -> None:
        self._end_reading()
        self._bound.clear()
        if self._cache is not None:
            self._cache.close()
        self._mapped = None
        del self.pool

    def _result(self, like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = like.new_empty(shape, dtype=dtype)
        if self.recorded is not None:
            self.recorded.append(out)
        return out

    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        out = self._result(token_ids, token_ids.shape[0], table.cols)
        cpu.gather_rows(self.pool, table, token_ids.data_ptr(), token_ids.shape[0], out.data_ptr())
        return out

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = self._result(x, *x.shape)
        add_to = 0 if residual is None else residual.data_ptr()
        cpu.rms_norm(
            self.pool, x.data_ptr(), x.shape[0], x.shape[1], weight.data_ptr(), eps, add_to, out.data_ptr()
        )
        return out

    def add(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        cpu.add(self.pool, x.data_ptr(), x.shape[0], x.shape[1], sums.data_ptr())

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        rows: int = weight.rows
        out = self._result(x, x.shape[0], rows)
        cpu.linear(self.pool, weight, x.data_ptr(), x.shape[0], x.shape[1], out.data_ptr(), rows)
        return out

    def mla_append(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        kv_norm: torch.Tensor,
        eps: float,
        rope: torch.Tensor,
        cache: Any,
        batch: AttentionBatch,
    ) -> None:
        tokens, heads, head_dim = q.shape
        cpu.mla_append(
            self.pool, q.data_ptr(), tokens, heads, head_dim, kv.data_ptr(), kv_norm.data_ptr(), eps,
            rope.data_ptr(), rope.shape[0], cache.address, cache.fmt,
            cache.num_blocks, cache.latent_dim, cache.rope_dim,
            batch.positions.data_ptr(), batch.slot_mapping.data_ptr(),
        )  # fmt: skip

    def absorb_q(self, q: torch.Tensor, k_b: Any, nope_dim: int, *, transposed: bool) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        latent: int = k_b.cols if transposed else k_b.rows
        out = self._result(q, tokens, heads, latent)
        product = cpu.linear_transposed_batched if transposed else cpu.linear_batched
        product(
            self.pool,
            k_b,
            q.data_ptr(),
            tokens,
            heads * head_dim,
            head_dim,
            out.data_ptr(),
            heads * latent,
            latent,
        )
        return out

    def mla_attention(
        self, q: torch.Tensor, q_latent: torch.Tensor, cache: Any, batch: AttentionBatch, scale: float
    ) -> torch.Tensor:
        tokens, heads, head_dim = q.shape
        out = self._result(q_latent, *q_latent.shape)
        cpu.mla_attention(
            self.pool, q.data_ptr(), q_latent.data_ptr(), tokens, heads, head_dim, cache.address, cache.fmt,
            cache.num_blocks, cache.latent_dim, cache.rope_dim,
            batch.seq_lens.shape[0], batch.positions.data_ptr(), batch.query_start.data_ptr(),
            batch.seq_lens.data_ptr(), batch.block_tables.data_ptr(), batch.block_tables.stride(0), scale,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def project_v(self, context: torch.Tensor, v_b: Any) -> torch.Tensor:
        tokens, heads, latent = context.shape
        v_dim: int = v_b.rows
        out = self._result(context, tokens, heads * v_dim)
        cpu.linear_batched(
            self.pool,
            v_b,
            context.data_ptr(),
            tokens,
            heads * latent,
            latent,
            out.data_ptr(),
            heads * v_dim,
            v_dim,
        )
        return out

    def route(
        self, x: torch.Tensor, router: Any, bias: torch.Tensor | None, config: RouterConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = self._result(x, x.shape[0], config.num_experts_per_tok, dtype=torch.int32)
        weights = self._result(x, x.shape[0], config.num_experts_per_tok)
        cpu.route(
            self.pool, router, x.data_ptr(), x.shape[0], 0 if bias is None else bias.data_ptr(),
            config.scoring, config.num_groups, config.topk_groups, config.num_experts_per_tok,
            config.norm_topk_prob, config.routed_scaling_factor, ids.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        return ids, weights

    def moe(
        self,
        x: torch.Tensor,
        gate: Any,
        up: Any,
        down: Any,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
    ) -> torch.Tensor:
        out = self._result(x, x.shape[0], down.rows)
        cpu.moe(
            self.pool, gate, up, down, x.data_ptr(), x.shape[0], topk_ids.data_ptr(), topk_weights.data_ptr(),
            topk_ids.shape[1], out.data_ptr(),
        )  # fmt: skip
        return out

    def mlp(self, x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        out = self._result(x, x.shape[0], down.rows)
        cpu.mlp(self.pool, gate, up, down, x.data_ptr(), x.shape[0], out.data_ptr())
        return out
