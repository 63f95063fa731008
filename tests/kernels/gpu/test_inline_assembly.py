"""The branches that the interpreter cannot take are two instructions of PTX, whose meaning is their plain
branches'.
"""

from __future__ import annotations

import re
from pathlib import Path

from hybrid.kernels.gpu import decode

SOURCE = Path(decode.__file__).read_text(encoding="utf-8")


def test_assembly_is_two_instructions():
    """``prmt`` in its default mode: nibbles of the third operand name bytes of the first two; those of 8 and
    more would repeat a sign, so the selectors that kernels make have none. ``dp4a`` of signed bytes.
    """
    assert re.findall(r'"((?:dp4a|prmt)[^"]*)"', SOURCE) == [
        "dp4a.s32.s32 $0, $1, $2, $3;",
        "prmt.b32 $0, $1, $2, $3;",
    ]
    files = Path(decode.__file__).parent.glob("*.py")
    assert sum(path.read_text(encoding="utf-8").count("inline_asm_elementwise(") for path in files) == 2
