"""The command line: a printer of plans. `reattend --help` loads no torch; every command takes --json and --debug.

Exit codes: 0, 1 a finding (a strict miss, a failed verification), 2 a usage error. Errors are one sentence on stderr.
"""

from __future__ import annotations

import json as json_module
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .cost_model.plan import Plan, Site
    from .rewriter.models import Shapes

app = typer.Typer(
    add_completion=False,
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
    "  reattend plan llama/config.json --target h200 --phase decode --past 32k --batch 16\n\n"
    "  reattend explain mypackage.models:tiny model.layers.0.self_attn\n\n"
    "  reattend emit gemma/config.json --seq 4k --target h100 -o attention.py\n\n"
    "  reattend verify mypackage.models:tiny\n\n"
    "Exit codes: 0; 1 a finding (a strict miss, a failed verification); 2 a usage error.",
)


def tokens(value: str | int) -> int:
    """4096, 4k (4096) or 1M (1048576)."""
    text = str(value)
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdigit():
        raise typer.BadParameter(f"{text!r} is no number of tokens: write 4096, 4k or 1M")
    return int(digits) * factor


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="config.json, package.module:factory, or .pt2", show_default=False)
]
SiteName = Annotated[
    str | None,
    typer.Argument(
        metavar="[SITE]",
        help="module path or number of an attention; without it: each distinct one",
        show_default=False,
    ),
]
Target = Annotated[
    str | None, typer.Option(help="device to plan for: see `reattend targets`; default: this machine's CPU")
]
Seq = Annotated[int | None, typer.Option(parser=tokens, metavar="TOKENS", help="query tokens: 4096, 4k, 128k")]
Batch = Annotated[int, typer.Option(help="sequences in the batch")]
Dtype = Annotated[str | None, typer.Option(help="f32, bf16, f16; default: the config's own")]
Phase = Annotated[str, typer.Option(help="prefill, or decode: one token over a filled cache")]
Past = Annotated[int, typer.Option(parser=tokens, metavar="TOKENS", help="tokens in the cache, with --phase decode")]
Attn = Annotated[str | None, typer.Option(help="the model's own implementation: eager or sdpa")]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="keep sizes symbolic where the model allows it")]
Strict = Annotated[bool, typer.Option("--strict", help="exit with 1 when an attention is left alone")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.command()
def plan(
    model: Model, target: Target = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, phase: Phase = "prefill",
    past: Past = 0, attn: Attn = None, dynamic: Dynamic = False, strict: Strict = False, json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show every attention of MODEL: what it is, its mask, the candidates' predicted times, the choice.

    Example: reattend plan config.json --target h200 --seq 128k --dtype bf16
    """
    made = _plan(model, _shapes(batch, seq, dtype, phase, past, attn), target, dynamic)
    print(made.to_json() if json else made)
    if strict:
        from .rewriter.report import check_plan

        check_plan(made)


@app.command()
def explain(
    model: Model, site: SiteName = None, target: Target = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None,
    phase: Phase = "prefill", past: Past = 0, attn: Attn = None, dynamic: Dynamic = False, json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Show one attention in full: its cascade as lifted and as chosen, proofs and guards, every candidate and why.

    Example: reattend explain config.json model.layers.0.self_attn --seq 4k
    """
    made = _plan(model, _shapes(batch, seq, dtype, phase, past, attn), target, dynamic)
    from .rewriter.explain import explanation, explanation_data

    sites = _sites(made, site)
    if json:
        print(json_module.dumps([explanation_data(s) for s in sites], indent=2))
        return
    print("\n\n".join(explanation(s, made) for s in sites))


@app.command()
def emit(
    model: Model, site: SiteName = None, target: Target = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None,
    phase: Phase = "prefill", past: Past = 0, attn: Attn = None,
    candidate: Annotated[str, typer.Option(help="whose code: reattend, sdpa, flex, or chosen")] = "reattend",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write to this file instead of the screen")] = None,
    json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Write the code for one attention: a readable, self-contained file that runs without reattend.

    Example: reattend emit config.json --seq 4k --target h100 -o attention.py
    """
    made = _plan(model, _shapes(batch, seq, dtype, phase, past, attn), target, False)
    chosen = _sites(made, site)[0]
    text = _source(chosen, candidate)
    if output is not None:
        output.write_text(text, encoding="utf-8")
        print(f"wrote {output}: {candidate} for {chosen.name or chosen.where}", file=sys.stderr)
    if json:
        print(json_module.dumps({"site": chosen.name, "where": chosen.where, "candidate": candidate, "source": text}))
    elif output is None:
        print(text, end="" if text.endswith("\n") else "\n")


@app.command()
def verify(
    model: Model, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, attn: Attn = None, json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Run MODEL with random weights on this machine, original and rewritten, and compare both with float64.

    Example: reattend verify config.json --seq 512 --batch 2
    """
    from .api import verify as verify_model
    from .rewriter.models import UsageError, load

    subject = load(model, _shapes(batch, seq, dtype, "prefill", 0, attn), where="cpu")
    if subject.model is None:
        raise UsageError("an exported program cannot be verified: give a config.json or module:factory")
    result = verify_model(subject.model, subject.args, subject.kwargs)
    print(result.to_json() if json else result)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def targets(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure the present device first (under two minutes), and keep the file")
    ] = False,
    json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """List the devices that can be planned for, with the numbers that plans use.

    Example: reattend targets --calibrate
    """
    from .cost_model.device import targets as all_targets

    if calibrate:
        _calibrate()
    if json:
        rows = [{"name": d.name, "title": d.title, "kind": d.kind, "arch": d.arch, "basis": d.basis,
                 "band": d.band, "dram_bytes_per_s": d.dram_bytes_per_s, "matrix_flops_per_s": dict(d.matrix_flops_per_s),
                 "sources": dict(d.sources)} for d in all_targets()]  # fmt: skip
        print(json_module.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("target", "device", "arch", "units", "memory TB/s", "bf16 TFLOP/s", "basis", "times"):
        table.add_column(column, justify="right" if column in ("units", "memory TB/s", "bf16 TFLOP/s") else "left")
    for d in all_targets():
        table.add_row(
            d.name, d.title, d.arch, str(d.units), f"{d.dram_bytes_per_s / 1e12:.2f}",
            f"{d.matrix_rate('bf16') / 1e12:.1f}", d.basis, f"±{d.band:.0%}",
        )  # fmt: skip
    Console(width=max(100, Console().width)).print(table)


def _calibrate() -> None:
    """Measure the present device behind a progress bar; what the check at the end found goes to stderr."""
    import torch
    from rich.progress import track

    from .codegen.calibrate import calibrate as measure
    from .cost_model.device import calibration_path, shipped
    from .rewriter.choose import running_device

    here = shipped(running_device("cuda" if torch.cuda.is_available() else "cpu").name)
    errors = Console(stderr=True)
    found, check = measure(here, watch=lambda steps, what: track(steps, description=what, console=errors))
    for c in check:
        print(f"{c.name}: {c.measured * 1e3:.3g} ms, predicted {c.predicted * 1e3:.3g} ms", file=sys.stderr)
    mean = sum(c.error for c in check) / len(check)
    where = calibration_path(found.name)
    print(
        f"{found.title}: off by {mean:.1%} on average on {len(check)} timings that nothing was fitted to; plans state "
        f"±{found.band:.0%}; {f'written to {where}' if where else 'not written: REATTEND_CALIBRATION is empty'}",
        file=sys.stderr,
    )  # fmt: skip


# --- what the commands share --------------------------------------------------------------------------------------


def _shapes(batch: int, seq: int | None, dtype: str | None, phase: str, past: int, attn: str | None) -> Shapes:
    from .rewriter.models import Shapes

    return Shapes(batch, seq, dtype, phase, past, attn)


def _plan(spec: str, shapes: Shapes, target: str | None, dynamic: bool) -> Plan:
    from .cost_model.device import device
    from .rewriter.planning import plan_spec
    from .rewriter.policy import Policy

    return plan_spec(spec, shapes, device(target or "cpu"), Policy(), dynamic=dynamic)


def _sites(made: Plan, name: str | None) -> list[Site]:
    """The sites of this name or number; without one, the first of each kind of identical sites."""
    from .rewriter.models import UsageError

    if not made.sites:
        raise UsageError("the model has no attention that was found: `reattend plan` says what was left alone and why")
    if name is None:
        firsts: dict[object, Site] = {}
        for s in made.sites:
            firsts.setdefault((s.cascade, s.chosen.name), s)
        return list(firsts.values())
    if name.isdigit() and int(name) < len(made.sites):
        return [made.sites[int(name)]]
    found = [s for s in made.sites if name in (s.name, s.where)]
    if not found:
        some = ", ".join(dict.fromkeys(s.name or s.where for s in made.sites[:4]))
        raise UsageError(f"no attention is named {name!r}: `reattend plan` lists them ({some}, …)")
    return found


def _source(site: Site, candidate: str) -> str:
    from .rewriter.models import UsageError

    wanted = site.chosen.name if candidate == "chosen" else candidate
    found = next((c for c in site.candidates if c.name == wanted), None)
    if found is None:
        names = ", ".join(c.name for c in site.candidates)
        raise UsageError(f"no candidate is named {wanted!r} here: one of {names}, or chosen")
    if not found.feasible and wanted != "original":
        raise UsageError(f"{wanted} cannot compute {site.name or site.where}: {found.why}")
    if wanted == "original":
        raise UsageError(
            f"{site.name or site.where} keeps the original code ({found.why}): name another with --candidate"
        )
    return str(found.source())


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every error into one sentence and an exit code."""
    given = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
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


def _failed(error: Exception) -> int:
    """Print one sentence; the exit code."""
    name = type(error).__name__
    # Typer ships its own copy of click in some versions: its errors are told by what they can do.
    if name in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", 2))
    if hasattr(error, "format_message"):
        print(f"reattend: {error.format_message().rstrip('.')}", file=sys.stderr)
        return 2
    known = name in ("UsageError", "UnknownDevice", "CaptureError", "StrictError", "ValueError")
    sentence = str(error) if known else f"{name}: {error} (a defect of reattend: --debug shows the traceback)"
    print(f"reattend: {sentence.splitlines()[0] if sentence else name}", file=sys.stderr)
    return 1 if name in ("StrictError", "CaptureError") else 2
