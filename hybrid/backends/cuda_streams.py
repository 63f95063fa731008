"""`hybrid.backends.streams` on CUDA: torch's streams, events and graphs, and the driver's host callbacks.

torch has no host callbacks, so `cuLaunchHostFunc` is looked up in the driver when the first one is needed.
Nothing here needs a GPU to be imported. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from hybrid.backends.streams import Event, Graph, Runtime, Stream
from hybrid.errors import DeviceError
from hybrid.log import get_logger

logger = get_logger(__name__)


@cache
def _driver() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        DeviceError: there is none.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"the CUDA driver cannot be loaded: {error}; install one, or use cpu") from error
    driver.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return driver


def _launch_host_function(stream: int, function: int, argument: int) -> None:
    driver = _driver()
    code = driver.cuLaunchHostFunc(stream, function, argument)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise DeviceError(f"cuLaunchHostFunc failed: {(text.value or b'unknown').decode()} ({code})")


class CudaEvent(Event):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.raw = event

    def synchronize(self, site: str) -> None:
        try:
            self.raw.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"{site}: {error}; load the model again") from error

    def is_done(self) -> bool:
        return bool(self.raw.query())  # type: ignore[no-untyped-call]


class CudaStream(Stream):
    def __init__(self, raw: torch.cuda.Stream, name: str) -> None:
        self.raw, self.name = raw, name

    def record(self) -> CudaEvent:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.raw)
        return CudaEvent(event)

    def wait(self, event: Event, site: str) -> None:
        assert isinstance(event, CudaEvent)
        self.raw.wait_event(event.raw)

    def call(self, function: int, argument: int, site: str) -> None:
        _launch_host_function(self.raw.cuda_stream, function, argument)


class CudaGraph(Graph):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.raw, self._stream = torch.cuda.CUDAGraph(), stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self.raw.replay()


class CudaRuntime(Runtime):
    """Streams of the device ``cuda:N``. ``main`` is torch's default stream of it."""

    def __init__(self, name: str) -> None:
        self.name, self._device = name, torch.device(name)
        self._streams: dict[int, CudaStream] = {}  # by handle
        self.main: CudaStream = self._known(torch.cuda.default_stream(self._device), "main")

    def _known(self, raw: torch.cuda.Stream, name: str) -> CudaStream:
        return self._streams.setdefault(raw.cuda_stream, CudaStream(raw, name))

    @property
    def current(self) -> CudaStream:
        return self._known(torch.cuda.current_stream(self._device), "of torch")

    def stream(self, name: str) -> CudaStream:
        # torch's own streams come from a pool of 32 that others share.
        return self._known(torch.cuda.Stream(self._device), name)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, CudaStream)
        with torch.cuda.stream(stream.raw):
            yield

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            logger.warning(
                "%s: the system refuses to pin memory of %s %s, copies take longer: %s",
                self.name, list(shape), dtype, error,
            )  # fmt: skip
            return torch.empty(tuple(shape), dtype=dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[CudaGraph]:
        assert isinstance(stream, CudaStream)
        graph = CudaGraph(stream.raw)
        try:
            # Other threads of the process may go on allocating.
            with torch.cuda.graph(graph.raw, stream=stream.raw, capture_error_mode="thread_local"):
                yield graph
        except RuntimeError as error:
            raise DeviceError(
                f"{self.name}: a step cannot be captured: {error}; --no-cuda-graph goes without"
            ) from error

    def synchronize(self) -> None:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            raise DeviceError(f"{self.name}: {error}; load the model again") from error

    def close(self) -> None:
        if self._streams:
            self.synchronize()
        self._streams.clear()
