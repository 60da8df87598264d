"""Draws the map of the code from its import graph: one line a room, upper floors first, and the figures of the whole.

    python docs/map.py            prints it
    python docs/map.py --write    puts it into docs/map.md
    python docs/map.py --check    fails where docs/map.md shows something else
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grimp
import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "map.md"
PACKAGE = "reattend"
# From the front door downwards.
LAYERS = (PACKAGE, "rewriter", "codegen", "cost_model", "patterns")
BEGIN, END = "```text\n", "```\n"


@dataclass(frozen=True)
class Figures:
    """A graph of imports in numbers. `largest`: files in the fullest room."""

    files: int
    largest: int
    floors: int
    arrows: int
    upward: int
    circles: int


# The same counts when each layer was one flat folder (skeletons/ and report/ were folders already).
BEFORE = {
    "rewriter": Figures(34, 34, 12, 110, 0, 0),
    "codegen": Figures(50, 41, 14, 140, 0, 0),
    "cost_model": Figures(47, 43, 9, 141, 8, 1),
    "patterns": Figures(41, 41, 8, 149, 1, 1),
}


@dataclass(frozen=True)
class Room:
    """A sub-package, or a file that stands in its layer by itself. `below`: what it imports inside its layer."""

    name: str
    sentence: str
    files: int
    floor: int
    below: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A folder at the root: its rooms from the upper floor down, and its imports counted by room and by file."""

    name: str
    sentence: str
    rooms: tuple[Room, ...]
    by_room: Figures
    by_file: Figures
    layers_below: tuple[str, ...]


# --- the import graph ---------------------------------------------------------------------------------------------


@cache
def imports() -> nx.DiGraph[str]:
    """Every file of the package, and every import of one by another; `late`: inside functions or for types alone."""
    sys.path.insert(0, str(ROOT))
    found = grimp.build_graph(PACKAGE, cache_dir=None)
    sys.path.remove(str(ROOT))
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(m for m in found.modules if not path_of(m).is_dir())
    for a in list(graph):
        for b in found.find_modules_directly_imported_by(a):
            lines = [d["line_number"] for d in found.get_import_details(importer=a, imported=b)]
            graph.add_edge(a, b, late=all(indented(path_of(a), n) for n in lines))
    return graph


def path_of(module: str) -> Path:
    """A module's file, or a package's folder."""
    stem = ROOT.joinpath(*module.split("."))
    return stem if stem.is_dir() else stem.with_suffix(".py")


def indented(path: Path, line: int) -> bool:
    return lines_of(path)[line - 1].startswith(" ")


@cache
def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def figures(graph: nx.DiGraph[str], files: int, largest: int) -> Figures:
    """Floors, arrows and circles of a graph; an arrow runs upward where imports at the top of files lead back."""
    early = nx.DiGraph(graph)
    early.remove_edges_from([e for e in graph.edges if graph.edges[e]["late"]])
    return Figures(
        files=files,
        largest=largest,
        floors=max(floors(graph).values()),
        arrows=graph.number_of_edges(),
        upward=sum(nx.has_path(early, b, a) for a, b in graph.edges),
        circles=sum(len(c) > 1 for c in nx.strongly_connected_components(graph)),
    )


def floors(graph: nx.DiGraph[str]) -> dict[str, int]:
    """1 for what imports nothing, else one above the highest that it imports. A circle lies on one floor."""
    halls = nx.condensation(graph)
    at: dict[int, int] = {}
    for hall in reversed(list(nx.topological_sort(halls))):
        at[hall] = 1 + max((at[h] for h in halls.successors(hall)), default=0)
    return {name: at[hall] for hall, data in halls.nodes(data=True) for name in data["members"]}


# --- rooms --------------------------------------------------------------------------------------------------------


@cache
def layers() -> tuple[Layer, ...]:
    return tuple(layer(name) for name in LAYERS)


def layer_of(module: str) -> str:
    second = module.split(".")[1]
    return second if second in LAYERS else PACKAGE


def room_of(module: str) -> str:
    """The room of a file: its folders below the layer, or its own name where it stands in the layer itself."""
    inside = module.split(".")[1 if layer_of(module) == PACKAGE else 2 :]
    return "/".join(inside[:-1]) or f"{inside[-1]}.py"


def layer(name: str) -> Layer:
    whole = imports()
    here = whole.subgraph([m for m in whole if layer_of(m) == name])
    rooms: nx.DiGraph[str] = nx.DiGraph()
    files: dict[str, int] = {}
    for m in here:
        rooms.add_node(room_of(m))
        files[room_of(m)] = files.get(room_of(m), 0) + 1
    for a, b in here.edges:
        x, y = room_of(a), room_of(b)
        if x != y:
            rooms.add_edge(x, y, late=here.edges[a, b]["late"] and rooms.get_edge_data(x, y, {"late": True})["late"])
    at = floors(rooms)
    folder = ROOT / name
    drawn = [
        Room(r, sentence(folder / r if r.endswith(".py") else folder / r / "__init__.py"), files[r], at[r],
             tuple(sorted(rooms.successors(r))))
        for r in sorted(rooms, key=lambda r: (-at[r], r))
    ]
    below = {layer_of(b) for m in here for b in whole.successors(m)} - {name}
    largest = max(files.values())
    return Layer(
        name, sentence(folder / "__init__.py"), tuple(drawn), figures(rooms, len(here), largest),
        figures(here, len(here), largest), tuple(n for n in LAYERS if n in below),
    )


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return " ".join(first.split()).split(". ")[0].removesuffix(".")


# --- the drawing --------------------------------------------------------------------------------------------------


def draw() -> str:
    parts = [line for one in layers() for line in (*layer_lines(one), "")]
    return "\n".join([*parts, *table_lines()]) + "\n"


def layer_lines(one: Layer) -> Iterator[str]:
    below = f" → {', '.join(one.layers_below)}" if one.layers_below else ""
    yield f"{one.name}/{below}"
    yield from textwrap.wrap(one.sentence, 118, initial_indent="    ", subsequent_indent="    ")
    wide = max(len(r.name) for r in one.rooms)
    floor = 0
    for r in one.rooms:
        shown = f"{r.floor:>4}" if r.floor != floor else "    "
        floor = r.floor
        yield from room_lines(r, f"{shown}  {r.name:{wide}} {r.files:>3}  ")


def room_lines(r: Room, start: str) -> Iterator[str]:
    margin = " " * len(start)
    yield from textwrap.wrap(r.sentence, 118, initial_indent=start, subsequent_indent=margin)
    if r.below:
        yield f"{margin}→ {', '.join(r.below)}"


def table_lines() -> Iterator[str]:
    yield f"{'':34}files  fullest room  floors  arrows  upward  circles"
    for one in layers():
        if one.name in BEFORE:
            yield row(f"{one.name}, flat, by file", BEFORE[one.name])
            yield row(f"{one.name}, by file", one.by_file)
            yield row(f"{one.name}, by room", one.by_room)


def row(name: str, f: Figures) -> str:
    return f"{name:34}{f.files:>5}{f.largest:>14}{f.floors:>8}{f.arrows:>8}{f.upward:>8}{f.circles:>9}"


# --- the page -----------------------------------------------------------------------------------------------------


def page() -> str:
    """The page with the map of today's code in its one block."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    return before + BEGIN + draw() + END + rest.split(END, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws the map of the code from its import graph.")
    parser.add_argument("--write", action="store_true", help="put it into docs/map.md")
    parser.add_argument("--check", action="store_true", help="fail where docs/map.md shows something else")
    asked = parser.parse_args()
    if asked.write:
        PAGE.write_text(page(), encoding="utf-8")
    elif asked.check:
        if page() != PAGE.read_text(encoding="utf-8"):
            print("docs/map.md is not the map of this code: python docs/map.py --write", file=sys.stderr)
            return 1
    else:
        print(draw(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
