"""A server from its socket to its exit code: load, serve, drain, end.

The port is bound before the model is read, so that a second server is told at once, and it answers while the
model loads: ``/health`` with 503. The first SIGTERM or SIGINT drains: new requests get 503, those under way
may finish for a while, then they end with an error. The second signal ends the process. If the engine dies,
everything under way ends with an error, and the process with exit code 1, for its supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from hybrid.errors import HybridError
from hybrid.log import get_logger
from hybrid.server.app import create_app
from hybrid.server.connection import SEND_BUFFER_BYTES, DeadlineConfig
from hybrid.server.context import Phase, ServerContext, engine_failed
from hybrid.server.engine_api import AsyncEngine
from hybrid.server.errors import unavailable
from hybrid.server.model_card import ModelCard
from hybrid.server.settings import ServerSettings

logger = get_logger(__name__)

Progress = Callable[[int, int], None]
Load = Callable[[Progress], tuple[AsyncEngine, ModelCard]]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WATCH_S = 0.1
_LAST_WORDS_S = 2.0  # for error events to leave, and for a load to notice that it is not wanted
_BACKLOG = 1024


class LoadStopped(BaseException):
    """Raised inside a load that nobody wants any more. No ``Exception``: nothing on the way handles it."""


def listen(settings: ServerSettings) -> socket.socket:
    """A socket that listens where the settings say.

    Raises:
        HybridError: the address is in use or not of this machine.
    """
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise HybridError(
            f"cannot listen on {where}: {reason}; choose another with --host and --port"
        ) from None
    listener.setblocking(False)
    return listener


def serve(settings: ServerSettings, load: Load) -> int:
    """Serve until a signal or the engine's end; returns the exit code.

    Args:
        load: makes the engine, in a thread; calls its argument with bytes read and in all.

    Raises:
        HybridError: the address is taken.
        Exception: whatever ``load`` raised.
    """
    listener = listen(settings)
    return asyncio.run(ModelServer(settings, listener, load).run())


class ModelServer(uvicorn.Server):
    """uvicorn's server with our signals, and an engine that is loaded while it answers."""

    def __init__(self, settings: ServerSettings, listener: socket.socket, load: Load) -> None:
        self.context = ServerContext(settings)
        super().__init__(
            DeadlineConfig(
                create_app(self.context),
                header_timeout_s=settings.header_timeout_s,
                send_timeout_s=settings.send_timeout_s,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        self._listener, self._load = listener, load
        self._stop_loading = threading.Event()
        self._loaded: asyncio.Future[tuple[AsyncEngine, ModelCard]] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._exit_code = 0

    @property
    def url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run(self) -> int:  # type: ignore[override]
        """Everything, from loading to the exit code."""
        self._loop = loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                loop.add_signal_handler(signum, self.stop, signum)
        logger.info("listening on %s, loading the model", self.url)
        managing = asyncio.create_task(self._manage())
        try:
            await self.serve(sockets=[self._listener])
        finally:
            self.should_exit = True
            await self._end(managing)
        if self._exit_code == 0 and self._loaded is not None and self._loaded.done():
            error = self._loaded.exception()
            if isinstance(error, Exception):
                raise error
        return self._exit_code

    def stop(self, signum: int = signal.SIGTERM) -> None:
        """Drain; at the second call, end the process."""
        if self._stopping is not None:
            logger.warning("second signal: ending at once")
            _flush()
            os._exit(128 + signum)
        self._stopping = asyncio.get_running_loop().create_task(self._drain())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's are not wanted."""
        yield

    async def _manage(self) -> None:
        """Load, then watch the engine until the server stops."""
        self._loaded = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._load_in_thread, name="load", daemon=True).start()
        try:
            engine, card = await asyncio.shield(self._loaded)
        except (Exception, LoadStopped):
            self.should_exit = True
            return
        self.context.ready(engine, card)
        logger.info("ready on %s: %s", self.url, engine.describe())
        while not self.should_exit:
            if engine.errored is not None and self.context.phase is not Phase.FAILED:
                await self._fail()
            await asyncio.sleep(_WATCH_S)

    def _load_in_thread(self) -> None:
        loop, loaded = self._loop, self._loaded
        assert loaded is not None

        def progress(done: int, total: int) -> None:
            if self._stop_loading.is_set():
                raise LoadStopped
            self.context.progress = done / max(total, 1)

        def tell(result: tuple[AsyncEngine, ModelCard] | None, error: BaseException | None) -> None:
            if loaded.cancelled():
                return
            if error is not None:
                loaded.set_exception(error)
            elif result is not None:
                loaded.set_result(result)

        try:
            result = self._load(progress)
        except BaseException as error:
            _call(loop, tell, None, error)
        else:
            _call(loop, tell, result, None)

    async def _drain(self) -> None:
        context, timeout_s = self.context, self.context.settings.shutdown_timeout_s
        if context.phase is Phase.LOADING:
            logger.info("stopping while the model loads")
            self._stop_loading.set()
            context.phase = Phase.DRAINING
            self.should_exit = True
            return
        context.phase = Phase.DRAINING
        logger.info(
            "draining: %d requests under way, at most %g s; a second signal ends them",
            context.num_under_way,
            timeout_s,
        )
        try:
            async with asyncio.timeout(timeout_s):
                await context.idle.wait()
        except TimeoutError:
            logger.warning("ending %d requests that took too long", context.num_under_way)
            await self._end_requests()
        self.should_exit = True

    async def _fail(self) -> None:
        self.context.phase = Phase.FAILED
        self._exit_code = 1
        logger.error("the engine has failed, ending: %s", self._describe_failure())
        await self._end_requests()
        self.should_exit = True

    def _describe_failure(self) -> str:
        error = None if self.context.engine is None else self.context.engine.errored
        return f"{type(error).__name__}: {error}"

    async def _end_requests(self) -> None:
        failed = self.context.phase is Phase.FAILED
        error = engine_failed() if failed else unavailable("the server is shutting down", "draining")
        self.context.fail_all(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self.context.idle.wait()

    async def _end(self, managing: asyncio.Task[None]) -> None:
        """Free the engine. A load that does not stop ends with the process."""
        self._stop_loading.set()
        if self._loaded is not None and not self._loaded.done():
            await asyncio.wait({self._loaded}, timeout=_LAST_WORDS_S)
            if not self._loaded.done():
                _flush()
                os._exit(self._exit_code)
        await managing
        self.context.close()
        if self.context.engine is not None:
            await asyncio.to_thread(self.context.engine.close)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended before the load
        loop.call_soon_threadsafe(function, *arguments)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
