"""Keeping torch's own worker threads away from the CPU backend's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Run torch operations on the calling thread alone; the caller's setting comes back afterwards.

    OpenMP workers spin for milliseconds after each parallel operation, on the cores where the
    backend's thread pool computes the next layer: a softmax over the vocabulary on two threads made
    decoding three times slower than on one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
