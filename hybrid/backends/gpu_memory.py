"""A hard cap on the memory of GPUs. Nothing here needs one to be imported."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hybrid.errors import CapacityError


def limit_memory(budgets: Mapping[torch.device, int]) -> dict[torch.device, int]:
    """Lets torch take the budget of each GPU less what is taken there otherwise: by this process's context,
    and by other processes. Whatever would exceed it is an out-of-memory error.

    Returns:
        Bytes taken otherwise, on each GPU.

    Raises:
        CapacityError: nothing is left.
    """
    found = {}
    for device, budget in budgets.items():
        found[device] = other_bytes(device)
        _, total = torch.cuda.mem_get_info(device)
        allowed = min(budget, total) - found[device]
        if allowed <= 0:
            raise CapacityError(
                f"{device}: {found[device]} bytes are taken by the CUDA context and other processes, which "
                f"leaves nothing of the {budget} that may be used; end those, or raise --vram"
            )
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    return found


def other_bytes(device: torch.device) -> int:
    """Bytes of a GPU that are neither free nor held by this process's torch."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


def check_memory(budgets: Mapping[torch.device, int]) -> None:
    """After a first run of everything: what this process's torch and all others hold is within the budgets.

    Raises:
        CapacityError: it is not, by code that was loaded meanwhile or by another process.
    """
    for device, budget in budgets.items():
        free, total = torch.cuda.mem_get_info(device)
        if total - free > min(budget, total):
            raise CapacityError(
                f"{device}: {total - free} bytes are taken, {other_bytes(device)} of them by the CUDA "
                f"context, loaded kernels and other processes, and {budget} may be; raise --vram, or end "
                "other processes"
            )
