"""Plain text for the command line."""

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of cells with equally wide columns: the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [str.ljust if number < left else str.rjust for number in range(len(widths))]
    return [
        "  ".join(f(cell, width) for f, cell, width in zip(pad, line, widths, strict=True)).rstrip() for line in lines
    ]
