"""The library's own text that emitted files contain: the functions of the skeletons, as written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files

# Their text is read here, never imported: Triton need not be there. So names join the rooms, which no contract sees; a test
# holds that each name is a file.
SKELETONS = "reattend.codegen.skeletons"


@cache
def functions(skeleton: str) -> Mapping[str, str]:
    """The top-level functions and constants of a skeleton file as written."""
    source = files(SKELETONS).joinpath(f"{skeleton}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    out: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            out[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            # with the comment above it
            first = node.lineno - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            out[ast.unparse(target)] = "\n".join(lines[first : node.end_lineno])
    return out


def called(helpers: Iterable[str]) -> list[str]:
    """The texts of scalar functions, with those that they call in turn."""
    texts = functions("scalar")
    wanted = set(helpers)
    while more := {n for n in texts for w in wanted if re.search(rf"\b{n}\(", texts[w])} - wanted:
        wanted |= more
    return [text for name, text in texts.items() if name in wanted]
