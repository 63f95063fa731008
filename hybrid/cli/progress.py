"""Progress on a terminal's stderr, and silence elsewhere."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

PATIENCE_S = 2.0


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left, there at once; gives a function of (bytes done, bytes in all)."""
    with _bar(desc=title, unit="B", unit_divisor=1024) as bar:
        yield _setter(bar)


@contextlib.contextmanager
def prompt_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar that appears when a prompt takes over `PATIENCE_S`; gives a function of (tokens done, in all)."""
    with _bar(desc="prompt", unit=" tokens", delay=PATIENCE_S, mininterval=0) as bar:
        yield _setter(bar)


def _bar(**options: Any) -> tqdm[Any]:
    from tqdm import tqdm

    # A terminal that does not know its size says 0 x 0, where tqdm shows nothing.
    size = shutil.get_terminal_size()
    return tqdm(
        unit_scale=True, leave=False, disable=None, ncols=size.columns - 1, nrows=size.lines, **options
    )


def _setter(bar: tqdm[Any]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


@contextlib.contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line that each call replaces; an empty text removes it, and so does leaving."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")
