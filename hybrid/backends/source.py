"""Where a backend reads a weight from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.gguf import GGMLType, GGUFFile, TensorInfo, dequantize

U8 = npt.NDArray[np.uint8]
_WEIGHTS_AT_ONCE = 1 << 20  # of those that pass through float32


@dataclass(frozen=True)
class TensorSource:
    """A tensor in a file, or the same rows of some matrices of a stacked tensor.

    The tensor is seen as ``[batch, rows, cols]`` (experts or heads are the batch; a plain matrix has
    batch 1) of which rows ``row_start:row_stop`` of the matrices ``selected`` are wanted, in that order;
    ``None``: of all.
    """

    file: GGUFFile
    info: TensorInfo
    batch: int
    rows: int
    cols: int
    row_start: int = 0
    row_stop: int | None = None
    selected: tuple[int, ...] | None = None

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
        return self.info.type

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return self.info.row_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the file that are taken."""
        return len(self.matrices) * self.num_rows * self.info.row_bytes

    def read_rows(self, matrix: int, row: int, count: int, out: U8) -> None:
        """``count`` of the rows taken from a matrix, from the ``row``-th on, to the start of ``out``."""
        first = matrix * self.rows + self.row_start + row
        row_bytes = self.info.row_bytes
        self.file.read_into(self.info.name, out, first * row_bytes, count * row_bytes)

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
