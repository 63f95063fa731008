"""Tables and numbers as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", " K", " M", " B", " T")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> str:
    """A Markdown table padded to equal widths; the columns named in ``right`` align right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    to_right = [name in right for name in header]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right_ else cell.ljust(width)
            for cell, width, right_ in zip(cells, widths, to_right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        f" {'-' * (width - 1)}: " if right_ else f" {'-' * width} "
        for width, right_ in zip(widths, to_right, strict=True)
    )
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def format_bytes(n: float) -> str:
    """``10 MiB``, ``9.63 GiB``: binary units, three digits."""
    for unit in _BYTE_UNITS:
        if n < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


def format_count(n: float) -> str:
    """``15.71 B``: decimal units, as parameter counts are written."""
    for unit in _COUNT_UNITS:
        if n < 1000 or unit == _COUNT_UNITS[-1]:
            return f"{n:.0f}" if not unit else f"{n:.2f}{unit}"
        n /= 1000
    raise AssertionError
