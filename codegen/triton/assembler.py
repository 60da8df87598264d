"""NVIDIA's assembler, as cuobjdump prints it: its loops, and what one turn of a loop issues.

    instructions(text)  →  every instruction        loops(text)  →  the innermost loops that multiply matrices
    loop.counts         instructions by kind, as `KINDS` has them; loop.busy: all but those that only wait
    loop.in_flight      groups of asynchronous copies that one turn leaves running where it waits for others
    loop.order          kinds in the order of issue, runs of one kind together
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import networkx as nx

# The first kind whose pattern fits the start of an instruction, guard left off, is its kind.
KINDS: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "matrix": r"HGMMA|HMMA|UTC\w*MMA", "matrix wait": r"WARPGROUP\.DEPBAR", "exp2": r"MUFU\.EX2",
        "special": r"MUFU", "multiply": r"FMUL", "fused": r"FFMA", "add": r"FADD", "maximum": r"FMNMX",
        "select": r"FSEL|SEL\b", "compare": r"FSETP|ISETP", "narrow": r"F2FP", "convert": r"I2F|F2I",
        "integer": r"U?(?:IADD|VIADD|IMAD|LEA|LOP3|SHF|SHL)", "copy": r"LDGSTS", "copy group": r"LDGDEPBAR",
        "copy wait": r"DEPBAR\.LE SB0", "bulk copy": r"UTMALDG", "global load": r"LDG\b", "shared load": r"LDS",
        "shared store": r"STS", "tensor memory": r"LDTM|STTM", "shuffle": r"SHFL", "barrier": r"BAR\.|SYNCS",
        "spill": r"LDL|STL", "branch": r"BRA", "idle": r"NOP",
    }.items()
}
OTHER = "other"
# Kinds that say nothing about how a loop is scheduled.
_PLAIN = ("integer", "compare", "branch", "idle", OTHER)


@dataclass(frozen=True)
class Instruction:
    """One instruction. `guard` is the predicate under which it is issued, or empty."""

    address: int
    guard: str
    text: str

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS.items() if pattern.match(self.text)), OTHER)

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes; some calls are branches that never return."""
        found = re.match(r"(?:BRA|CALL)\b.*?\b0x([0-9a-f]+)$", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def leaves(self) -> bool:
        """Is what follows reached from elsewhere only? A branch that tests something names it before its target."""
        return not self.guard and re.match(r"EXIT|RET|BRA(?:\.CONV\S*)?\s+0x", self.text) is not None


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, in the order of the text."""

    instructions: tuple[Instruction, ...]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        return Counter(i.kind for i in self.instructions)

    @property
    def busy(self) -> int:
        """Instructions that do something: between products that wait for one another the assembler puts some that do not."""
        return len(self.instructions) - self.counts["idle"]

    @property
    def in_flight(self) -> int | None:
        """The fewest groups of copies left running at a wait; None where a turn starts no copies of this sort."""
        waits = [int(i.text.rpartition("0x")[2], 16) for i in self.instructions if i.kind == "copy wait"]
        return min(waits) if waits and "copy group" in self.counts else None

    @property
    def order(self) -> str:
        kinds = (i.kind for i in self.instructions if i.kind not in _PLAIN)
        runs = ((kind, len(list(run))) for kind, run in groupby(kinds))
        return ", ".join(kind if n == 1 else f"{kind} ×{n}" for kind, n in runs)


def instructions(text: str) -> tuple[Instruction, ...]:
    """Every instruction of the printed functions."""
    found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z].*?)\s*;", text)
    return tuple(Instruction(int(m[1], 16), (m[2] or "").strip(), m[3]) for m in found)


def loops(text: str, kind: str = "matrix") -> tuple[Loop, ...]:
    """The innermost loops of one function among those that hold an instruction of a kind.

    h dominates a branch to h; the body is what reaches that branch without passing h. So code that the assembler moved
    behind the end of the function is counted where it runs, and a wait that turns on a barrier is part of its loop.
    """
    code = instructions(text)
    if not code:
        return ()
    wanted = {n for n, i in enumerate(code) if i.kind == kind}
    bodies = [b for b in _bodies(_flow(code)) if b & wanted]
    inner = [b for b in bodies if not any(other < b for other in bodies)]
    return tuple(Loop(tuple(code[i] for i in sorted(b))) for b in sorted(inner, key=min))


def _flow(code: tuple[Instruction, ...]) -> nx.DiGraph[int]:
    """The control flow, instructions called by their places."""
    place = {i.address: n for n, i in enumerate(code)}
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_node(0)
    for n, i in enumerate(code):
        if not i.leaves and n + 1 < len(code):
            flow.add_edge(n, n + 1)
        if i.target in place:
            flow.add_edge(n, place[i.target])
    return flow


def _bodies(flow: nx.DiGraph[int]) -> list[frozenset[int]]:
    """The natural loops, those of one head together."""
    parents = nx.immediate_dominators(flow, 0)
    found: dict[int, set[int]] = {}
    for branch, head in flow.edges:
        if branch in parents and head in _dominators(branch, parents):
            found.setdefault(head, {head}).update(_reaching(flow, branch, head))
    return [frozenset(body & set(parents)) for body in found.values()]


def _dominators(n: int, parents: Mapping[int, int | None]) -> Iterator[int]:
    """An instruction and all that every way to it passes."""
    at: int | None = n
    while at is not None:
        yield at
        above = parents.get(at)
        at = None if above == at else above


def _reaching(flow: nx.DiGraph[int], branch: int, head: int) -> set[int]:
    """What reaches `branch` without passing `head`."""
    found, pending = {head}, [branch]
    while pending:
        n = pending.pop()
        if n not in found:
            found.add(n)
            pending += flow.predecessors(n)
    return found
