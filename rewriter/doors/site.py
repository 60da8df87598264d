"""One call behind a door: its function traced on the values at hand, planned and rewritten as a graph of `optimize` is.

    a kind      all that the function's code depends on but sizes: its key, types, devices, modes, what it read of its module
    a template  one capture of a kind, at its sizes or with open ones, planned and rewritten; layers share it
    a running   a template in one layer, with a watch, counts and samples of its own

Sizes are numbers in a kind's first capture; those that differ in a later call are open from then on.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from ...cost_model.devices.device import Device
from ...cost_model.plan.plan import Plan
from ..capture.call import CapturedCall, SizeAt, Value, from_call, size_places, sizes_of
from ..capture.capture import CaptureError, first_line
from ..choose import choose
from ..choose.policy import Policy, StrictError
from ..run.bypass import capturing
from ..run.report import GraphPiece
from ..run.session import own_saved_tensors
from ..splice import sampling
from ..splice.calls import call_plainly
from ..splice.guards import Guarded
from .callables import Opaque
from .reads import Reads

# Kinds of calls whose captures are kept, of all models together, and captures of a kind.
KINDS, CAPTURES = 128, 32
_lock = threading.RLock()


@dataclass(frozen=True, eq=False)
class Door:
    """What a door was registered with."""

    policy: Policy
    target: Device | None = None


# a step makes one for each layer: frozen, it would take three times as long
@dataclass(slots=True, eq=False)
class DoorCall:
    """A call behind a door. `code` gives the function of `values`, noting what it reads of the layer beside them.

    `key` is all that this function depends on but `values` and what is noted; `growing` are sizes that change in every call.
    """

    layer: nn.Module
    where: Callable[[], str]
    key: Hashable
    values: Sequence[Value]
    code: Callable[[nn.Module, Reads], Callable[..., Tensor]]
    growing: frozenset[SizeAt] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What the layer is called while nobody has asked where it stands in a model."""
        return f"{type(self.layer).__name__} {getattr(self.layer, 'layer_idx', '')}".strip()

    def kind(self) -> Hashable:
        grad = torch.is_grad_enabled()
        device = next(x.device.type for x in self.values if isinstance(x, Tensor))
        modes = grad, torch.is_inference_mode_enabled(), autocast_of(device)
        return self.key, modes, tuple([_described(x, grad) for x in self.values])


def autocast_of(device: str) -> object:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def _described(x: Value, grad: bool) -> object:
    if not isinstance(x, Tensor):
        return int
    return x.dtype, x.device, grad and x.requires_grad, x.dim(), type(x), x.is_neg()


@dataclass(frozen=True, eq=False)
class Template:
    """A capture of a kind. Without a graph, the library's own function runs, `error` or the plan says why."""

    reads: Reads
    captured: CapturedCall | None = None
    graph: fx.GraphModule | None = None
    plan: Plan | None = None
    error: str = ""
    capture_seconds: float = 0.0
    plan_seconds: float = 0.0

    def fits(self, call: DoorCall, flat: tuple[int, ...]) -> bool:
        return self.reads.hold(call.layer) and (self.captured is None or self.captured.holds(call.values, flat))


@dataclass(eq=False)
class Running:
    """A template in one layer."""

    template: Template
    piece: GraphPiece
    graph: fx.GraphModule | None
    guards: tuple[Guarded, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, values: Sequence[Value]) -> Tensor | None:
        """The attention; None where the library's own function is to run."""
        with self.lock:
            self.piece.calls += 1
            number = self.piece.calls
        if self.graph is None or self.template.captured is None:
            return None
        if any(g.broken for g in self.guards):
            for g in self.guards:
                g.fallbacks[g.name] += 1
            return None
        given = self.template.captured.arguments(values)
        if sampling.due(number):
            made: Tensor = sampling.timed(self.graph, self.piece.samples, *given)
            return made
        out: Tensor = self.graph.forward(*given)
        return out


@dataclass(eq=False)
class BehindDoor:
    """All that ran behind a door in one layer. `own` counts, by reason, calls that were left to the library.

    `recipe` is what a door keeps of its last call. Nothing here holds the layer: it would live as long as its page.
    """

    kinds: OrderedDict[Hashable, list[Running]] = field(default_factory=OrderedDict)
    pieces: list[GraphPiece] = field(default_factory=list)
    own: dict[str, int] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    door: Door | None = None
    recipe: object = None

    def leave(self, why: str) -> None:
        with _lock:
            self.own[why] = self.own.get(why, 0) + 1

    def run(self, call: DoorCall, door: Door) -> Tensor | None:
        """The attention of a call; None where the library's own function is to run."""
        self.calls += 1
        self.door = door
        kind, flat = call.kind(), sizes_of(call.values)
        known = self.kinds.get(kind, ())
        running = next((r for r in known if r.template.fits(call, flat)), None)
        if running is None:
            running = self._begin(call, door, kind, flat)
        return running(call.values)

    def _begin(self, call: DoorCall, door: Door, kind: Hashable, flat: tuple[int, ...]) -> Running:
        with _lock:
            template = _template((kind, door), call, door, flat)
            running = instance(template, call, len(self.pieces), door.policy)
            mine = self.kinds.setdefault(kind, [])
            mine.insert(0, running)
            del mine[CAPTURES:]
            while len(self.kinds) > KINDS:
                self.kinds.popitem(last=False)
            self.pieces.append(running.piece)
            del self.pieces[: -KINDS]
            self.notes |= dict.fromkeys(call.notes)
        return running


_templates: OrderedDict[Hashable, list[Template]] = OrderedDict()


def _template(kind: Hashable, call: DoorCall, door: Door, flat: tuple[int, ...]) -> Template:
    """A template that fits, of those that are kept or made now."""
    made = _templates.setdefault(kind, [])
    _templates.move_to_end(kind)
    found = next((t for t in made if t.fits(call, flat)), None)
    if found is not None:
        return replace(found, capture_seconds=0.0, plan_seconds=0.0)
    new = build(call, door, opened(made, call, flat))
    made.insert(0, new)
    del made[CAPTURES:]
    while len(_templates) > KINDS:
        _templates.popitem(last=False)
    return new


def opened(made: Sequence[Template], call: DoorCall, flat: tuple[int, ...]) -> frozenset[SizeAt]:
    """The sizes that are known to change: those that did, and those that always do."""
    before = [t.captured for t in made if t.captured is not None]
    places = size_places(call.values)
    changed = {p for c in before for p, n, m in zip(places, flat, c.hint, strict=True) if p is not None and n != m}
    return call.growing | changed | frozenset(p for c in before for p in c.opened)


def build(call: DoorCall, door: Door, sizes: frozenset[SizeAt]) -> Template:
    """Capture, plan and rewrite a call. A failure is a template without a graph."""
    reads = Reads()
    start = time.perf_counter()
    try:
        with capturing(), own_saved_tensors():
            captured = _captured(call, reads, sizes)
        begin = time.perf_counter()
        request = choose.Request(door.policy, door.target)
        plan = choose.rewrite(captured.captured, request)
    except (CaptureError, Opaque) as no:
        return Template(reads, error=str(no), capture_seconds=time.perf_counter() - start)
    except StrictError:
        raise
    except Exception as error:
        # A defect here must not reach the user's model: the library's own function runs, and the report says so.
        said = f"the rewrite failed, {call.label} runs as written: {type(error).__name__}: {first_line(error)}"
        warnings.warn(f"reattend: {said}", stacklevel=2)
        return Template(reads, error=said)
    sites = tuple(replace(s, where=s.where or call.where()) for s in plan.sites)
    plan = replace(plan, sites=sites, misses=tuple(replace(m, where=m.where or call.where()) for m in plan.misses))
    graph = captured.captured.graph if any(not s.chosen.is_original for s in sites) else None
    if graph is not None:
        call_plainly(graph)
    return Template(reads, captured, graph, plan, "", begin - start, time.perf_counter() - begin)


def _captured(call: DoorCall, reads: Reads, sizes: frozenset[SizeAt]) -> CapturedCall:
    if sizes:
        try:
            return from_call(call.code(call.layer, reads), call.values, sizes, SITE_NAME)
        except CaptureError:
            # what its code asks of an open size may have an answer for a number
            reads.clear()
    return from_call(call.code(call.layer, reads), call.values, (), SITE_NAME)


# What a site is called while nobody has said where its layer stands in a model.
SITE_NAME = "attention"


def instance(template: Template, call: DoorCall, number: int, policy: Policy) -> Running:
    """A template for one layer: guards, watches and counts of its own."""
    piece = GraphPiece(
        call.label, number, error=template.error, plan=template.plan, capture_seconds=template.capture_seconds,
        plan_seconds=template.plan_seconds,
    )
    if policy.strict:
        piece.check()
    if template.graph is None:
        return Running(template, piece, None, ())
    guards = tuple(m for m in template.graph.modules() if isinstance(m, Guarded))
    fresh = {g: _fresh(g, call.label, piece) for g in guards}
    copied = fx.Graph()
    copied.output(copied.graph_copy(template.graph.graph, {}))
    parts = {name: fresh.get(m, m) for name, m in template.graph.named_children()}  # type: ignore[call-overload]
    held = dict((*template.graph.named_parameters(), *template.graph.named_buffers()))
    graph = fx.GraphModule({**parts, **held}, copied)
    return Running(template, piece, graph, tuple(fresh.values()))


def _fresh(g: Guarded, label: str, piece: GraphPiece) -> Guarded:
    """A guarded call with a watch of its own."""
    watch = g.watch
    if watch is not None:
        watch = replace(watch, site=label, record=piece.checks, calls=0, seen=set(), lock=threading.Lock())
    made = Guarded(g.name, g.target, g.original, g.conditions, once=g.once, watch=watch, written=g.written)
    made.known, made.fallbacks = g.known, piece.fallbacks
    return made
