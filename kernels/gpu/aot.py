"""Compiling launches for a GPU that is not there, and what the compiled code needs.

The types of a launch's arguments give the signature that Triton would specialise for at run time: pointers
and integers divisible by 16 are known to be, an integer 1 and ``None`` are constants.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from hybrid.kernels.gpu.launch import Launch
from hybrid.kernels.gpu.target import Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(\S+)(.*?);")


@dataclass(frozen=True)
class Compiled:
    """Attributes:
    shared_bytes: shared memory of a program.
    stack_bytes, local_bytes: memory that registers spill to; anything but 0 is slow.
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    cubin: bytes


def specialisation(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes of a launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        aligned = False
        value = launch.constants[name] if name in launch.constants else launch.args[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def key(launch: Launch) -> str:
    """Equal for launches that compile to the same code."""
    signature, constants, attributes = specialisation(launch)
    shown = {k: getattr(v, "__name__", v) for k, v in constants.items()}
    options = launch.options()
    return f"{launch.kernel.__name__} {signature} {shown} {sorted(attributes)} {options}"


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Machine code of a launch for a target; needs no device and no driver."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    device = GPUTarget("cuda", target.capability, 32)
    compiled = triton.compile(source, target=device, options=launch.options())
    cubin = bytes(compiled.asm["cubin"])
    usage = _cuobjdump(cubin, "--dump-resource-usage")
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        launch.kernel.__name__,
        numbers["REG"],
        compiled.metadata.shared,
        numbers["STACK"],
        numbers["LOCAL"],
        cubin,
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def loop_instructions(compiled: Compiled) -> Counter[str]:
    """Instructions of the longest loop, by name: what a thread executes in one pass of it.

    Raises:
        ValueError: there is no loop.
    """
    found = [
        (int(a, 16), name, rest)
        for a, name, rest in _INSTRUCTION.findall(_cuobjdump(compiled.cubin, "-sass"))
    ]
    loops = [
        (int(to.group(1), 16), at)
        for at, name, rest in found
        if name.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", rest)) and int(to.group(1), 16) < at
    ]
    if not loops:
        raise ValueError(f"{compiled.name}: the machine code has no loop")
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return Counter(name for at, name, _ in found if begin <= at <= end)
