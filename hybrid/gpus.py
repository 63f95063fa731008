"""Memory of this machine's GPUs, as their driver states it. Needs no driver and no torch."""

from __future__ import annotations

import ctypes


def gpu_memory() -> tuple[int, ...]:
    """Bytes of each GPU in the driver's order; empty where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), index):
            break
        if driver.cuDeviceTotalMem_v2(ctypes.byref(size), device):
            break
        found.append(size.value)
    return tuple(found)
