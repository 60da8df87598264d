"""Planning without running: a model, or what a command line names, as a plan for a device that need not be here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from ...cost_model.count.expect import ExpectError, checked, known
from ...cost_model.devices.device import Device
from ...cost_model.layer.work import LayerWork
from ...cost_model.mesh.mesh import Mesh, linked
from ...cost_model.mesh.plan import MeshPlan
from ...cost_model.mesh.sharding import ShardedSite, shard
from ...cost_model.plan.plan import Plan
from ...cost_model.sites.axes import axes
from ...cost_model.sites.course import Symbol
from ...cost_model.sites.site import Miss, Site
from ...cost_model.words import group_name
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, bind
from ..capture import capture, export
from ..capture.models import ModelInput, load, run
from ..choose import choose, scans
from ..choose.approximations import Installed
from ..choose.policy import Policy
from ..choose.steps import Steps
from ..find import defect
from ..find.place import Place, symbols_of
from ..graph.torch_private import FakeTensor, quietly
from ..shapes import Shapes
from . import bypass, called
from .session import Session, break_of, session_of

T = TypeVar("T")

def plan_model(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], device: Device, policy: Policy, *,
    dynamic: bool, name: str = "", installed: Installed | None = None,
) -> Plan:
    """Plan a model. A model that has no graph of its own is run once, and its pieces are planned, when it has data.

    Gradients are planned for where the model is in training mode and grad mode is on. Raises CaptureError, and UsageError
    where the model's own code fails on these inputs.
    """
    name = name or type(model).__name__
    if policy.mesh is not None:
        linked(device)
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.training):
        try:
            with bypass.own():
                captured = export.from_export(model, args, kwargs, dynamic=dynamic)
                said = called.mark_bare(captured.graph, model, args, kwargs) if session_of(model) is None else ""
            plan = plan_graph(captured, device, policy, name, installed=installed)
            return replace(plan, note=f"{plan.note}{said}{_trained()}{_fused(model, plan)}")
        except capture.CaptureError as no:
            tensors = [*model.parameters(), *export.held_tensors((args, dict(kwargs)))[0]]
            if any(_without_data(t) for t in tensors):
                raise
            return _plan_pieces(model, args, kwargs, device, policy, name, str(no), installed)


def _trained() -> str:
    """What was planned for, where it is a training step."""
    if not torch.is_grad_enabled():
        return ""
    return "; planned with gradients, since the model is in training mode: model.eval() plans for inference"


def _fused(model: nn.Module, plan: Plan) -> str:
    """Which of these attentions torch may hold in one operator of its own, which no export shows and a call does."""
    if torch.is_grad_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return ""
    layers = [path for path, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer) and not m.training]
    held = [x for x in layers if any(s.name == x or s.name.startswith(f"{x}." if x else "") for s in plan.sites)]
    if not held:
        return ""
    where = group_name(held) or type(model).__name__
    return (
        f"; without gradients torch may run {where} as one operator, which optimize leaves alone: "
        "torch.backends.mha.set_fastpath_enabled(False) runs it as planned here"
    )


def _without_data(t: Tensor) -> bool:
    return t.device.type == "meta" or isinstance(t, FakeTensor)


def plan_graph(
    captured: capture.Captured, device: Device, policy: Policy, name: str = "", *, whole: bool = True,
    installed: Installed | None = None,
) -> Plan:
    """Plan a captured graph for a device that need not be here. The graph stays as it is.

    Its attentions are found once. What the plan keeps of them holds no graph, so that it can be costed again at other sizes
    and on other devices. Raises ExpectError for an expectation of what no mask of the `whole` reads.
    """
    start = time.perf_counter()
    places: list[Place] = []
    walked: list[scans.Scan] = []
    misses: list[Miss] = []
    symbols: dict[str, Symbol] = {}
    taken: Counter[str] = Counter()
    work: list[LayerWork | str] = []
    for region in capture.regions(captured.graph):
        found = choose.places(
            region, taken, sharded=policy.mesh is not None, own_dropout=policy.dropout == "own", planned=True
        )
        places += found.attentions
        walked += found.scans
        misses += found.misses
        work.append(found.work)
        symbols |= {s.name: s for s in symbols_of(region)}
    if whole:
        checked(policy.expectations, {name: came for p in places for name, came in p.origins})
    weights = _weight_bytes(captured.graph)

    def retake(where: Device, at: Mapping[str, int], which: Sequence[int]) -> tuple[Site, ...]:
        request = choose.Request(policy, where, executable=False, installed=installed)
        known = len(places)
        return tuple(
            scans.decide(walked[i - known], where, policy)[0]
            if i >= known
            else choose.decide_place(places[i], at, request)[0]
            for i in which
        )

    def reshard(where: Device, at: Mapping[str, int]) -> MeshPlan | None:
        return _sharded(alike, at, where, policy, weights)

    traced = {s.name: s.value for s in symbols.values()}
    misses += _undecided(places, traced, choose.Request(policy, device, executable=False))
    alike = _alike(places)
    sites, sharding = retake(device, traced, range(len(places) + len(walked))), reshard(device, traced)
    note = f"captured in {captured.seconds:.1f} s, planned in {time.perf_counter() - start:.2f} s"
    return Plan(
        sites, tuple(misses), device, model=name, note=note, weight_bytes=weights, symbols=tuple(symbols.values()),
        axes=axes(p.cascade for p in places), sharding=sharding, retake=retake, reshard=reshard,
        restep=Steps(work, places).at if whole and not any(p.gradients for p in places) else None,
    ).stored()


def _undecided(places: list[Place], at: Mapping[str, int], request: choose.Request) -> list[Miss]:
    """Take the places out of the list that cannot be decided because of a bug of ours, and name them."""
    misses: list[Miss] = []
    for p in tuple(places):
        try:
            choose.decide_place(p, at, request)
        except ExpectError:
            raise
        except Exception as error:
            places.remove(p)
            misses.append(Miss(p.where, p.name, defect.reason(p.where or p.name, error)))
    return misses


def _weight_bytes(gm: fx.GraphModule) -> int:
    return sum(p.numel() * p.element_size() for p in gm.parameters())


def _alike(places: Sequence[Place]) -> list[tuple[Place, int]]:
    """Places that differ by where they stand alone: the first of each kind, and how many there are."""
    kinds = Counter(replace(p, name="", where="") for p in places)
    firsts: dict[Place, Place] = {}
    for p in places:
        firsts.setdefault(replace(p, name="", where=""), p)
    return [(firsts[kind], many) for kind, many in kinds.items()]


def _sharded(
    alike: Sequence[tuple[Place, int]], at: Mapping[str, int], device: Device, policy: Policy, weights: int
) -> MeshPlan | None:
    """The ways to spread these attentions over the policy's mesh; None without a mesh or attentions."""
    if not alike or not isinstance(policy.mesh, Mesh):
        return None
    layers: dict[ShardedSite, list[ShardedSite]] = {}
    said: dict[str, None] = {}
    for first, many in alike:
        site, words = _bound(first, at, policy)
        layers.setdefault(replace(site, name=""), []).append(replace(site, layers=many))
        said.update(dict.fromkeys(words))
    sites = [replace(same[0], layers=sum(s.layers for s in same)) for same in layers.values()]
    step = "training" if any(p.gradients for p, _ in alike) else None
    made = shard(sites, policy.mesh, linked(device), step=step, weights=weights, approximate=policy.approximate)
    return replace(made, note="; ".join([made.note, *said]))


def _bound(p: Place, at: Mapping[str, int], policy: Policy) -> tuple[ShardedSite, tuple[str, ...]]:
    """An attention at sizes of the graph's symbols, and what is taken of run-time data there, in words."""
    sizes = p.sizes(at)
    missing = [n for n in p.cascade.free_symbols if n not in sizes]
    if missing:
        raise ValueError(f"a mesh needs sizes: {', '.join(missing)} of {p.name} has none, plan without --dynamic")
    upstream = p.upstream.with_sizes(sizes) if isinstance(p.upstream, Cascade) else p.upstream
    c, model = p.cascade.with_sizes(sizes), bind(p.model, sizes)
    view = attention(c)
    assert isinstance(view, Attention), view
    taken = known(c, view, {}, policy.expectations, dict(p.origins), p.constants)
    width = model if isinstance(model, int) else 0
    return ShardedSite(p.name, c, upstream=upstream, model=width, data=taken.data), taken.words if policy.expect else ()


def _plan_pieces(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    device: Device,
    policy: Policy,
    name: str,
    why: str,
    installed: Installed | None = None,
) -> Plan:
    """Run the model once through Dynamo, which breaks it where it must, and plan each piece."""
    plans: list[Plan] = []
    breaks: list[str] = []

    def plan_piece(gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str]) -> Callable[..., Any]:
        captured = capture.from_dynamo(gm, inputs, names)
        plans.append(plan_graph(captured, device, replace(policy, mesh=None), name, whole=False, installed=installed))
        breaks.extend(b for b in [break_of(gm)] if b)
        return gm.forward

    session = Session(policy, device, backend=plan_piece)
    session.install(model)
    try:
        args, kwargs = _copied((args, dict(kwargs)))
        with quietly():
            run(model, args, kwargs)
    finally:
        session.detach()
    where = "; ".join(dict.fromkeys(breaks)) or why
    note = f"the model has no graph of its own and was run once; captured in {len(plans)} pieces, broken at {where}"
    note += "; a mesh needs one whole graph, and is left out" if policy.mesh is not None else ""
    sites, misses = (tuple(x for p in plans for x in getattr(p, part)) for part in ("sites", "misses"))
    return Plan(sites, misses, device, model=name, note=note)


def _copied(values: T) -> T:
    tensors, make = export.held_tensors(values)
    made: T = make([t.clone() for t in tensors])
    return made


def plan_spec(spec: str, shapes: Shapes, device: Device, policy: Policy, *, dynamic: bool = False) -> Plan:
    """Plan what a command line names. Raises UsageError and CaptureError."""
    if policy.mesh is not None:
        linked(device)
    given = load(spec, shapes)
    try:
        return _plan_input(given, device, policy, dynamic)
    except capture.CaptureError:
        if given.where != "meta":
            raise
    # Some models mix tensors of their own with inputs on the meta device; fake tensors say that they are on the CPU.
    return _plan_input(load(spec, shapes, where="fake"), device, policy, dynamic)


def _plan_input(given: ModelInput, device: Device, policy: Policy, dynamic: bool) -> Plan:
    if given.program is not None:
        return plan_graph(export.from_program(given.program), device, policy, Path(given.name).name)
    assert given.model is not None
    name = given.name if ":" in given.name else type(given.model).__name__
    plan = plan_model(given.model, given.args, given.kwargs, device, policy, dynamic=dynamic, name=name)
    return replace(plan, note=f"{plan.note}; {given.note}" if given.note else plan.note)
