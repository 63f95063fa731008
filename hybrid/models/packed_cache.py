"""Using a cache of packed weights: finding it, and making it where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybrid.backends.base import Backend
from hybrid.backends.packed_cache import PackedFile, cache_path
from hybrid.backends.source import TensorSource
from hybrid.gguf import GGUFFile
from hybrid.log import get_logger
from hybrid.models.weights import Progress

logger = get_logger(__name__)


def find_packed_cache(file: GGUFFile, folder: Path) -> Path | None:
    """The cache of a model file in a folder, if there is one that can be used."""
    path = cache_path(file, folder)
    found = PackedFile.open(path, file)
    if found is None:
        return None
    found.close()
    return path


def use_packed_cache(
    file: GGUFFile,
    sources: Sequence[TensorSource],
    backend: Backend,
    folder: Path,
    progress: Progress | None = None,
) -> Path | None:
    """Lets the CPU's backend take weights from the cache in a folder, which is written first if need be.

    Args:
        sources: the matrices of the CPU, in the order they are loaded.

    Returns:
        The cache; ``None`` where another process is writing it, and weights are packed as without one.

    Raises:
        CapacityError: the disk has too little room for it.
        OSError: the folder cannot be written.
    """
    from hybrid.backends.cpu import CpuBackend

    if not isinstance(backend, CpuBackend) or not sources:
        return None
    path = cache_path(file, folder)
    found = PackedFile.open(path, file)
    if found is None:
        try:
            write_packed_cache(file, sources, backend, path, progress)
        except BlockingIOError:
            logger.warning("%s: another process is writing this cache; this one does without", path)
            return None
        found = PackedFile.open(path, file)
    if found is not None:
        backend.use_cache(found)
    return path


def write_packed_cache(
    file: GGUFFile,
    sources: Sequence[TensorSource],
    backend: Backend,
    path: Path,
    progress: Progress | None = None,
) -> None:
    """Packs matrices into a cache file.

    Raises:
        CapacityError, OSError: see `use_packed_cache`; BlockingIOError: another process is writing it.
    """
    from hybrid.backends.cpu import CpuBackend

    assert isinstance(backend, CpuBackend)
    done, total = 0, sum(source.n_bytes for source in sources)

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    backend.write_cache(file, [replace(source, on_read=advance) for source in sources], path)
