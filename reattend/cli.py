"""The command line: a printer of plans. `reattend --help` loads no torch; every command takes --json and --debug.

Exit codes: 0, 1 a finding (a strict miss, a failed verification, a choice that got slower), 2 a usage error. Errors are one
sentence on stderr.
"""

from __future__ import annotations

import codecs
import importlib.util
import os
import sys
from importlib import metadata
from io import TextIOWrapper
from platform import python_version
from typing import Annotated, TextIO

import typer

from . import commands_plan, commands_run
from .options import tokens

__all__ = ["app", "main", "tokens"]

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the attention in a model, plan the cheapest exact way to compute it, and show what was decided and why. "
    "No GPU and no weights are needed to plan for a GPU.",
    epilog="[bold]MODEL[/bold] is a Hugging Face [cyan]config.json[/cyan] (built without weights), "
    "[cyan]package.module:factory[/cyan] (a function that returns a module, or a module with its args and kwargs), "
    "or an exported [cyan].pt2[/cyan].\n\n"
    "[bold]Examples[/bold]\n\n"
    "  reattend targets\n\n"
    "  reattend plan llama/config.json --target h200 --seq 128k --dtype bf16\n\n"
    "  reattend plan llama/config.json --target h200 --target a100 --sweep seq=1k:1M\n\n"
    "  reattend plan llama/config.json --target h200 --html plan.html\n\n"
    "  reattend plan llama/config.json --target h200 --phase decode --past 32k --batch 16\n\n"
    "  reattend explain mypackage.models:tiny model.layers.0.self_attn\n\n"
    "  reattend emit gemma/config.json --seq 4k --target h100 -o attention.py\n\n"
    "  reattend verify mypackage.models:tiny\n\n"
    "  reattend bench mypackage.models:tiny --seq 2k\n\n"
    "  reattend diff monday.json friday.json\n\n"
    "Exit codes: 0; 1 a finding (a strict miss, a failed verification, a choice that got slower); 2 a usage error.",
)


def _version(asked: bool) -> None:
    """What a report of a defect should name."""
    if asked:
        there = [n for n in ("torch", "triton", "transformers") if importlib.util.find_spec(n) is not None]
        versions = [f"{n} {metadata.version(n)}" for n in there]
        print(", ".join([f"reattend {metadata.version('reattend')}", f"Python {python_version()}", *versions]))
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="say the versions, and exit", is_eager=True, callback=_version)]


@app.callback()
def options(version: Version = False) -> None:
    """What may stand before a command."""


for command in (
    commands_plan.plan, commands_plan.explain, commands_run.emit, commands_run.bench, commands_run.verify,
    commands_plan.diff, commands_plan.targets,
):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every error into one sentence and an exit code."""
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    _spell(sys.stdout, sys.stderr)
    try:
        code = app(given, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            raise
        code = _failed(error)
    sys.exit(code if isinstance(code, int) else 0)


# What a screen without these characters shows for them; a cascade's other letters come as \N{NAME}.
_PLAIN = {
    "×": "x", "±": "+/-", "µ": "u", "…": "...", "–": "-", "→": "->", "←": "<-", "−": "-", "·": "*", "≤": "<=", "≥": ">=",
    "≠": "!=", "∧": "and", "∨": "or", "¬": "not ", "∞": "inf", "Σ": "sum", "√": "sqrt", "²": "^2",
}


def _spell(*streams: TextIO) -> None:
    """Have streams that cannot show every character spell them; nothing is lost, and nothing raises."""
    codecs.register_error("reattend", _spelled)
    for s in streams:
        if isinstance(s, TextIOWrapper) and s.encoding.lower().replace("-", "") != "utf8":
            s.reconfigure(errors="reattend")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(x) or x.encode("ascii", "namereplace").decode() for x in letters), error.end


def _failed(error: Exception) -> int:
    """Print one sentence; the exit code."""
    name = type(error).__name__
    # Typer ships its own copy of click in some versions: its errors are told by what they can do.
    if name in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 2))
    if hasattr(error, "format_message"):
        print(f"reattend: {error.format_message().rstrip('.')}", file=sys.stderr)
        return 2
    sentence = str(error) if name in _SENTENCES else f"{name}: {error} (a defect of reattend: --debug shows the traceback)"
    print(f"reattend: {sentence.splitlines()[0] if sentence else name}", file=sys.stderr)
    return 1 if name in ("StrictError", "CaptureError") else 2


# Errors whose message is one sentence for the user.
_SENTENCES = (
    "UsageError", "UnknownDevice", "CaptureError", "StrictError", "PlanError", "SweepError", "MeshError", "ExpectError",
    "ValueError",
)
