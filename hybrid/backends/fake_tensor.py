"""Tensors of a test device: torch's operations on them are queued on its current stream, as a GPU's are.

To torch they are on its data-less device ``meta``, so that nothing takes them for host memory; the numbers
are in a plain tensor, which belongs to the streams. A result exists at once and holds nonsense until its
stream has computed it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

META = torch.device("meta")
_READS = frozenset(("item", "_local_scalar_dense", "equal", "is_nonzero"))
_CONVERSIONS = frozenset(("to", "_to_copy"))
_TAKE_HOST_INDICES = frozenset(("index", "index_put", "index_put_"))
_NONSENSE_INT = 0x7A7A7A7A  # as an index it is out of every range


class Queue(Protocol):
    """What a tensor needs of its device."""

    name: str

    def launch(self, name: str, work: Callable[[], None]) -> None:
        """Queues work on the current stream."""

    def allocate(self, values: torch.Tensor) -> DeviceTensor:
        """A tensor of the device whose numbers lie in ``values``, new memory, and are nonsense so far."""

    def check_may_wait(self, what: str) -> None:
        """Raises `DeviceError` within a capture."""

    def wait_to_read(self, what: str) -> None:
        """Until the current stream has done its work."""

    def is_pinned(self, tensor: torch.Tensor) -> bool: ...


class Memory:
    """What views share. When the last is gone, its stream fills it with nonsense, as new tensors would."""

    def __init__(self, freed: Callable[[], None]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed()


class DeviceTensor(torch.Tensor):
    """A view of ``memory`` with the shape of ``numbers``, the plain tensor that streams work on."""

    numbers: torch.Tensor
    queue: Queue
    memory: Memory

    @staticmethod
    def __new__(cls, values: torch.Tensor, queue: Queue, memory: Memory) -> DeviceTensor:
        found: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=META,
        )
        return found

    def __init__(self, values: torch.Tensor, queue: Queue, memory: Memory) -> None:
        self.numbers, self.queue, self.memory = values, queue, memory

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeviceTensor({list(self.shape)}, {self.dtype}, {self.queue.name})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name == "copy_":
            return copy(args[0], args[1], non_blocking=bool((*args, False)[2]))
        if name in _READS or (name in _CONVERSIONS and _to_host(args, kwargs)):
            args[0].queue.wait_to_read(name)
            found = func(*tree_map(plain, args), **tree_map(plain, kwargs))
            return found.clone() if isinstance(found, torch.Tensor) else found
        return _queued(func, name, args, kwargs)


def plain(x: Any) -> Any:
    """The numbers of a device's tensor; anything else as it is."""
    return x.numbers if isinstance(x, DeviceTensor) else x


def fill_with_nonsense(values: torch.Tensor) -> None:
    """NaN, or what is no sensible number."""
    if values.dtype.is_floating_point:
        values.fill_(float("nan"))
    else:
        values.fill_(1 if values.dtype is torch.bool else min(torch.iinfo(values.dtype).max, _NONSENSE_INT))


def copy(target: torch.Tensor, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
    """``copy_`` between a device and the host, or within devices; on the target's stream if it has one."""
    queue: Queue = target.queue if isinstance(target, DeviceTensor) else source.queue
    host = next((x for x in (target, source) if not isinstance(x, DeviceTensor)), None)
    if host is not None and target.dtype is not source.dtype:
        raise RuntimeError(f"copy_: expected equal types, found {target.dtype} and {source.dtype}")
    waits = host is not None and not (non_blocking and queue.is_pinned(host))
    kind = "copy" if host is None else "download" if target is host else "upload"
    if waits:
        queue.check_may_wait(kind)
    if waits and source is host:
        source = source.clone()  # pageable memory is read before the call returns
    to, of = plain(target), plain(source)
    queue.launch(kind, lambda: _discard(to.copy_(of)))
    if waits and target is host:
        queue.wait_to_read(kind)
    return target


def _to_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    devices = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
    return any(device.type == "cpu" for device in devices)


def _queued(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Results of an operation that is queued, or views of its arguments."""
    found: list[DeviceTensor] = []
    stand_ins: dict[int, torch.Tensor] = {}  # by number of the argument in `found`

    def stand_in(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(x, DeviceTensor):
            found.append(x)
            stand_ins[len(found) - 1] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
            return stand_ins[len(found) - 1]
        if x.is_meta or (x.dim() and name not in _TAKE_HOST_INDICES):
            raise RuntimeError(
                f"{name}: expected tensors of one device, found one of the host, {list(x.shape)}"
            )
        return x.to(META)

    shapes = func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs))
    queue = found[0].queue
    if any(x.queue is not queue for x in found):
        raise RuntimeError(f"{name}: expected tensors of one device, found {', '.join(map(repr, found))}")
    # Numbers of the host are taken as they are now.
    args, kwargs = tree_map(_snapshot, args), tree_map(_snapshot, kwargs)
    work = partial(func, *tree_map(plain, args), **tree_map(plain, kwargs))
    if any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    ):
        queue.launch(name, lambda: _discard(work()))
        return args[0]
    owners = {stand_ins[i].untyped_storage()._cdata: x for i, x in enumerate(found)}
    new: list[torch.Tensor] = []

    def result(shape: Any) -> Any:
        if not isinstance(shape, torch.Tensor):
            return shape
        owner = owners.get(shape.untyped_storage()._cdata)
        if owner is not None:
            return _view(owner, shape)
        out = queue.allocate(torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype))
        new.append(out.numbers)
        return out

    results = tree_map(result, shapes)
    if new and not name.startswith(("empty", "new_empty")):
        queue.launch(name, lambda: _store(work(), new))
    return results


def _snapshot(x: Any) -> Any:
    return x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) else x


def _view(owner: DeviceTensor, shape: torch.Tensor) -> DeviceTensor:
    """What the operation made of its argument's stand-in, which begins at the argument's first number."""
    values = owner.numbers if shape.dtype is owner.dtype else owner.numbers.view(shape.dtype)
    offset = values.storage_offset() + shape.storage_offset()
    return DeviceTensor(values.as_strided(shape.shape, shape.stride(), offset), owner.queue, owner.memory)


def _store(results: Any, places: list[torch.Tensor]) -> None:
    tensors = results if isinstance(results, tuple | list) else [results]
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)


def _discard(_: Any) -> None:
    pass
