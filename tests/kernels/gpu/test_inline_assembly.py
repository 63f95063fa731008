"""The branches that the interpreter cannot take: their PTX, carried out in Python."""

from __future__ import annotations

import random
import re
from pathlib import Path

from hybrid.kernels.gpu import decode
from hybrid.kernels.gpu.dequantize_torch import IQ4_VALUES

SOURCE = Path(decode.__file__).read_text(encoding="utf-8")


def prmt(a, b, selector):
    """Byte permute of PTX in its default mode: a selector's high bit repeats the sign of the byte."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << (8 * i)
    return out


OPERATIONS = {
    "shr.u32": lambda a, b: a >> b,
    "or.b32": lambda a, b: a | b,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": prmt,
}


def run(ptx, argument):
    registers = {"$1": argument}
    for name, target, operands in re.findall(r"(\w+\.b?u?32) (\$?\w+), ([^;]+);", ptx):
        values = [registers[o] if o in registers else int(o, 0) for o in operands.split(", ")]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


def test_the_table_lookup_of_iq4_gives_its_values():
    (ptx,) = re.findall(r'"""\{\n(.*?)\}"""', SOURCE, re.DOTALL)
    assert ptx.count(";") == 11
    body = ptx.partition(";")[2]
    rng = random.Random(0)
    for _ in range(2000):
        indices = [rng.randrange(16) for _ in range(4)]
        word = run(body, int.from_bytes(bytes(indices), "little"))
        found = [b - 256 if b > 127 else b for b in word.to_bytes(4, "little")]
        assert found == [IQ4_VALUES[i] for i in indices]


def test_assembly_is_what_the_tests_know():
    assert re.findall(r'"(dp4a[^"]*)"', SOURCE) == ["dp4a.s32.s32 $0, $1, $2, $3;"]
    files = Path(decode.__file__).parent.glob("*.py")
    assert sum(path.read_text(encoding="utf-8").count("inline_asm_elementwise(") for path in files) == 2
