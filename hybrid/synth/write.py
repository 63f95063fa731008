"""Writing a random-weight model file, straight in quantised blocks.

A block of random bytes is a valid block of most formats, so nothing is quantised: a pool of random
blocks is made for each (format, spread) and tensors are filled with runs of it that start at random
blocks. The speed is that of the disk. Matrices of one spread thus share blocks, at different places.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from hybrid.errors import CapacityError, ConfigError
from hybrid.gguf import RANDOM_TYPES, TRAITS, GGMLType, GGUFWriter, random_blocks
from hybrid.placement.size_text import size_text
from hybrid.synth.presets import KvBLayout, ModelShape, metadata
from hybrid.synth.routing import RoutingEntropy
from hybrid.synth.tensors import Formats, SynthTensor, list_tensors
from hybrid.synth.vocabulary import vocabulary_metadata

_POOL_BYTES = 4 << 20, 32 << 20  # least and most; a file's size is enough in between
_RUNS_PER_POOL = 8  # runs are that much shorter than the pool, so that few begin alike
_HEADER_ROOM = 64 << 20  # a header with a vocabulary of 160,000 tokens takes about 10 MB

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SynthReport:
    """What was written. ``fallbacks``: (format asked for, row length) -> format written in its place."""

    path: Path
    n_bytes: int
    num_parameters: int
    fallbacks: dict[tuple[GGMLType, int], GGMLType]
    routing_bits: float | None
    max_routing_bits: float


def synthesise(
    path: str | os.PathLike[str],
    shape: ModelShape,
    formats: Formats | None = None,
    *,
    kv_b: KvBLayout = "split",
    seed: int = 0,
    header_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SynthReport:
    """Writes a GGUF file of the given shape; the file appears under its name when it is complete.

    Args:
        progress: called with (bytes written by now, bytes in all).

    Raises:
        ConfigError: a format fits the rows of a tensor neither itself nor by its fallback, or has no
            random blocks.
        CapacityError: the disk lacks the room; nothing has been written then.
    """
    target = Path(path)
    formats = formats or Formats()
    tensors, fallbacks = list_tensors(shape, formats, kv_b)
    total = sum(tensor.n_bytes for tensor in tensors)
    _check_disk(target, 0 if header_only else total)
    _check_formats(tensors)
    filler = _Filler(np.random.default_rng(seed), min(max(total, _POOL_BYTES[0]), _POOL_BYTES[1]))
    entropy = RoutingEntropy(shape, np.random.default_rng([seed, 1]))
    with GGUFWriter(target, header_only=header_only) as writer:
        for key, value in _all_metadata(shape, formats, kv_b).items():
            writer.add_metadata(key, value)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.shape, tensor.type)
        if not header_only:
            _write_data(writer, tensors, filler, entropy, progress)
    return SynthReport(
        path=target,
        n_bytes=target.stat().st_size,
        num_parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        fallbacks=fallbacks,
        routing_bits=None if header_only else entropy.bits,
        max_routing_bits=entropy.max_bits,
    )


def _all_metadata(shape: ModelShape, formats: Formats, kv_b: KvBLayout) -> dict[str, Any]:
    return {
        "general.architecture": "deepseek2",
        "general.name": f"{shape.name} (random weights)",
        "general.file_type": file_type(formats.experts),
        "general.quantization_version": 2,
        **metadata(shape, kv_b),
        **vocabulary_metadata(shape.vocabulary),
    }


def file_type(type_: GGMLType) -> int:
    """`general.file_type`, the label llama.cpp shows, for a file whose experts have this format."""
    for name in (
        f"ALL_{type_.name}",
        f"MOSTLY_{type_.name}",
        f"MOSTLY_{type_.name}_M",
        f"MOSTLY_{type_.name}_MOE",
    ):
        if name in gguf.LlamaFileType.__members__:
            return int(gguf.LlamaFileType[name])
    return int(gguf.LlamaFileType.GUESSED)


def _check_formats(tensors: list[SynthTensor]) -> None:
    for tensor in tensors:
        if tensor.type not in RANDOM_TYPES:
            known = ", ".join(sorted(type_.name for type_ in RANDOM_TYPES))
            raise ConfigError(
                f"{tensor.type.name} cannot be filled with random weights; choose one of {known}"
            )


def _check_disk(target: Path, data_bytes: int) -> None:
    free = shutil.disk_usage(target.resolve().parent).free
    if data_bytes + _HEADER_ROOM > free:
        raise CapacityError(
            f"{target}: {size_text(data_bytes)} of weights and a header of at most {size_text(_HEADER_ROOM)} "
            f"do not fit on the disk, which has {size_text(free)} left; free some space, or take fewer "
            "--layers or smaller formats"
        )


def _write_data(
    writer: GGUFWriter,
    tensors: list[SynthTensor],
    filler: _Filler,
    entropy: RoutingEntropy,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(tensor.n_bytes for tensor in tensors), 0

    def counted(chunks: Iterable[Bytes]) -> Iterator[Bytes]:
        nonlocal done
        for chunk in chunks:
            yield chunk
            done += chunk.nbytes
            if progress is not None:
                progress(done, total)

    router: npt.NDArray[np.float32] | None = None
    for tensor in tensors:
        if tensor.type is not GGMLType.F32:
            writer.write_tensor(tensor.name, counted(filler.runs(tensor)))
            continue
        values = filler.floats(tensor)
        writer.write_tensor(tensor.name, counted([values.view(np.uint8).reshape(-1)]))
        # The router's bias, where there is one, comes right after the router.
        if router is not None and not entropy.complete:
            entropy.add_layer(router, values if tensor.name.endswith("exp_probs_b.bias") else None)
        router = values if ".ffn_gate_inp." in tensor.name else None


@dataclass
class _Filler:
    """Random values for tensors. ``pools`` holds blocks for each (format, spread)."""

    rng: np.random.Generator
    pool_bytes: int
    pools: dict[tuple[GGMLType, float], Bytes] = field(default_factory=dict)

    def floats(self, tensor: SynthTensor) -> npt.NDArray[np.float32]:
        if not tensor.std:
            return np.full(tensor.shape, tensor.mean, np.float32)
        values = self.rng.standard_normal(tensor.shape, dtype=np.float32)
        return values * np.float32(tensor.std) + np.float32(tensor.mean)

    def runs(self, tensor: SynthTensor) -> Iterator[Bytes]:
        """The bytes of a quantised tensor in pieces of a few MiB."""
        block_bytes = TRAITS[tensor.type].block_bytes
        pool = self._pool(tensor)
        num_blocks = len(pool) // block_bytes
        left = tensor.n_bytes // block_bytes
        while left:
            count = min(left, num_blocks // _RUNS_PER_POOL)
            start = int(self.rng.integers(num_blocks - count + 1)) * block_bytes
            yield pool[start : start + count * block_bytes]
            left -= count

    def _pool(self, tensor: SynthTensor) -> Bytes:
        key = tensor.type, tensor.std
        if key not in self.pools:
            traits = TRAITS[tensor.type]
            num_blocks = self.pool_bytes // traits.block_bytes
            blocks = random_blocks(tensor.type, num_blocks, traits.block_size, self.rng, tensor.std)
            self.pools[key] = blocks.reshape(-1)
        return self.pools[key]
