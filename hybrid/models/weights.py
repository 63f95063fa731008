"""Handing tensors to backends: each goes where the plan says, and none is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from hybrid.backends.base import Backend, TensorSource
from hybrid.backends.registry import create_backend
from hybrid.errors import ModelError, PlacementError
from hybrid.gguf import GGUFFile, TensorInfo
from hybrid.log import get_logger
from hybrid.placement.plan import Plan
from hybrid.placement.roles import layer_of, role_of

logger = get_logger(__name__)
Progress = Callable[[int, int], None]


class WeightLoader:
    """Loads tensors by name to the backends of a plan and proves in the end that all were used.

    Attributes:
        backends: the backends in use, by device.
    """

    def __init__(
        self, file: GGUFFile, plan: Plan, num_threads: int | None = None, progress: Progress | None = None
    ) -> None:
        self.file, self.plan = file, plan
        self.backends: dict[str, Backend] = {}
        self._num_threads, self._progress = num_threads, progress
        self._loaded: set[str] = set()
        self._done_bytes, self._total_bytes = 0, sum(info.n_bytes for info in file.tensors.values())

    def backend_of(self, *names: str) -> Backend:
        """The one backend of tensors that are used together.

        Raises:
            PlacementError: they are on different devices.
        """
        devices = {self.plan.placements[name].device: name for name in names}
        if len(devices) > 1:
            where = ", ".join(
                f"{name} on {device} (by {self.plan.placements[name].rule})"
                for device, name in devices.items()
            )
            raise PlacementError(f"tensors that are computed together are on different devices: {where}")
        (device,) = devices
        if device not in self.backends:
            self.backends[device] = create_backend(device, self._num_threads)
        return self.backends[device]

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def require(self, name: str) -> TensorInfo:
        """The entry of a tensor.

        Raises:
            ModelError: the file has no such tensor.
        """
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelError(
                f"{self.file.path}: tensor {name!r} is missing. "
                "The download is of another variant, or a shard was left out."
            )
        return info

    def info(self, name: str, *shape: int) -> TensorInfo:
        """The entry of a tensor that must exist with this many elements in rows of this length.

        Raises:
            ModelError: it is missing, or its shape is not what the hyper-parameters say.
        """
        info = self.require(name)
        if info.n_elements != prod(shape) or info.shape[-1] != shape[-1] or len(info.shape) > len(shape):
            raise ModelError(
                f"{self.file.path}: tensor {name!r} has the wrong shape: "
                f"expected {shape} by the hyper-parameters, found {info.shape}"
            )
        return info

    def vector(self, backend: Backend, name: str, size: int) -> torch.Tensor:
        info = self.info(name, size)
        vector = backend.load_vector(TensorSource(self.file, info, 1, 1, size))
        self._used(info)
        return vector

    def matrix(self, backend: Backend, name: str, rows: int, cols: int) -> Any:
        info = self.info(name, rows, cols)
        weight = backend.load_matrix(TensorSource(self.file, info, 1, rows, cols))
        self._used(info)
        return weight

    def stack(
        self, backend: Backend, name: str, batch: int, rows: int, cols: int, part: slice | None = None
    ) -> Any:
        """A stack of matrices, or rows ``part`` of each of them; a 2-D tensor of all their rows will do."""
        info = self.info(name, batch, rows, cols)
        start, stop = (part.start, part.stop) if part is not None else (0, rows)
        weight = backend.load_matrix(TensorSource(self.file, info, batch, rows, cols, start, stop))
        self._used(info)
        return weight

    def ignore(self, name: str, reason: str) -> None:
        """Counts a tensor as dealt with although nothing is loaded."""
        logger.info("%s: tensor %s is not used: %s", self.file.path.name, name, reason)
        self._used(self.file.tensors[name])

    def _used(self, info: TensorInfo) -> None:
        if info.name not in self._loaded:
            self._loaded.add(info.name)
            self._done_bytes += info.n_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)

    def finish(self, num_layers: int) -> None:
        """Proves that nothing is left over.

        Raises:
            ModelError: the file has tensors the model did not ask for.
        """
        rest = [name for name in self.file.tensors if name not in self._loaded]
        extra = [name for name in rest if role_of(name) == "nextn" or (layer_of(name) or 0) >= num_layers]
        if extra:
            size = sum(self.file.tensors[name].n_bytes for name in extra) / 2**20
            logger.info(
                "%d tensors of next-token prediction layers are not used (%.0f MiB)", len(extra), size
            )
        unknown = [name for name in rest if name not in extra]
        if unknown:
            shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            raise ModelError(
                f"{self.file.path}: tensors that this model does not have: {shown}. "
                "The file is of a variant this build cannot run."
            )
        for backend in self.backends.values():
            backend.loading_done()

    def close(self) -> None:
        for backend in self.backends.values():
            backend.close()
        self.backends.clear()
