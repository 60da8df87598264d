"""The table of a sharding plan: what a device holds and sends under every way, how long a step takes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..words import bytes_text, seconds_text, table_of, table_text
from .scheme import Scheme

COLUMNS = ("way", "exact", "holds", "of it cache", "a token", "computes", "sends", "step", "bound", "largest batch", "why")
RIGHT = ("holds", "of it cache", "a token", "computes", "sends", "step", "largest batch")


def mesh_table(schemes: Sequence[Scheme], head: str, note: str = "", width: int | None = None) -> str:
    """One row a way under a heading, best first; those that cannot run say why instead."""
    table = table_of(COLUMNS, right=RIGHT, whole=COLUMNS[:-1])
    for s in _grouped(schemes):
        table.add_row(*_row(s))
    lines = [head, table_text(table, width)]
    return "\n".join([*lines, f"({note})"] if note else lines)


def _grouped(schemes: Sequence[Scheme]) -> list[Scheme]:
    """Ways that cannot be for one reason are one row, which names them all."""
    alike: dict[str, list[Scheme]] = {}
    for s in schemes:
        alike.setdefault(s.name if s.parts else s.why, []).append(s)
    return [
        replace(first, why=f"{first.why}; the same goes for {', '.join(s.name for s in more)}" if more else first.why)
        for first, *more in alike.values()
    ]


def _row(s: Scheme) -> tuple[str, ...]:
    exact = "yes" if s.exact else "no"
    if not s.parts:
        return (s.name, exact, "–", "", "", "", "", "–", "", "", s.why)
    step = seconds_text(s.seconds) if s.feasible else f"({seconds_text(s.seconds)})"
    return (
        s.name, exact, bytes_text(s.held_bytes), bytes_text(s.cache_bytes), f"{s.token_bytes:.0f} B", _flop(s.flops),
        bytes_text(s.sent_bytes), step, s.bound, _batches(s), s.why,
    )


def _batches(s: Scheme) -> str:
    """The two lengths at which readers compare; JSON has them all."""
    return ", ".join(f"{s.batches[n]} at {_length(n)}" for n in sorted(s.batches) if n in (32768, 131072))


def _flop(n: float) -> str:
    """1.23 TFLOP, 45.6 GFLOP"""
    unit, scale = ("TFLOP", 1e12) if n >= 1e12 else ("GFLOP", 1e9)
    return f"{n / scale:.3g} {unit}"


def _length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
