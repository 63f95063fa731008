"""A device's asynchronous side: streams, events, pinned memory, host callbacks, graphs.

A backend whose operations are queued instead of done when they return has a `Runtime` (`Backend.runtime`);
elsewhere that is ``None``. The rules are CUDA's:

- Work is queued on the runtime's *current* stream, that of the innermost ``with runtime.on(stream)`` of the
  thread, else `Runtime.main`. A stream does its work in the order it was queued; between streams, and between
  a stream and the host, only events order anything.
- A tensor of the device may be dropped by Python while work on it is queued: its memory goes to later work of
  the stream it was made on. A stream other than that one which reads it must be waited for first.
- Host memory that queued work touches is pinned, belongs to whoever queued the work, and stays as it is until
  an event behind that work has come.
- Reading a tensor from Python (``.item()``, ``.tolist()``, ``.cpu()``, a blocking ``copy_``) waits for the
  current stream of its device alone.

Every wait names its *site*, a constant of the caller like ``"lane starts"``: tests drop the waits of one site
after another, and each must be missed.

Within `Runtime.capture` nothing runs; what is queued on the captured stream, and on streams that wait for an
event of it, becomes a `Graph`. Such a stream must be waited for again before the capture ends. Reading a
tensor, waiting on the host, and waiting for events from before the capture are errors there. Tensors made
meanwhile lie where they are as long as the graph lives, and hold what its last replay left; `replay` repeats
the work on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch


class Event(ABC):
    """A point in a stream's work, made by `Stream.record`."""

    @abstractmethod
    def synchronize(self, site: str) -> None:
        """Returns when all work queued before the event is done.

        Raises:
            DeviceError: work on the device has failed.
        """

    @abstractmethod
    def is_done(self) -> bool:
        """Whether `synchronize` would return at once."""


class Stream(ABC):
    """Work in order. Made by `Runtime.stream`."""

    name: str

    @abstractmethod
    def record(self) -> Event:
        """An event behind all that is queued by now."""

    @abstractmethod
    def wait(self, event: Event, site: str) -> None:
        """What is queued from here on starts after the event, which may be of any stream of any device."""

    @abstractmethod
    def call(self, function: int, argument: int, site: str) -> None:
        """Queues a call of a C function, ``void (*)(void *)``, by its address.

        The stream does nothing else until it returns. It must not throw, call the driver or need Python's
        lock. The argument outlives all calls, those of graphs too. Calls of different streams may be
        serialised.
        """


class Graph(ABC):
    """Captured work."""

    @abstractmethod
    def replay(self) -> None:
        """Queues all of it on the stream it was captured on; later work of that stream comes behind."""


class Runtime(ABC):
    """The asynchronous side of one device.

    Attributes:
        name: of the device, as placements spell it.
        main: the stream that is current where no other is.
        captures_other_devices: whether a capture may go on to streams of other devices.
    """

    name: str
    main: Stream
    captures_other_devices = False

    @property
    @abstractmethod
    def current(self) -> Stream:
        """The stream that this thread queues on."""

    @abstractmethod
    def stream(self, name: str) -> Stream:
        """A new stream; ``name`` is for traces and messages. It begins with nothing to wait for."""

    @abstractmethod
    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Makes a stream of this device current."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory for `copy` in both directions, not initialised. Where the system refuses to pin it, it
        is ordinary memory, with a warning: copies then take longer and may wait."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the device, not initialised."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy; each side is a tensor of this device or pinned memory. Types are converted on a
        device only, so a copy to or from the host is between equal types."""
        target.copy_(source, non_blocking=True)

    def discard(self, tensor: torch.Tensor) -> None:  # noqa: B027
        """Queues a promise that nobody reads what ``tensor``, of this device or pinned, holds by then. Test
        devices fill it with nonsense."""

    @abstractmethod
    def capture(self, stream: Stream) -> AbstractContextManager[Graph]:
        """Within it `stream` is current, and what is queued is kept instead of done. The graph can be
        replayed afterwards. One capture at a time.

        Raises:
            DeviceError: at the end, if a stream that took part was not waited for again.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Waits for all work of the device.

        Raises:
            DeviceError: some of it has failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Waits for what is queued and ends the streams. Calling it again does nothing."""


@contextmanager
def on_streams(streams: dict[Runtime, Stream]) -> Iterator[None]:
    """`Runtime.on` for one stream of each of several devices."""
    with ExitStack() as stack:
        for runtime, stream in streams.items():
            stack.enter_context(runtime.on(stream))
        yield


def hand_over(x: torch.Tensor, source: Runtime, target: Runtime) -> torch.Tensor:
    """A copy of ``source``'s tensor on ``target``, between the current streams of both; nobody else waits."""
    out = target.empty(x.shape, x.dtype)
    target.current.wait(source.current.record(), HANDOVER)
    target.copy(out, x)
    # The memory of `x` may go to later work of its stream.
    source.current.wait(target.current.record(), HANDOVER_READ)
    return out


HANDOVER = "another device's activations are there"
HANDOVER_READ = "another device has read the activations"
