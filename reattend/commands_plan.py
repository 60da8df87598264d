"""Commands that plan and show plans: plan, explain, diff, targets. Nothing of a model runs."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .options import (
    Approximate,
    Attn,
    Batch,
    Cache,
    Csv,
    Debug,
    Dtype,
    Dynamic,
    Expects,
    Grids,
    Html,
    Json,
    Meshes,
    Model,
    Past,
    Phase,
    Seq,
    SiteName,
    Sizes,
    Strict,
    Sweeps,
    Target,
    Targets,
    Weights,
    devices_of,
    plan_all,
    plan_one,
    plan_swept,
    policy_of,
    shapes_of,
    sites_of,
    sizes_of,
    sweep_of,
    types_of,
)

if TYPE_CHECKING:
    from .cost_model.devices.device import Device
    from .cost_model.plan.diff import Diff
    from .cost_model.plan.plan import Plan
    from .cost_model.sites.sweep import Sweep
    from .rewriter.choose.policy import Policy
    from .rewriter.shapes import Shapes


def plan(
    model: Model, target: Targets = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, phase: Phase = "prefill",
    past: Past = 0, attn: Attn = None, dynamic: Dynamic = False, sweep: Sweeps = None, csv: Csv = None, grid: Grids = None,
    mesh: Meshes = None, approximate: Approximate = False, expect: Expects = None, weights: Weights = None,
    cache: Cache = None, html: Html = None, strict: Strict = False, json: Json = False, debug: Debug = False,
) -> None:
    """Show every attention of MODEL: what it is, its mask, the candidates' predicted times, the choice; and the whole step.

    The step, on GPUs, is coarse: how long a token takes (--phase decode), or the first one, tokens a second, what a device
    holds, the largest batch and context that fit; of --mesh too. --weights and --cache store these in a narrower type.

    Several --target: one capture, side by side. --sweep: one capture with open sizes, then the winner at each size and
    where it changes; --grid writes all combinations of them. --mesh: what each way to spread it over devices holds, sends
    and takes (--approximate takes ways that are not exact, too). --html: a page with the masks, rooflines, parts of the
    time, sweeps and memory. --expect: what masks are expected to read at run time (padding, packing, block tables), else
    they are taken to keep every key.

    Example: reattend plan config.json --target h200 --target a100 --dtype bf16 --sweep seq=1k:128k --html plan.html
    """
    shapes = shapes_of(model, batch, seq, dtype, phase, past, attn)
    from .cost_model.report.page import check_path, write_page

    devices = devices_of(target)
    for text in sweep or ():
        sweep_of(text)
    for option, path in (("csv", csv), ("grid", grid)):
        if path is not None and not sweep:
            raise typer.BadParameter(f"--{option} writes a sweep: give --sweep too, such as --sweep seq=1k:128k")
    swept = _swept_axes(sweep or []) if grid is not None else {}
    for path in (html, csv, grid):
        if path is not None:
            check_path(path)
    policy, types = policy_of(mesh, expect, approximate), types_of(weights, cache)
    plans, sweeps = _planned(model, shapes, devices, dynamic, sweep or [], policy, html is not None)
    plans = [p.stored(*types) for p in plans] if any(types) else plans
    if html is not None:
        from .cost_model.plan.plan import made

        print(f"wrote {write_page(plans, html, made(plans, shlex.join(['reattend', *sys.argv[1:]])))}", file=sys.stderr)
    if csv is not None:
        from .cost_model.sites.sweep import sweeps_csv

        csv.write_text(sweeps_csv(sweeps), encoding="utf-8")
        print(f"wrote {csv}", file=sys.stderr)
    if grid is not None:
        made_grid = plans[0].grid(devices, meshes=("", mesh) if mesh is not None else (), **swept)
        print(f"{made_grid}\nwrote {made_grid.write(grid)}", file=sys.stderr)
    if json:
        print(plans[0].to_json() if len(plans) == 1 else "[\n" + ",\n".join(p.to_json() for p in plans) + "\n]")
    else:
        print(_text(plans, sweeps))
    if strict:
        from .rewriter.run.report import check_plan

        check_plan(plans[0])


def explain(
    model: Model, site: SiteName = None, target: Target = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None,
    phase: Phase = "prefill", past: Past = 0, attn: Attn = None, dynamic: Dynamic = False, expect: Expects = None,
    size: Sizes = None, json: Json = False, debug: Debug = False,
) -> None:
    """Show one attention in full: its cascade before and after, passes, tiles, bytes, proofs, guards, every candidate.

    A MODEL that ends in .txt is a cascade in the papers' notation, without a model; --size gives what it leaves open.

    Example: reattend explain config.json model.layers.0.self_attn --seq 4k --target h100
    """
    if model.endswith(".txt"):
        _explain_cascade(model, target, sizes_of(size), json)
        return
    if size:
        raise typer.BadParameter("--size is for a cascade in a .txt: models take --seq, --past and --batch")
    made = plan_one(model, shapes_of(model, batch, seq, dtype, phase, past, attn), target, dynamic, expect or ())
    from .rewriter.run.explain import explanation, explanation_data

    sites = sites_of(made, site)
    if json:
        print(json_module.dumps([explanation_data(s) for s in sites], indent=2, ensure_ascii=False))
        return
    print("\n\n".join(explanation(s, made) for s in sites))


def _explain_cascade(path: str, target: str | None, sizes: dict[str, int], json: bool) -> None:
    from .cost_model.plan.plan import Plan
    from .patterns.verdict import Obstacle
    from .rewriter.choose.alone import counted, read_file, site_of
    from .rewriter.run.explain import counted_text, explanation, explanation_data

    (device,) = devices_of([target] if target else None)
    c = read_file(Path(path), sizes)
    site = site_of(c, device, sizes)
    if isinstance(site, Obstacle):
        details, cost = counted(c, device, sizes)
        data = [{"name": c.name, "why": site.reason, "detail": details.to_dict(), "cost": cost.to_dict()}]
        plain = json_module.dumps(data, indent=2, ensure_ascii=False)
        print(plain if json else counted_text(c, site.reason, details, cost, device))
        return
    if json:
        print(json_module.dumps([explanation_data(site)], indent=2, ensure_ascii=False))
        return
    print(explanation(site, Plan((site,), (), device, model=c.name)))


def diff(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="a plan (plan --json), or a MODEL with two --target")],
    after: Annotated[
        str | None, typer.Argument(metavar="[AFTER]", help="the plan to compare with", show_default=False)
    ] = None,
    target: Targets = None, seq: Seq = None, batch: Batch = 1, dtype: Dtype = None, phase: Phase = "prefill",
    past: Past = 0, attn: Attn = None,
    tolerance: Annotated[float, typer.Option(help="share by which a choice may get slower")] = 0.05,
    json: Json = False, debug: Debug = False,
) -> None:
    """Compare two saved plans site by site; exits with 1 when a choice got slower by more than --tolerance.

    With one MODEL and two --target it compares the devices, and exits with 0.

    Example: reattend diff monday.json friday.json --tolerance 0.1
    """
    from .cost_model.plan.diff import diff as compare
    from .rewriter.shapes import UsageError

    if tolerance < 0:
        raise UsageError(f"--tolerance {tolerance} is no share: give 0 or more, such as 0.05 for 5%")
    if after is None:
        if len(target or ()) != 2:
            raise UsageError("diff compares two plans (A.json B.json), or one MODEL on two devices (--target A --target B)")
        old, new = plan_all(before, shapes_of(before, batch, seq, dtype, phase, past, attn), devices_of(target), False)
        _show(compare(old, new, tolerance), json)
        return
    made = compare(_saved(before), _saved(after), tolerance, (before, after))
    _show(made, json)
    if made.regressions:
        raise typer.Exit(1)


def targets(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="measure the present device first (under two minutes), and keep the file")
    ] = False,
    json: Json = False, debug: Debug = False,
) -> None:
    """List the devices that can be planned for, with the numbers that plans use.

    Example: reattend targets --calibrate
    """
    from .cost_model.devices.device import targets as all_targets

    if calibrate:
        _calibrate()
    if json:
        rows = [{"name": d.name, "title": d.title, "kind": d.kind, "arch": d.arch, "basis": d.basis,
                 "band": d.band, "kernel": d.kernel, "known": d.known if d.is_gpu else "",
                 "prefill_band": d.prefill_band or d.band, "decode_band": d.decode_band or d.band,
                 "band_seconds": d.band_seconds, "dram_bytes_per_s": d.dram_bytes_per_s,
                 "matrix_flops_per_s": dict(d.matrix_flops_per_s),
                 "sources": dict(d.sources)} for d in all_targets()]
        print(json_module.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    numbers = ("units", "memory TB/s", "bf16 TFLOP/s")
    for column in ("target", "device", "arch", *numbers, "basis", "times", "kernels by"):
        table.add_column(column, justify="right" if column in numbers else "left")
    for d in all_targets():
        table.add_row(
            d.name, d.title, d.arch, str(d.units), f"{d.dram_bytes_per_s / 1e12:.2f}",
            f"{d.matrix_rate('bf16') / 1e12:.1f}", d.basis, f"±{d.band:.0%}", _known(d),
        )
    Console(width=max(100, Console().width)).print(table)


def _known(d: Device) -> str:
    """What vendors' kernels are known by on a GPU (Device.known), with the bands of prompts and of decoding."""
    if not d.is_gpu:
        return ""
    if not d.prefill_band:
        return f"{d.known} ±{d.band:.0%}"
    return f"{d.known} ±{d.prefill_band:.0%} / ±{d.decode_band:.0%}"


def _calibrate() -> None:
    """Measure the present device behind a progress bar; what the check at the end found goes to stderr."""
    import torch
    from rich.progress import track

    from .codegen.measure.calibrate import calibrate as measure
    from .cost_model.devices.device import calibration_path, shipped
    from .rewriter.choose.choose import running_device

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
    )


# --- how --------------------------------------------------------------------------------------------------------


def _swept_axes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """The values of each swept axis. Raises BadParameter where one is given twice."""
    asked = [sweep_of(text) for text in texts]
    axes = dict(asked)
    if len(axes) < len(asked):
        raise typer.BadParameter("--grid takes each axis once: join its values, such as --sweep seq=1k,4k,32k")
    return axes


def _planned(
    spec: str, shapes: Shapes, devices: list[Device], dynamic: bool, sweeps: list[str], policy: Policy, page: bool
) -> tuple[list[Plan], list[Sweep]]:
    """Plans and sweeps. A page wants open sizes for its own sweep, and does without where the capture needs fixed ones."""
    if sweeps:
        plans, found = plan_swept(spec, shapes, devices, sweeps, policy)
        return [replace(p, sweeps=tuple(s.on(p.device.name) for s in found)) for p in plans], found
    if not page:
        return plan_all(spec, shapes, devices, dynamic, policy), []
    from .cost_model.report.page import swept

    plans = plan_all(spec, shapes, devices, True, policy) if dynamic else _open_if_possible(spec, shapes, devices, policy)
    return [replace(p, sweeps=swept(p)) for p in plans], []


def _open_if_possible(spec: str, shapes: Shapes, devices: list[Device], policy: Policy) -> list[Plan]:
    """Plans with open sizes, or with fixed ones where the capture needs them or finds more attentions so."""
    from .rewriter.capture.capture import CaptureError

    why = ""
    plans: list[Plan] = []
    try:
        plans = plan_all(spec, shapes, devices, True, policy)
    except CaptureError as no:
        why = str(no)
    if plans and plans[0].sites and not plans[0].misses:
        return plans
    fixed = plan_all(spec, shapes, devices, False, policy)
    if plans and len(plans[0].sites) >= len(fixed[0].sites):
        return plans
    why = why or "; ".join(dict.fromkeys(m.reason for m in plans[0].misses))
    return [replace(p, note=f"{p.note}; sizes are fixed ({why})") for p in fixed]


def _text(plans: list[Plan], sweeps: list[Sweep]) -> str:
    from .cost_model.plan.table import plans_table

    head = str(plans[0]) if len(plans) == 1 else plans_table(plans)
    spread = [str(p.sharding) for p in plans if p.sharding is not None and len(plans) > 1]
    return "\n\n".join([head, *spread, *map(str, sweeps)])


def _saved(path: str) -> Plan:
    """A plan from a file. Raises UsageError and PlanError with one sentence."""
    from .cost_model.plan.plan import Plan
    from .cost_model.sites.site import PlanError
    from .rewriter.shapes import UsageError

    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: save a plan with `reattend plan MODEL --json > {path}`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): save a plan with `reattend plan MODEL --json`") from None
    except PlanError as no:
        raise UsageError(f"{path}: {no}") from None


def _show(made: Diff, json: bool) -> None:
    print(made.to_json() if json else made)
