"""An operation against its reference on the same arguments."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from hybrid.kernels.gpu.op import Make, Op, Shape, shape_name
from hybrid.kernels.gpu.target import target_of


class WrongResult(Exception):
    """A kernel's result is further from its reference than arithmetic explains."""


def make_arguments(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The same numbers for the same operation, shape and type, on any device."""
    seed = zlib.crc32(f"{op.name} {shape_name(shape)} {dtype}".encode())
    return op.arguments(shape, Make(device, dtype, torch.Generator().manual_seed(seed)))


def _copied(value: Any, device: torch.device | None = None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().to(device or value.device)
    return value.to(device) if device is not None and hasattr(value, "planes") else value


def verify(op: Op, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error as a share of what is allowed.

    Raises:
        WrongResult: it is above 1, or a result has the wrong shape.
    """
    args = make_arguments(op, shape, dtype, device)
    host = {name: _copied(value, torch.device("cpu")) for name, value in args.items()}
    taken = {name: _copied(value) for name, value in host.items()}
    found = [*op.plan(target_of(device), **args).run(), *(args[name] for name in op.changed)]
    wanted = (*op.reference(**taken), *(taken[name] for name in op.changed))
    bounds = op.bounds(host, wanted)
    where = f"{op.name} {shape_name(shape)} {dtype}"
    if not len(found) == len(wanted) == len(bounds):
        raise WrongResult(f"{where}: {len(found)} results, {len(wanted)} references, {len(bounds)} bounds")
    worst = 0.0
    for number, (result, reference, bound) in enumerate(zip(found, wanted, bounds, strict=True)):
        if result.shape != reference.shape:
            raise WrongResult(
                f"{where}: result {number} is {tuple(result.shape)}, not {tuple(reference.shape)}"
            )
        difference = (result.cpu().double() - reference.double()).abs()
        limit = torch.as_tensor(bound, dtype=torch.float64).expand_as(difference)
        if not bool((difference <= limit).all()):  # NaN fails too
            excess = torch.nan_to_num(difference - limit, nan=float("inf"))
            at = int(excess.argmax())
            raise WrongResult(
                f"{where}: result {number} is wrong at flat index {at} "
                f"({int((excess > 0).sum())} of {excess.numel()} places): {float(result.flatten()[at])}, "
                f"reference {float(reference.flatten()[at])}, "
                f"allowed difference {float(limit.flatten()[at]):.3e}"
            )
        if difference.numel():
            worst = max(worst, float(torch.where(limit > 0, difference / limit, 0.0).max()))
    return worst
