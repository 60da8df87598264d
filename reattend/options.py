"""What the commands share: their arguments and options, how these are read, and the plans that they ask for.

Loads no torch: what needs it is imported when a command runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .cost_model.devices.device import Device
    from .cost_model.plan.plan import Plan
    from .cost_model.sites.site import Site
    from .cost_model.sites.sweep import Sweep
    from .rewriter.choose.policy import Policy
    from .rewriter.shapes import Shapes


def tokens(value: str | int) -> int:
    """4096, 4_096 or 4,096; 4k (4096), 1.5k (1536) or 1M (1048576)."""
    text = str(value)
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = re.sub(r"(?<=\d)[_,](?=\d{3}(\D|$))", "", text if factor == 1 else text[:-1])
    if not re.fullmatch(r"\d+(\.\d+)?", digits) or Fraction(digits) * factor % 1:
        raise typer.BadParameter(f"{text!r} is no number of tokens: write 4096, 4k, 1.5k or 1M")
    return int(Fraction(digits) * factor)


def sweep_of(text: str) -> tuple[str, tuple[int, ...]]:
    """`seq=1k:1M` (powers of two) or `seq=1k,4k,32k` as an axis with its values."""
    from .cost_model.sites.axes import AXES, powers_of_two
    from .cost_model.sites.course import SweepError

    axis, equals, span = text.partition("=")
    form = "write seq=1k:1M (powers of two) or seq=1k,4k,32k"
    if not equals or not span or axis not in AXES:
        raise typer.BadParameter(f"{text!r} is no sweep over one of {', '.join(AXES)}: {form}")
    try:
        low, colon, high = span.partition(":")
        values = powers_of_two(tokens(low), tokens(high)) if colon else tuple(map(tokens, span.split(",")))
    except SweepError as no:
        raise typer.BadParameter(f"{text!r}: {no}: {form}") from None
    except typer.BadParameter as no:
        raise typer.BadParameter(f"{text!r}: {no}; {form}") from None
    if min(values) < 1:
        raise typer.BadParameter(f"{text!r}: sizes must be at least 1: {form}")
    return axis, values


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
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="device to plan for (see `reattend targets`); several times: side by side"),
]
Seq = Annotated[int | None, typer.Option(parser=tokens, metavar="TOKENS", help="query tokens: 4096, 4k, 128k")]
Batch = Annotated[int, typer.Option(help="sequences in the batch")]
Dtype = Annotated[str | None, typer.Option(help="f32, bf16, f16; default: the config's own")]
Phase = Annotated[str, typer.Option(help="prefill, or decode: one token over a filled cache")]
Past = Annotated[int, typer.Option(parser=tokens, metavar="TOKENS", help="tokens in the cache, with --phase decode")]
Attn = Annotated[str | None, typer.Option(help="the model's own implementation: eager or sdpa")]
Dynamic = Annotated[bool, typer.Option("--dynamic", help="keep sizes symbolic where the model allows it")]
Sweeps = Annotated[
    list[str] | None,
    typer.Option("--sweep", metavar="AXIS=VALUES", help="seq=1k:1M (powers of two), seq=1k,4k,32k, past=…, batch=1:64"),
]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="PATH", help="with --sweep: write every estimate, a line each")]
Grids = Annotated[
    Path | None, typer.Option("--grid", metavar="PATH", help="every combination of swept sizes and targets: .csv, .parquet")
]
Meshes = Annotated[
    str | None, typer.Option("--mesh", metavar="AXES", help="devices to spread it over: tp=8, or tp=8,cp=2 (tp, cp, dp)")
]
Approximate = Annotated[
    bool, typer.Option("--approximate", help="with --mesh: also take ways that are not exact (TPLA), which are shown anyhow")
]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", metavar="NAME=N", help="of a cascade in a .txt: an open size, such as M=128k"),
]
Expects = Annotated[
    list[str] | None,
    typer.Option("--expect", metavar="NAME=FORM", help="what to expect of run-time data that a mask reads: "
                 "attention_mask=length:700, position_ids=segments:8, table=blocks:16, table=0.25"),
]
Weights = Annotated[
    str | None, typer.Option(help="store weights of products so, for the whole model's step: fp8, int8, int4")
]
Cache = Annotated[str | None, typer.Option(help="store keys and values so, for the whole model's step: fp8, int8")]
Html = Annotated[Path | None, typer.Option("--html", metavar="PATH", help="write one self-contained page")]
Strict = Annotated[bool, typer.Option("--strict", help="exit with 1 when an attention is left alone")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def shapes_of(
    model: str, batch: int, seq: int | None, dtype: str | None, phase: str, past: int, attn: str | None
) -> Shapes:
    """The shape options for a model. What names none, and options that it would not heed, are refused, without torch."""
    from .rewriter.shapes import Shapes, check_spec

    shapes = Shapes(batch, seq, dtype, phase, past, attn)
    check_spec(model, shapes)
    return shapes


def sizes_of(given: Sequence[str] | None) -> dict[str, int]:
    """`M=128k` as a size by name."""
    out: dict[str, int] = {}
    for text in given or ():
        name, equals, size = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is no size: write M=4096 or M=128k")
        out[name] = tokens(size)
    return out


def devices_of(names: Sequence[str] | None) -> list[Device]:
    """The devices of these names, each once; this machine's CPU without one."""
    from .cost_model.devices.device import device

    return [device(name) for name in dict.fromkeys(names or ["cpu"])]


def plan_one(spec: str, shapes: Shapes, target: str | None, dynamic: bool, expect: Sequence[str] = ()) -> Plan:
    policy = policy_of(None, expect)
    (made,) = plan_all(spec, shapes, devices_of([target] if target else None), dynamic, policy)
    return made


def policy_of(mesh: str | None, expect: Sequence[str] | None, approximate: bool = False) -> Policy:
    """The policy of a command: a mesh to spread over, what is expected of run-time data, and whether results may differ."""
    if approximate and mesh is None:
        raise typer.BadParameter("--approximate is for ways to spread a model: give --mesh too, such as --mesh tp=8")
    from .rewriter.choose.policy import Policy

    return Policy(mesh=mesh, expect=tuple(expect or ()), approximate=approximate)


def types_of(weights: str | None, cache: str | None) -> tuple[str, str]:
    """What weights and caches are stored in; "" as in the model. Raises BadParameter on a type that is not known."""
    from .cost_model.layer.step import StepError, Types

    try:
        made = Types(weights or "", cache or "")
    except StepError as no:
        raise typer.BadParameter(str(no)) from None
    return made.weights, made.cache


def plan_all(
    spec: str, shapes: Shapes, devices: Sequence[Device], dynamic: bool, policy: Policy | None = None
) -> list[Plan]:
    """A plan for each device; the model is captured once where its graph can be kept."""
    from .rewriter.run.planning import plan_spec
    policy = policy or policy_of(None, ())
    first = plan_spec(spec, shapes, devices[0], policy, dynamic=dynamic)
    if first.retake is None:
        return [first, *(plan_spec(spec, shapes, d, policy, dynamic=dynamic) for d in devices[1:])]
    return [first, *(first.at(d) for d in devices[1:])]


def plan_swept(
    spec: str, shapes: Shapes, devices: Sequence[Device], wanted: Sequence[str], policy: Policy
) -> tuple[list[Plan], list[Sweep]]:
    """Plans with open sizes, captured once, and a sweep over all devices for each of `wanted`."""
    asked = [sweep_of(text) for text in wanted]
    if shapes.phase != "decode" and any(axis == "past" for axis, _ in asked):
        raise typer.BadParameter("a prefill has no past: sweep past with --phase decode, or sweep seq")
    batched = any(axis == "batch" for axis, _ in asked)
    # A batch of one is no open size: capture takes 1 for special.
    captured = replace(shapes, batch=max(2, shapes.batch)) if batched else shapes
    plans = plan_all(spec, captured, devices, True, policy)
    if batched and plans[0].axes.get("batch"):
        plans = [p.at(batch=shapes.batch) for p in plans]
    return plans, [plans[0].over(axis, values, devices) for axis, values in asked]


def sites_of(made: Plan, name: str | None) -> list[Site]:
    """The sites of this name or number; without one, the first of each kind of identical sites."""
    from .rewriter.run.explain import positions
    from .rewriter.shapes import UsageError

    if not made.sites:
        raise UsageError("the model has no attention that was found: `reattend plan` says what was left alone and why")
    if name is not None:
        return [made.sites[i] for i in positions(made.sites, name)]
    firsts: dict[object, Site] = {}
    for s in made.sites:
        firsts.setdefault((s.cascade, s.chosen.name), s)
    return list(firsts.values())
