"""Tables for people: plain text, columns aligned."""

from collections.abc import Sequence


def as_table(headers: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Headers and lines; the first `left` columns begin at one place, the others end at one."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            f"{cell:<{width}}" if number < left else f"{cell:>{width}}"
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(aligned(line) for line in [headers, *lines])
