"""Commands that write or run code: emit, verify, bench."""

from __future__ import annotations

import json as json_module
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    Attn,
    Batch,
    Debug,
    Dtype,
    Json,
    Model,
    Past,
    Phase,
    Seq,
    SiteName,
    Target,
    plan_one,
    shapes_of,
    sites_of,
)

if TYPE_CHECKING:
    from .cost_model.plan.plan import Plan
    from .cost_model.sites.site import Site


def emit(
    model: Model, site: SiteName = None, target: Target = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None,
    phase: Phase = "prefill", past: Past = 0, attn: Attn = None,
    candidate: Annotated[str, typer.Option(help="whose code: reattend, sdpa, flex, or chosen")] = "reattend",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="write to this file instead of the screen")] = None,
    json: Json = False, debug: Debug = False,
) -> None:
    """Write the code for one attention: a readable, self-contained file that runs without reattend.

    Example: reattend emit config.json --seq 4k --target h100 -o attention.py
    """
    from .cost_model.report.page import check_path

    if output is not None:
        check_path(output)
    made = plan_one(model, shapes_of(model, batch, seq, dtype, phase, past, attn), target, False)
    chosen = sites_of(made, site)[0]
    text = _headed(_source(chosen, candidate), chosen, candidate, made)
    if output is not None:
        output.write_text(text, encoding="utf-8")
        print(f"wrote {output}: {candidate} for {chosen.name or chosen.where}", file=sys.stderr)
    if json:
        print(json_module.dumps({"site": chosen.name, "where": chosen.where, "candidate": candidate, "source": text}))
    elif output is None:
        print(text, end="" if text.endswith("\n") else "\n")


def verify(
    model: Model, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, attn: Attn = None,
    candidate: Annotated[str, typer.Option(help="what to verify: reattend (our kernel, where it can run), sdpa, flex, or "
                                           "chosen")] = "reattend",
    json: Json = False, debug: Debug = False,
) -> None:
    """Run MODEL with random weights on this machine, original and rewritten, and compare both with float64.

    Example: reattend verify config.json --seq 512 --batch 2
    """
    from .rewriter.shapes import UsageError

    if candidate not in ("reattend", "sdpa", "flex", "chosen"):
        raise UsageError(f"--candidate {candidate} is not known: use reattend, sdpa, flex or chosen")
    shapes = shapes_of(model, batch, seq, dtype, "prefill", 0, attn)
    from .rewriter.capture.models import check_memory, load
    from .rewriter.choose.policy import Policy
    from .rewriter.run.verify import verify as verify_model

    check_memory(model, shapes)
    given = load(model, shapes, where="cpu")
    if given.model is None:
        raise UsageError("an exported program cannot be verified: give a config.json or module:factory")
    policy = Policy() if candidate == "chosen" else Policy(allow=candidate, deny="original")
    result = verify_model(given.model, given.args, given.kwargs, policy)
    print(result.to_json() if json else result)
    if not result.ok:
        raise typer.Exit(1)


def bench(
    model: Model, site: SiteName = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, phase: Phase = "prefill",
    past: Past = 0, attn: Attn = None,
    seconds: Annotated[float, typer.Option(help="time to spend on each distinct attention")] = 4.0,
    json: Json = False, debug: Debug = False,
) -> None:
    """Measure every candidate of each distinct attention on this machine, beside its prediction.

    Candidates run in turn on random inputs of the attention's shapes; medians are shown, and A/A, the ratio of one
    candidate with itself, says how much noise there is. What would not fit in memory is left out, with the reason.

    Example: reattend bench config.json --seq 2k --dtype bf16
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .rewriter.run.bench import bench_spec
    from .rewriter.shapes import UsageError

    if not seconds > 0:
        raise UsageError(f"--seconds {seconds} is no time to measure in: give more than 0")
    count = TextColumn("{task.completed}/{task.total}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("capturing", total=None)

        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = bench_spec(model, shapes_of(model, batch, seq, dtype, phase, past, attn), site, seconds, step)
    print(result.to_json() if json else result)


def _headed(text: str, site: Site, candidate: str, plan: Plan) -> str:
    """The code, its docstring with what it was made by and for, and what it is predicted to take there."""
    from .cost_model.words import between, seconds_text

    cost = site.chosen.cost if candidate == "chosen" else site.candidate(candidate).cost
    took = f", predicted to take {seconds_text(cost.seconds)} ({between(cost.seconds, cost.band)})" if cost else ""
    what = f"{site.name or site.where} of {plan.model}, {site.shape}"
    first, rest = text.split("\n", 1)
    said = f"Made by reattend {metadata.version('reattend')} for {what}, on {plan.device.name}{took}."
    lines = textwrap.wrap(said, 115)
    return "\n".join([first, "", *lines, rest])


def _source(site: Site, candidate: str) -> str:
    from .rewriter.shapes import UsageError

    wanted = site.chosen.name if candidate == "chosen" else candidate
    found = next((c for c in site.candidates if c.name == wanted), None)
    if found is None:
        names = ", ".join(c.name for c in site.candidates)
        raise UsageError(f"no candidate is named {wanted!r} here: one of {names}, or chosen")
    if not found.feasible and not found.is_original:
        raise UsageError(f"{wanted} cannot compute {site.name or site.where}: {found.why}")
    if found.is_original:
        raise UsageError(
            f"{site.name or site.where} keeps the original code ({found.why}): name another with --candidate"
        )
    return str(found.source())
