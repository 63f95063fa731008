"""Weights on a GPU: GGUF blocks split into aligned planes, or floats as they are, in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hybrid.backends.source import TensorSource
from hybrid.gguf import GGMLType, GGUFFile
from hybrid.gguf.read_ahead import PIECE_BYTES, ReadAhead, Request
from hybrid.kernels.gpu.formats import FORMATS, QuantizedMatrix, plane_starts
from hybrid.placement.capabilities import matrix_bytes

FLOAT_DTYPES = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class FloatMatrix:
    """``[batch, rows, cols]`` numbers."""

    data: torch.Tensor

    @property
    def batch(self) -> int:
        return self.data.shape[0]

    @property
    def rows(self) -> int:
        return self.data.shape[1]

    @property
    def cols(self) -> int:
        return self.data.shape[2]


Matrix = QuantizedMatrix | FloatMatrix


def bytes_of(source: TensorSource) -> int:
    """Bytes of a matrix on a GPU."""
    return matrix_bytes(source.type, "cuda", (len(source.matrices), source.num_rows, source.cols))


class WeightStore:
    """Reads matrices to a device. `prepare` takes the memory of all that will be asked for, in one piece."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0
        self._reader: ReadAhead | None = None

    def prepare(self, file: GGUFFile, sources: Sequence[TensorSource]) -> None:
        """See `Backend.prepare`."""
        n_bytes = sum(map(bytes_of, sources))
        self._memory, self._used = torch.empty(n_bytes, dtype=torch.uint8, device=self._device), 0
        self._reader = ReadAhead(list(_requests(file, sources)))

    def load(self, source: TensorSource) -> Matrix:
        """A matrix, read in pieces."""
        shape = len(source.matrices), source.num_rows, source.cols
        memory = self._take(bytes_of(source))
        if source.type in FLOAT_DTYPES:
            count = shape[0] * shape[1] * shape[2]
            values = memory[: count * FLOAT_DTYPES[source.type].itemsize].view(FLOAT_DTYPES[source.type])
            matrix: Matrix = FloatMatrix(values.view(shape))
            rows = [(0, memory[: values.nbytes].view(shape[0] * shape[1], -1))]
        else:
            matrix = QuantizedMatrix(FORMATS[source.type.name], *shape, memory)
            rows = list(_planes(matrix))
        for first, count, data in self._pieces(source):
            blocks = torch.from_numpy(data).to(self._device).view(count, -1)
            if isinstance(matrix, QuantizedMatrix):
                per_row = matrix.cols // matrix.format.block_cols
                blocks, first, count = blocks.view(count * per_row, -1), first * per_row, count * per_row
            for offset, plane in rows:
                plane[first : first + count] = blocks[:, offset : offset + plane.shape[1]]
        return matrix

    def finish(self) -> None:
        """Ends reading."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None

    def close(self) -> None:
        self.finish()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _take(self, n_bytes: int) -> torch.Tensor:
        start, self._used = self._used, self._used + n_bytes
        if self._used <= len(self._memory):
            return self._memory[start : self._used]
        return torch.empty(n_bytes, dtype=torch.uint8, device=self._device)  # nobody announced it

    def _pieces(self, source: TensorSource) -> Iterator[tuple[int, int, np.ndarray]]:
        """First row, number of rows and bytes of successive pieces; rows count through all matrices."""
        if self._reader is not None and source.type is source.info.type:
            for piece in source.pieces(PIECE_BYTES):
                data, at = np.frombuffer(self._reader.next(), dtype=np.uint8), 0
                for index, row, count in piece.rows:
                    n_bytes = count * source.row_bytes
                    # Copied: a view of what was read may not outlive the next piece.
                    yield index * source.num_rows + row, count, data[at : at + n_bytes].copy()
                    at += n_bytes
                source.on_read(piece.range.n_bytes)
            return
        step = max(1, PIECE_BYTES // source.row_bytes)
        for index, number in enumerate(source.matrices):
            for row in range(0, source.num_rows, step):
                count = min(step, source.num_rows - row)
                data = np.empty(count * source.row_bytes, dtype=np.uint8)
                source.read_rows(number, row, count, data)
                yield index * source.num_rows + row, count, data


def _requests(file: GGUFFile, sources: Sequence[TensorSource]) -> Iterator[Request]:
    for source in sources:
        if source.type is source.info.type:
            yield from (file.request(piece.range) for piece in source.pieces(PIECE_BYTES))


def _planes(matrix: QuantizedMatrix) -> Iterator[tuple[int, torch.Tensor]]:
    """Where a field begins in a block, and its plane as uint8 ``[num_blocks, field bytes]``."""
    starts = plane_starts(matrix.format, matrix.num_blocks)
    for field, start in zip(matrix.format.planes, starts, strict=False):
        if field is not None:
            plane = matrix.data[start : start + field.num_bytes * matrix.num_blocks]
            yield field.offset, plane.view(matrix.num_blocks, field.num_bytes)


def rows_of(matrix: Matrix, ids: torch.Tensor) -> Matrix:
    """The rows ``ids``, int32 ``[T]``, of the first of the matrices, as a matrix."""
    index = ids.long()
    if isinstance(matrix, FloatMatrix):
        return FloatMatrix(matrix.data[0].index_select(0, index)[None])
    fmt, per_row = matrix.format, matrix.cols // matrix.format.block_cols
    size = plane_starts(fmt, len(ids) * per_row)[-1]
    data = torch.empty(size, dtype=torch.uint8, device=ids.device)
    found = QuantizedMatrix(fmt, 1, len(ids), matrix.cols, data)
    for (_, source), (_, target) in zip(_planes(matrix), _planes(found), strict=True):
        taken = source.view(matrix.batch * matrix.rows, -1).index_select(0, index)
        target.view(len(ids), -1).copy_(taken)
    return found
