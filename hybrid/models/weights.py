"""Handing tensors to backends: each goes where the plan says, and none is forgotten."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hybrid.backends.base import Backend
from hybrid.backends.registry import create_backend
from hybrid.backends.source import TensorSource
from hybrid.errors import ModelError, PlacementError
from hybrid.gguf import DEQUANTIZABLE, GGMLType, GGUFFile, TensorInfo
from hybrid.log import get_logger
from hybrid.moe.groups import ExpertGroup, group_experts, require_one_device
from hybrid.placement.capabilities import columns_problem, kind_of, quantizing_problem
from hybrid.placement.numa import side_of
from hybrid.placement.plan import ExpertShare, Placement, Plan
from hybrid.placement.roles import layer_of, role_of

logger = get_logger(__name__)
Progress = Callable[[int, int], None]


class Weights(ABC):
    """What a family builds its layers from: weights by tensor name, on the backend the plan says.

    Every tensor asked for must exist and have the shape given; what the hyper-parameters imply is
    proven here. `WeightCheck` only proves it, `WeightLoader` reads the data too.
    """

    def __init__(self, file: GGUFFile, plan: Plan, backends: dict[str, Backend]) -> None:
        self.file, self.plan, self.backends = file, plan, backends
        self.used: set[str] = set()

    @abstractmethod
    def _vector(self, backend: Backend, source: TensorSource) -> torch.Tensor: ...

    @abstractmethod
    def _matrix(self, backend: Backend, source: TensorSource) -> Any: ...

    def backend_of(self, *names: str) -> Backend:
        """The one backend of tensors that are used together; all of them must exist.

        Raises:
            ModelError: the file lacks one of them.
            PlacementError: they are on different devices.
        """
        placements = {self.require(name).name: self.plan.placements[name] for name in names}
        divided = next((name for name, placement in placements.items() if placement.shares), None)
        if divided is not None:
            raise PlacementError(
                f"{divided} is divided over devices (by {placements[divided].rule}), "
                "which only stacks of routed experts can be; place it on one"
            )
        return self.backends[require_one_device(placements)]

    def expert_groups(self, names: Sequence[str], num_experts: int) -> list[ExpertGroup]:
        """Which experts of a layer go where, given the names of its stacked tensors; all of them must exist.

        Raises:
            ModelError: the file lacks one of them.
            PlacementError: weights of an expert are on different devices.
        """
        return group_experts(
            {self.require(name).name: self.plan.placements[name] for name in names}, num_experts
        )

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
                "The file is of another variant, or was made without it; convert the model again."
            )
        return info

    def vector(self, backend: Backend, name: str, size: int) -> torch.Tensor:
        """A norm weight or bias, float32 ``[size]``."""
        info = self._checked(name, (size,))
        return self._vector(backend, TensorSource(self.file, info, 1, 1, size))

    def matrix(self, backend: Backend, name: str, rows: int, cols: int) -> Any:
        """A weight ``[rows, cols]``."""
        info = self._checked(name, (rows, cols))
        return self._matrix(backend, self._source(info, 1, rows, cols))

    def stack(
        self,
        group: ExpertGroup,
        name: str,
        batch: int,
        rows: int,
        cols: int,
        part: slice | None = None,
    ) -> Any:
        """The group's matrices of a stack of ``batch``, or rows ``part`` of each of them."""
        info = self._checked(name, (batch, rows, cols))
        source = self._source(info, batch, rows, cols, part, group.experts)
        return self._matrix(self.backends[group.device], source)

    def heads(
        self, backend: Backend, name: str, heads: int, rows: int, cols: int, part: slice | None = None
    ) -> Any:
        """A matrix for each head, or rows ``part`` of each; the file may hold all of them as one matrix."""
        info = self.require(name)
        shape = (heads * rows, cols) if len(info.shape) == 2 else (heads, rows, cols)
        return self._matrix(backend, self._source(self._checked(name, shape), heads, rows, cols, part))

    def ignore(self, name: str, reason: str) -> None:
        """Counts a tensor as dealt with although nothing is loaded."""
        logger.debug("%s: tensor %s is not used: %s", self.file.path.name, name, reason)
        self.used.add(name)

    def _source(
        self,
        info: TensorInfo,
        batch: int,
        rows: int,
        cols: int,
        part: slice | None = None,
        experts: tuple[int, ...] | None = None,
    ) -> TensorSource:
        start, stop = (0, rows) if part is None else (part.start, part.stop)
        placed = self._placed(info.name, 0 if experts is None else experts[0])
        format_ = None if placed.format is None else GGMLType[placed.format]
        side = side_of(info.name, role_of(info.name))
        return TensorSource(
            self.file, info, batch, rows, cols, start, stop, experts, format_, placed.numa, side
        )

    def _placed(self, name: str, expert: int) -> Placement | ExpertShare:
        """What the plan says of a tensor, or of one expert of a divided stack."""
        placement = self.plan.placements[name]
        return next((share for share in placement.shares if expert in share.experts), placement)

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.require(name)
        if info.shape != shape:
            raise ModelError(
                f"{self.file.path}: tensor {name!r} has the wrong shape: "
                f"expected {shape} by the hyper-parameters, found {info.shape}"
            )
        self.used.add(name)
        return info


class WeightCheck(Weights):
    """Proves that a file holds a whole model that the plan's devices can run, without reading any weights.

    Handles are placeholders. Formats without a kernel are collected, so that one error names all.
    """

    def __init__(self, file: GGUFFile, plan: Plan, backends: dict[str, Backend]) -> None:
        super().__init__(file, plan, backends)
        self._refused: dict[tuple[str, str], list[str]] = {}
        self.matrices: dict[str, list[TensorSource]] = {}  # by device, in the order they are loaded

    def _vector(self, backend: Backend, source: TensorSource) -> torch.Tensor:
        if source.info.type not in DEQUANTIZABLE:
            self._refuse(backend, source.type, source.info.name)
        return torch.empty(0)

    def _matrix(self, backend: Backend, source: TensorSource) -> Any:
        problem = quantizing_problem(source.info.type, source.type, source.cols)
        if problem is not None:
            name, rule = source.info.name, self._placed(source.info.name, source.matrices[0]).rule
            raise PlacementError(f"{rule}: {name} cannot be stored as {source.type.name}: {problem}")
        if not backend.can_multiply(source.type):
            self._refuse(backend, source.type, source.info.name)
        problem = columns_problem(source.type, kind_of(backend.name), source.cols)
        if problem is not None:
            raise PlacementError(
                f"{source.info.name} cannot be on {backend.name}: {problem}; leave it on the cpu"
            )
        self.matrices.setdefault(backend.name, []).append(source)
        return None

    def _refuse(self, backend: Backend, format_: GGMLType, name: str) -> None:
        self._refused.setdefault((format_.name, backend.describe()), []).append(name)

    def finish(self, num_layers: int) -> None:
        """Proves that nothing is left over and that every format has a kernel.

        Raises:
            ModelError: the file has tensors the model did not ask for, or of formats that cannot be computed.
        """
        if self._refused:
            parts = "; ".join(
                f"{format_} has no kernel on {device} and is the format of {_listed(names)}"
                for (format_, device), names in self._refused.items()
            )
            raise ModelError(
                f"{self.file.path}: tensors in formats this build cannot compute: {parts}. "
                "Take a file in other formats, or quantise the model again."
            )
        rest = [name for name in self.file.tensors if name not in self.used]
        nextn = {layer_of(name) for name in rest if role_of(name) == "nextn"}
        extra = [name for name in rest if (layer := layer_of(name)) in nextn and (layer or 0) >= num_layers]
        unknown = [name for name in rest if name not in set(extra)]
        if unknown:
            raise ModelError(
                f"{self.file.path}: tensors that a model of {num_layers} layers with these "
                f"hyper-parameters does not have: {_listed(unknown)}. "
                "The file is of a variant this build cannot run, or its header is wrong."
            )
        if extra:
            size = sum(self.file.tensors[name].n_bytes for name in extra) / 2**20
            logger.info("%s: %d tensors of next-token prediction layers (%.0f MiB) are not used",
                        self.file.path.name, len(extra), size)  # fmt: skip


class WeightLoader(Weights):
    """Reads tensors to their backends, reporting bytes done and bytes in all.

    ``loaded_bytes``: tensor and device -> bytes it takes there.
    """

    def __init__(
        self,
        file: GGUFFile,
        plan: Plan,
        backends: dict[str, Backend],
        check: WeightCheck,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(file, plan, backends)
        self._progress = progress or (lambda done, total: None)
        self.loaded_bytes: dict[tuple[str, str], int] = {}
        self._done_bytes, self._total_bytes = 0, sum(file.tensors[name].n_bytes for name in check.used)
        for name, backend in backends.items():
            backend.prepare(file, check.matrices.get(name, []))

    def _vector(self, backend: Backend, source: TensorSource) -> torch.Tensor:
        vector = backend.load_vector(replace(source, on_read=self._advance))
        self._count(backend, source, vector.nbytes)
        return vector

    def _matrix(self, backend: Backend, source: TensorSource) -> Any:
        weight = backend.load_matrix(replace(source, on_read=self._advance))
        self._count(backend, source, backend.weight_bytes(weight))
        return weight

    def _count(self, backend: Backend, source: TensorSource, n_bytes: int) -> None:
        key = source.info.name, backend.name
        self.loaded_bytes[key] = self.loaded_bytes.get(key, 0) + n_bytes

    def _advance(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        self._progress(self._done_bytes, self._total_bytes)


def create_backends(devices: Iterable[str], num_threads: int | None) -> dict[str, Backend]:
    """A backend for each device.

    Raises:
        PlacementError: there is no such device here.
    """
    backends: dict[str, Backend] = {}
    try:
        for device in devices:
            backends[device] = create_backend(device, num_threads)
    except BaseException:
        close_backends(backends)
        raise
    return backends


def close_backends(backends: dict[str, Backend]) -> None:
    for backend in backends.values():
        backend.close()
    backends.clear()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
