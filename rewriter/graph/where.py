"""Where in the user's program a node comes from: `file:line` and the module path."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_ROOT = re.compile(r"^L\['self'\]\.?|^L__self___?|^self\.?")


def source_line(n: fx.Node) -> str:
    """The innermost frame of the model's own code, `file:line`; empty when the graph carries no traces."""
    frames = _FRAME.findall(n.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0] and not f[0].startswith("<")]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def module_path(n: fx.Node) -> str:
    """The dotted path of the innermost module, as in `named_modules()`; empty at the top."""
    stack = n.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]", lambda m: f".{m[1] or m[2]}", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    for prefix in ("L.self.", "L.self", "self.", "L__self___"):
        path = path.removeprefix(prefix)
    return path.replace("._modules", "").strip(".")
