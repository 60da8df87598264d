"""Makes the API reference from signatures and docstrings: what `reattend` exports, what its functions answer, its errors.

    python docs/api.py            prints it
    python docs/api.py --write    puts it into docs/api.md
    python docs/api.py --check    fails where docs/api.md shows something else
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import reattend  # noqa: E402
from reattend import backend, commands_plan, commands_run  # noqa: E402
from reattend.cost_model.count.expect import ExpectError  # noqa: E402
from reattend.cost_model.count.memory import AttentionMemory  # noqa: E402
from reattend.cost_model.devices.device import UnknownDevice  # noqa: E402
from reattend.cost_model.mesh.mesh import MeshError  # noqa: E402
from reattend.cost_model.mesh.plan import MeshPlan  # noqa: E402
from reattend.cost_model.mesh.scheme import Scheme  # noqa: E402
from reattend.cost_model.sites.course import Course, Point, SweepError  # noqa: E402
from reattend.cost_model.sites.detail import Detail  # noqa: E402
from reattend.cost_model.sites.error import KeptMass  # noqa: E402
from reattend.cost_model.sites.site import MaskView, PlanError, SiteShape, TileCounts  # noqa: E402
from reattend.cost_model.time.cost import Cost  # noqa: E402
from reattend.patterns.methods.registry import MethodFacts  # noqa: E402
from reattend.rewriter.capture.capture import CaptureError  # noqa: E402
from reattend.rewriter.check.verdicts import Check  # noqa: E402
from reattend.rewriter.graph.torch_private import TorchChanged  # noqa: E402
from reattend.rewriter.run.report import Entered, GraphPiece, SiteRun  # noqa: E402
from reattend.rewriter.run.verify import SiteCheck  # noqa: E402
from reattend.rewriter.shapes import UsageError  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
WIDE = 110
FUNCTIONS = ("optimize", "restore", "report", "plan", "verify", "register", "processors", "targets", "methods")
CLASSES = (
    "Policy", "Plan", "Site", "Candidate", "MeasuredError", "Miss", "Sweep", "Report", "Verification", "Device",
)
# What their fields hold; no name of the package itself.
PARTS = (
    Cost, KeptMass, MethodFacts, SiteShape, MaskView, TileCounts, Detail, AttentionMemory, Course, Point, MeshPlan, Scheme,
    SiteRun, Check, Entered, GraphPiece, SiteCheck,
)
ERRORS: tuple[type[Exception], ...] = (
    reattend.StrictError, UsageError, UnknownDevice, CaptureError, PlanError, SweepError, MeshError, ExpectError,
    TorchChanged, reattend.CalibrationError,
)
COMMANDS: tuple[Callable[..., object], ...] = (
    commands_plan.plan, commands_plan.explain, commands_run.emit, commands_run.bench, commands_run.verify,
    commands_plan.diff, commands_plan.targets,
)
HEAD = """\
# API reference

Made from signatures and docstrings by `python docs/api.py --write`; a test holds the page to the code. Everything that
`reattend` exports stands here, then what its answers are made of, its errors, and the commands.
"""


def page() -> str:
    parts = [HEAD, *(_function(f"reattend.{n}", getattr(reattend, n)) for n in FUNCTIONS)]
    parts += [
        "## As a backend of torch.compile\n",
        "`torch.compile(model, backend=\"reattend\", options={…}, mode=…)`\n", _text(backend.reattend),
        "## Classes\n", *(_class(f"reattend.{n}", getattr(reattend, n)) for n in CLASSES),
        "## Methods\n", *map(_method, reattend.methods()),
        "## What they are made of\n", "These are values to read; they have no name in `reattend` itself.\n",
        *(_class(c.__name__, c) for c in PARTS), "## Errors\n", *_errors(), "## Commands\n", *_commands(),
    ]
    parts.insert(1, "## Functions\n")
    return "\n".join(p.rstrip("\n") + "\n" for p in parts)


def _method(m: MethodFacts) -> str:
    """A method of the literature: its parameters, by what name it is allowed, what it keeps and who says so."""
    name = m.make.__name__
    given = ", ".join(n if v is ... else f"{n}={v}" for n, v in m.parameters.items())
    needs = f" Needs {', '.join(m.needs)}." if m.needs else ""
    said = f'`{name}({given})`, by name `"{m.name}"`'
    return f"### reattend.{name}\n\n{said}\n\n{inspect.getdoc(m.make)}\n\nSource: {m.source}.{needs}\n"


def _function(name: str, f: Callable[..., object]) -> str:
    return f"### {name}\n\n{_signature(name, f)}\n\n{_text(f)}"


def _signature(name: str, f: Callable[..., object]) -> str:
    return f"```py\n{_call(name, f)}\n```"


def _call(name: str, f: Callable[..., object]) -> str:
    """A signature as people write it: on one line, or with a line for each argument."""
    made = inspect.signature(f)
    shown: list[str] = []
    for p in made.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        if p.name != "self":
            shown.append(_parameter(p))
    end = f" -> {_type(made.return_annotation)}" if made.return_annotation is not made.empty else ""
    line = f"{name}({', '.join(shown)}){end}"
    if len(line) <= WIDE:
        return line
    return f"{name}(\n" + "".join(f"    {x},\n" for x in shown) + f"){end}"


def _parameter(p: inspect.Parameter) -> str:
    stars = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
    default = f" = {p.default!r}" if p.default is not p.empty else ""
    return f"{stars}{p.name}: {_type(p.annotation)}{default}"


def _type(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _text(what: object) -> str:
    """A docstring as Markdown: what it indents stands as it is."""
    text = inspect.cleandoc(getattr(what, "__doc__", None) or "")
    return text + "\n" if text else ""


def _class(name: str, c: type) -> str:
    extended = [b for b in c.__mro__[1:-1] if b.__module__.startswith("reattend")]
    parts = [f"### {name}\n", _text(c), *map(_text, extended)]
    if dataclasses.is_dataclass(c):
        rows = [f"| `{f.name}` | `{_escaped(_type(f.type))}` | {_default(f)} |" for f in dataclasses.fields(c) if f.repr]
        parts.append("\n".join(["| field | type | default |", "|---|---|---|", *rows]) + "\n")
    parts += [_member(n, m) for n, m in _members(c)]
    return "\n".join(p for p in parts if p)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        shown = f"{type(f.default).__name__}()" if dataclasses.is_dataclass(f.default) else repr(f.default)
        return f"`{_escaped(shown)}`"
    if f.default_factory is not dataclasses.MISSING:
        made = f.default_factory()
        return f"`{made!r}`" if type(made).__module__ in ("builtins", "collections") else f"`{type(made).__name__}()`"
    return ""


def _members(c: type) -> Iterator[tuple[str, object]]:
    """The public methods and properties of a class and of what it extends, its own first."""
    seen: set[str] = set()
    for base in c.__mro__[:-1]:
        for name, member in vars(base).items():
            known = isinstance(member, (property, staticmethod, classmethod)) or inspect.isfunction(member)
            if known and not name.startswith("_") and name not in seen and base.__module__.startswith("reattend"):
                seen.add(name)
                yield name, member


def _member(name: str, member: object) -> str:
    if isinstance(member, property):
        kind = _type(inspect.signature(member.fget).return_annotation) if member.fget is not None else ""
        return f"- **`{name}`**: `{kind}`\n{_inside(_text(member.fget))}"
    f = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    assert callable(f)
    return f"- **`{' '.join(_call(name, f).split())}`**\n{_inside(_text(f))}"


def _inside(text: str) -> str:
    return textwrap.indent(f"\n{text}", "    ").replace("    \n", "\n") if text else ""


def _errors() -> Iterator[str]:
    rows = []
    for e in ERRORS:
        bases = ", ".join(b.__name__ for b in e.__bases__)
        rows.append(f"| `{e.__module__}.{e.__name__}` | `{bases}` | {_escaped(' '.join(_text(e).split()))} |")
    yield "\n".join(["| error | is a | says |", "|---|---|---|", *rows]) + "\n"
    yield "What each says, and what to do, stands in [troubleshooting](troubleshooting.md).\n"


def _commands() -> Iterator[str]:
    yield "`reattend COMMAND --help` lists the options of each. Exit codes: 0, 1 for a finding, 2 for a usage error.\n"
    for f in COMMANDS:
        yield f"### reattend {f.__name__} (command)\n\n{_text(f)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes the API reference from signatures and docstrings.")
    parser.add_argument("--write", action="store_true", help="put it into docs/api.md")
    parser.add_argument("--check", action="store_true", help="fail where docs/api.md shows something else")
    asked = parser.parse_args()
    if asked.write:
        PAGE.write_text(page(), encoding="utf-8")
    elif asked.check:
        if page() != PAGE.read_text(encoding="utf-8"):
            print("docs/api.md is not the reference of this code: python docs/api.py --write", file=sys.stderr)
            return 1
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
