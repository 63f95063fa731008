"""Looking for markers in text that is still growing."""

from __future__ import annotations

from collections.abc import Iterable


def find_first(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Position and text of the leftmost marker, of these the longest; ``None`` where there is none."""
    found = [(position, -len(marker), marker) for marker in markers if (position := text.find(marker)) >= 0]
    if not found:
        return None
    position, _, marker = min(found)
    return position, marker


def certain_length(text: str, markers: Iterable[str]) -> int:
    """How much of ``text``, which holds no marker, cannot belong to one or to white space before one.

    What comes after is held back until more text tells.
    """
    end = len(text)
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), 0, -1):
            if text.endswith(marker[:length]):
                end = min(end, len(text) - length)
                break
    return len(text[:end].rstrip())
