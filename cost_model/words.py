"""Numbers, names and tables as people read them: three digits that count, a unit, one name for a group."""

from __future__ import annotations

import io
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.table import Table

WIDTH = 160
# On screens narrower than this a cell has no room to be broken well.
NARROW = 100
NUMBER = re.compile(r"\d+")
# What is copied from a table stays on one line.
_WHOLE = ("what", "where", "chosen", "candidate", "time")


def table_of(titles: Sequence[str], right: Sequence[str] = (), whole: Sequence[str] = _WHOLE) -> Table:
    """A table without lines; the columns `right` are flush right, and those of `whole` are never broken."""
    table = Table(box=None, pad_edge=False)
    for t in titles:
        table.add_column(t, justify="right" if t in right else "left", overflow="fold", no_wrap=t in whole)
    return table


def screen_width() -> int:
    """Columns to print in: COLUMNS, else those of the terminal, else 160, as in a file."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def table_text(table: Table, width: int | None = None) -> str:
    """The table as text, without blanks at the ends of lines; one line a cell where it is too wide for the screen."""
    width, out = width or screen_width(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, highlight=False, markup=False)
    needs = console.measure(table, options=console.options.update(max_width=sys.maxsize))
    if needs.minimum > width or (width < NARROW and needs.maximum > width):
        return _records(table, width)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _records(table: Table, width: int) -> str:
    """Each row as a paragraph: its first cell, and under it a line for each other one that is not empty."""
    titles = [str(c.header) for c in table.columns]
    indent = 2 + max(map(len, titles[1:]), default=0) + 2
    lines: list[str] = []
    for first, *cells in zip(*(c.cells for c in table.columns), strict=True):
        lines += textwrap.wrap(str(first), width) or [""]
        for title, cell in zip(titles[1:], cells):
            under = " " * indent
            head = f"  {title}".ljust(indent)
            lines += textwrap.wrap(str(cell), max(width, indent + 20), initial_indent=head, subsequent_indent=under)
    return "\n".join(lines)


def seconds_text(seconds: float) -> str:
    """1.23 s, 45.6 ms, 7.89 µs: three digits that count."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def between(seconds: float, band: float) -> str:
    """The band of a time: `6.53 to 11.9 µs`; the unit stands once where both ends share it."""
    low, high = seconds_text(seconds / (1 + band)), seconds_text(seconds * (1 + band))
    number, _, unit = low.partition(" ")
    return f"{number if high.endswith(f' {unit}') else low} to {high}"


def tokens_text(n: int) -> str:
    """4096 as 4k, 1048576 as 1M; other numbers as they are."""
    for unit, scale in (("M", 1 << 20), ("k", 1 << 10)):
        if n >= scale and n % scale == 0:
            return f"{n // scale}{unit}"
    return str(n)


def bytes_text(n: float) -> str:
    """1.23 GB, 45.6 MB: three digits that count, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}" if n / scale < 1000 else f"{n / scale:.0f} {unit}"
    return f"{n:.0f} B"


def short_path(where: str) -> str:
    """The last two parts of a path are enough to recognise it."""
    return "/".join(where.split("/")[-2:])


def group_name(names: Sequence[str]) -> str:
    """`model.layers.[0-31].self_attn` for names that differ by one number; else the first name."""
    first = names[0]
    if len(set(names)) == 1:
        return first
    numbers = [NUMBER.findall(n) for n in names]
    if len({NUMBER.sub("#", n) for n in names}) > 1:
        return first
    varying = [i for i in range(len(numbers[0])) if len({row[i] for row in numbers}) > 1]
    if len(varying) != 1:
        return first
    (at,) = varying
    spread = _spread(sorted({int(row[at]) for row in numbers}))
    parts = iter(range(len(numbers[0])))
    return NUMBER.sub(lambda m: f"[{spread}]" if next(parts) == at else m.group(), first)


def _spread(values: Sequence[int]) -> str:
    """0-31; 0-30:2 for every second; else the numbers, the first few."""
    steps = {b - a for a, b in pairwise(values)}
    if len(steps) == 1:
        (step,) = steps
        return f"{values[0]}-{values[-1]}" + (f":{step}" if step > 1 else "")
    return ",".join(map(str, values[:6])) + (",…" if len(values) > 6 else "")
