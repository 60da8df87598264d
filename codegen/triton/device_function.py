"""A device function under construction: the names of one attention, and lines that unpack what a body uses.

    inputs[i] = (pointer, stride of each dimension)      sizes[i] = a symbolic size      at[i] = a coordinate
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ...patterns import expr as ex
from ...patterns.cascade import size_term
from ...patterns.expr import Expr
from ..text.print_triton import HELPERS, TritonBody, TritonOperand, TritonScope, identifier
from .streaming import Streaming

HOLES = ("batch", "rows", "queries", "start", "products", "step", "values", "finish")
SPLIT_HOLES = ("save", "restore", "join")
# Names that the emitted module uses for itself.
RESERVED = (
    *HOLES, *SPLIT_HOLES, "span", "strides", "in_eights", "ranged", "around", "visits", "first", "last", "alive", "base",
    "lane", "stream", "tile", "merge", "launch_split", "parts_of", "LEAST_TILES", "RESIDENT",
    "MERGE", "attention", "sizes_of", "plan_of", "kept",
    "walk_of", "lists", "list_tiles", "tile_lists", "kept_lists", "LISTS", "MOST_LISTS",
    "index_type", "launch", "choose", "out", "inputs", "sizes", "tiles", "at", "acc", "state", "x", "q", "r", "w", "c", "i",
    "inside", "shape", "programs", "row_blocks", "walk", "device", "name", "tensor", "PARTIAL", "BM", "BN", "BF", "INDEX",
    "CONSTANTS", "CHUNK", "tl", "triton", "torch", "math", "Any", "Callable", "Mapping", "Tensor", "lru_cache", "float",
    "range", *HELPERS,
)


@dataclass(frozen=True)
class Printed:
    """One function's text and the device functions that it calls."""

    name: str
    text: str
    helpers: frozenset[str]


class KernelNames:
    """Python names for the ranks, sizes and tensors of one attention, all different."""

    reserved: ClassVar[tuple[str, ...]] = RESERVED

    def __init__(self, s: Streaming, trained: bool = False) -> None:
        """`trained`: behind the output stands where a row's scalars go."""
        self.s, self.trained = s, trained
        taken = set(self.reserved)

        def take(stem: str) -> str:
            name = identifier(stem, taken)
            taken.add(name)
            return name

        tensors = s.attention.cascade.tensor
        self.operands: dict[str, TritonOperand] = {}
        for t in (*s.inputs, s.cascade.outputs[0]):
            name = take(t)
            strides = tuple(take(f"{name}_{d}") for d in range(len(tensors[t].shape)))
            self.operands[t] = TritonOperand(name, strides, tensors[t].shape, tensors[t].dtype)
        self.symbols = {n: take(n) for n in s.cascade.free_symbols}
        self.ranks = {r: take(r) for r in s.extent}
        self.carried = {c.name: take(c.name.lower()) for c in s.state.carried}
        self.old = {n: take(f"{v}_old") for n, v in self.carried.items()}
        self.products = {p.load: take(str(p.load.attr).lower()) for p in s.products}

    def leaves(self, ranks: Iterable[str]) -> dict[Expr, str]:
        """Texts of coordinates and sizes."""
        out = {ex.index(r): self.ranks[r] for r in ranks}
        return out | {ex.symbol(n): v for n, v in self.symbols.items()}


class DeviceFunction:
    """A function under construction: its body, and lines that unpack what the body turned out to use."""

    def __init__(self, names: KernelNames, name: str, params: str, ranks: Iterable[str], roots: Iterable[Expr] = (),
                 guards: dict[str, str] | None = None) -> None:
        self.names, self.name, self.params = names, name, params
        s = names.s
        moving = {s.key: ("base", "lane")} if re.search(r"\blane\b", params) else {}
        scope = TritonScope(names.leaves(ranks), names.operands, s.extent, guards or {}, moving)
        self.body = TritonBody(scope, roots)
        self.body.taken |= {*HOLES, *re.findall(r"\w+", params), "stream", "tile", "tl", "out", "inside"}
        for own in (names.ranks, names.carried, names.old, names.products):
            self.body.taken |= set(own.values())

    def size(self, rank: str) -> str:
        return self.body.term(size_term(self.names.s.extent[rank]))

    def printed(self, doc: str) -> Printed:
        text = "\n".join(self.body.lines)
        words = set(re.findall(r"[^\W\d]\w*", text))
        head = ["@triton.jit", f"def {self.name}({self.params}):", f'    """{doc}"""']
        head += self._unpacked(words)
        return Printed(self.name, "\n".join([*head, text]), frozenset(self.body.helpers))

    def _unpacked(self, words: set[str]) -> Iterable[str]:
        s, names = self.names.s, self.names
        for i, t in enumerate(s.inputs):
            yield from _unpack(names.operands[t], f"inputs[{i}]", words)
        yield from _unpack(names.operands[s.cascade.outputs[0]], "out", words, ("p_saved",) if names.trained else ())
        for i, n in enumerate(s.cascade.free_symbols):
            if names.symbols[n] in words:
                yield f"    {names.symbols[n]} = sizes[{i}]"
        source = "batch" if self.name in ("rows", "span", "seen") else "at"
        for i, r in enumerate(coordinates(s) if source == "at" else s.grid):
            if names.ranks[r] in words and self.name not in ("batch", "lists", "keyed"):
                yield f"    {names.ranks[r]} = {source}[{i}]"


def _unpack(t: TritonOperand, source: str, words: set[str], more: tuple[str, ...] = ()) -> Iterable[str]:
    if t.name in words:
        parts = [n if n in words else "_" for n in (t.name, *t.strides, *more)]
        yield f"    {', '.join(parts)} = {source}" if len(parts) > 1 else f"    {t.name} = {source}[0]"


def coordinates(s: Streaming) -> tuple[str, ...]:
    """The ranks of `at`, in order: scalars of the program, then vectors over the block's rows."""
    return (*s.grid, *s.rows)


def atom(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def ragged(s: Streaming, tile_m: int) -> bool:
    """May the last key tile reach past the end?"""
    size = s.extent[s.key]
    return not (isinstance(size, int) and size % tile_m == 0)
