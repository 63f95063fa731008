"""Small files in which the system describes itself, as /proc and /sys hold them.

``root`` is where those folders begin, so that tests can show other machines.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path


def read_system_file(path: Path) -> str:
    """The text of a file, empty where the system does not have it or does not let it be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def processor_name(root: Path = Path("/")) -> str:
    """What /proc/cpuinfo calls the processor; the architecture where it has no name."""
    found = re.search(r"^model name\s*:\s*(.*)$", read_system_file(root / "proc/cpuinfo"), re.MULTILINE)
    return found.group(1) if found else platform.machine()
