"""Where a backend reads a weight from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybrid.errors import ModelError
from hybrid.gguf import GGMLType, GGUFFile, TensorInfo, dequantize, quantize, row_bytes
from hybrid.gguf.reader import Range
from hybrid.placement.capabilities import GROUP_ROWS, matrix_bytes

U8 = npt.NDArray[np.uint8]
_WEIGHTS_AT_ONCE = 1 << 18  # of those that pass through float32


@dataclass(frozen=True)
class Piece:
    """A range of the file that holds (matrix, first row, number of rows), one after another; matrices are
    numbered as they are taken."""

    range: Range
    rows: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class TensorSource:
    """A tensor in a file, or the same rows of some matrices of a stacked tensor.

    The tensor is seen as ``[batch, rows, cols]`` (experts or heads are the batch; a plain matrix has
    batch 1) of which rows ``row_start:row_stop`` of the matrices ``selected`` are wanted, in that order;
    ``None``: of all. They are read in the format ``format``, into which they are quantised anew where the
    file has another; ``None``: as in the file.

    ``numa`` is the mode in which a CPU with several nodes keeps it, and ``side`` what mode ``shard`` cuts:
    see `hybrid.placement.numa`.
    """

    file: GGUFFile
    info: TensorInfo
    batch: int
    rows: int
    cols: int
    row_start: int = 0
    row_stop: int | None = None
    selected: tuple[int, ...] | None = None
    format: GGMLType | None = None
    numa: str = "none"
    side: str = "rows"
    on_read: Callable[[int], None] = field(default=lambda n_bytes: None, compare=False)

    @property
    def matrices(self) -> Sequence[int]:
        """The matrices that are taken, by their place in the file."""
        return range(self.batch) if self.selected is None else self.selected

    @property
    def num_rows(self) -> int:
        """Rows taken from each matrix."""
        return (self.rows if self.row_stop is None else self.row_stop) - self.row_start

    @property
    def type(self) -> GGMLType:
        """The format in which rows are read."""
        return self.info.type if self.format is None else self.format

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return self.info.row_bytes if self.type is self.info.type else row_bytes(self.type, self.cols)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file that are taken."""
        return len(self.matrices) * self.num_rows * self.info.row_bytes

    def pieces(self, max_bytes: int) -> Iterator[Piece]:
        """What is taken, in pieces that are contiguous in the file and at most so long, or 16 rows."""
        step = max(GROUP_ROWS, max_bytes // self.row_bytes // GROUP_ROWS * GROUP_ROWS)
        rows: list[tuple[int, int, int]] = []
        first = end = 0  # rows of the tensor
        for index, matrix in enumerate(self.matrices):
            for row in range(0, self.num_rows, step):
                count = min(step, self.num_rows - row)
                start = matrix * self.rows + self.row_start + row
                if rows and (start != end or end + count - first > step):
                    yield self._piece(first, end, rows)
                    rows = []
                if not rows:
                    first = start
                rows.append((index, row, count))
                end = start + count
        if rows:
            yield self._piece(first, end, rows)

    def _piece(self, first: int, end: int, rows: list[tuple[int, int, int]]) -> Piece:
        size = self.info.row_bytes
        return Piece(Range(self.info.name, first * size, (end - first) * size), tuple(rows))

    def packed_pieces(self, max_bytes: int) -> Iterator[tuple[int, int, tuple[tuple[int, int, int], ...]]]:
        """The matrices as a cache of packed weights has them, in pieces of at most so many bytes, or 16 rows.

        Yields:
            Where a piece begins, its bytes, and the (matrix, first row, number of rows) it holds.
        """
        group_bytes = matrix_bytes(self.type, "cpu", (1, GROUP_ROWS, self.cols))
        of_matrix = -(-self.num_rows // GROUP_ROWS)
        groups, step = len(self.matrices) * of_matrix, max(1, max_bytes // group_bytes)
        for start in range(0, groups, step):
            stop, rows = min(start + step, groups), []
            for index in range(start // of_matrix, (stop - 1) // of_matrix + 1):
                first = max(start - index * of_matrix, 0) * GROUP_ROWS
                last = min((stop - index * of_matrix) * GROUP_ROWS, self.num_rows)
                rows.append((index, first, last - first))
            yield start * group_bytes, (stop - start) * group_bytes, tuple(rows)

    def read_rows(self, matrix: int, row: int, count: int, out: U8) -> None:
        """``count`` of the rows taken from a matrix, from the ``row``-th on, to the start of ``out``.

        Raises:
            GGUFError: the file cannot be read.
            ModelError: a weight has no place in the format asked for.
        """
        first = matrix * self.rows + self.row_start + row
        if self.type is self.info.type:
            self._read(first, count, out)
            return
        step = max(1, _WEIGHTS_AT_ONCE // self.cols)
        for start in range(0, count, step):
            taken = min(step, count - start)
            raw = np.empty(taken * self.info.row_bytes, dtype=np.uint8)
            self._read(first + start, taken, raw)
            quantized = self._quantized(dequantize(raw, self.info.type, (taken, self.cols)))
            out[start * self.row_bytes : (start + taken) * self.row_bytes] = quantized

    def _read(self, first: int, count: int, out: U8) -> None:
        size = self.info.row_bytes
        self.file.read_into(self.info.name, out, first * size, count * size)
        self.on_read(count * size)

    def _quantized(self, values: npt.NDArray[np.float32]) -> U8:
        try:
            return quantize(values, self.type).reshape(-1)
        except ValueError as error:
            raise ModelError(
                f"{self.file.path}: tensor {self.info.name!r} cannot be stored as {self.type.name}: {error}. "
                "Place it without a format, or with a float one."
            ) from error

    def dequantized(self) -> npt.NDArray[np.float32]:
        """What is taken, a new array ``[matrices, rows, cols]``."""
        values = np.empty((len(self.matrices), self.num_rows, self.cols), dtype=np.float32)
        step = max(1, _WEIGHTS_AT_ONCE // self.cols)
        data = np.empty(min(step, self.num_rows) * self.row_bytes, dtype=np.uint8)
        for index, matrix in enumerate(self.matrices):
            for row in range(0, self.num_rows, step):
                piece = values[index, row : row + step]
                self.read_rows(matrix, row, len(piece), data)
                piece[:] = dequantize(data[: len(piece) * self.row_bytes], self.type, piece.shape)
        return values
