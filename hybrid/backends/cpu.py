"""The CPU backend: quantised SIMD kernels on packed weights; the contract is in `base`.

Tensors cross to the kernels as addresses. Everything passed is float32 (or int32 where ids are meant) and
contiguous, which the layers guarantee; results are made like their input, whatever torch's defaults are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.backends.base import PackedShape, Recording, RouterConfig
from hybrid.backends.cpu_attention import CpuAttention
from hybrid.backends.locality import Locality, locality_of
from hybrid.backends.mapped_file import MappedFile
from hybrid.backends.packed_cache import PackedFile, PackedWriter, entry_key, packed_bytes
from hybrid.backends.source import TensorSource
from hybrid.calibration import workers_of
from hybrid.errors import ConfigError
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.gguf.read_ahead import PIECE_BYTES, ReadAhead, Request
from hybrid.kernels import cpu
from hybrid.log import get_logger
from hybrid.placement.capabilities import GROUP_ROWS
from hybrid.placement.numa import layout

logger = get_logger(__name__)

_HOST = torch.device("cpu")


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


class CpuBackend(CpuAttention):
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
        self._mapped: MappedFile | None = None
        self._num_mapped = 0  # matrices taken from it
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
            assert self._mapped is not None
            self._mapped.wait(self._num_mapped)
            self._num_mapped += 1
            source.on_read(source.n_bytes)
            return cpu.PackedMatrix.over(int(source.type), *shape, self._mapped.address + entry[0])
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
        if self._mapped is not None and self._cache is not None:
            entries = self._cache.entries
            self._mapped.read_ahead([entries[entry_key(s)] for s in sources if self._is_mapped(s)])

    def _is_mapped(self, source: TensorSource) -> bool:
        """Whether a matrix is used where the cache is mapped."""
        shape = len(source.matrices), source.num_rows, source.cols
        there = self._cache is not None and entry_key(source) in self._cache.entries
        return there and not layout(source.numa, source.side, shape, self.nodes).nodes

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

        What is not for certain nodes is used where it is mapped: the file must not be changed while the
        model is in use.
        """
        self._cache = cache
        self._mapped = MappedFile(cache.path, cache.fd)

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

    def packed_shape(self, weight: Any) -> PackedShape:
        return PackedShape(GGMLType(weight.ggml_type), weight.rows, weight.cols)

    def read_packed(self, weight: Any, index: int, out: torch.Tensor) -> None:
        groups = -(-weight.rows // GROUP_ROWS)
        target = out.numpy().reshape(groups, -1)
        parts = weight.parts[:1] if weight.division == "copies" else weight.parts
        for part in parts:
            (first, end), (top, bottom), (left, right) = part["batch"], part["rows"], part["cols"]
            if not first <= index < end:
                continue
            # A group holds its columns' blocks one after another.
            count = -(-(bottom - top) // GROUP_ROWS)
            start, stop = (target.shape[1] * col // weight.cols for col in (left, right))
            size = count * (stop - start)
            content = (ctypes.c_char * size).from_address(part["address"] + (index - first) * size)
            source = np.frombuffer(content, np.uint8).reshape(count, -1)
            target[top // GROUP_ROWS : top // GROUP_ROWS + count, start:stop] = source

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.is_cpu else x.to(self.device)

    def record(self) -> AbstractContextManager[Recording]:
        return _CpuRecording(self)

    def _end_reading(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        if self._mapped is not None:
            self._mapped.stop()

    def close(self) -> None:
        self._end_reading()
        self._bound.clear()
        if self._cache is not None:
            self._cache.close()
        self._mapped = None
        del self.pool

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

    def count_experts(self, topk_ids: torch.Tensor, counts: torch.Tensor) -> None:
        cpu.count_experts(topk_ids.data_ptr(), topk_ids.numel(), counts.shape[0], counts.data_ptr())

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
