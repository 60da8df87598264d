"""Choice: the candidates of every attention, what each would cost, which one runs, and why; then the rewrite itself.

    graph ─ detect → attentions ─ candidates → Site (plain data) + Call (what is spliced) ─ splice → graph

Candidates are the original code, SDPA, FlexAttention and our kernel. Cheapest first, of those that may run here: the policy
permits them, the device has them, gradients flow through them where they are wanted. Identical attentions are decided once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ...codegen.cpu.scan import ScanKernel
from ...cost_model.count.expect import ExpectError
from ...cost_model.devices.architecture import cuda_name
from ...cost_model.devices.device import Device, targets, with_threads
from ...cost_model.devices.device import device as device_named
from ...cost_model.layer.work import LayerWork
from ...cost_model.plan.plan import Plan
from ...cost_model.sites.site import ORIGINAL, Miss, Site
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade
from ...patterns.evaluate import infer_sizes
from ..capture import capture
from ..check.approximate import MethodWatch, Slot
from ..check.audit import CALLS, Audit
from ..check.verdicts import Check
from ..check.watch import SiteWatch
from ..find import defect
from ..find.detect import Found, NearMiss, defective, find
from ..find.place import Place, hints_of, interior, named, place, with_further
from ..find.upstream import Reached, projection_width, upstream
from ..fold.recurrences import FoundScan
from ..graph.aliases import Aliases
from ..graph.dropout import COUNTED, counted, restore_uncounted
from ..graph.functional import EDITED, functional
from ..graph.liveness import erase_dead
from ..graph.node import FOLDED
from ..graph.shape_only import with_sizes
from ..lift.index import ZERO
from ..splice import splice
from ..splice.guards import Originals
from . import scans
from .approximations import Approximation, Installed, methods_at, with_methods
from .candidates import Question, answer, guard_sentences
from .latents import over_latents, with_engine_form
from .outside import outside
from .policy import Policy, StrictError


@dataclass(frozen=True)
class Request:
    """What a graph is planned for. `executable`: the plan will run in this process, on the tensors' own device.

    `choices` names the candidate of some sites, by name, instead of the cheapest. `traced`: the rewritten graph goes
    to Inductor, where nothing can branch on data. `installed`: the methods that a calibration found, with their errors.
    """

    policy: Policy
    target: Device | None = None
    executable: bool = True
    choices: Mapping[str, str] = field(default_factory=dict)
    traced: bool = False
    installed: Installed | None = None


@dataclass(frozen=True)
class Decision:
    """An attention of a graph with what was decided, and what each candidate that can run would be spliced as.

    `inner`: the attention as it was found; where it runs over latents, `found` holds the maps before and behind it as well.
    `methods` are those of the policy at it, `approximation` the one of them that was chosen.
    """

    found: Found
    site: Site
    calls: Mapping[str, splice.Call]
    inner: Found
    methods: tuple[Approximation, ...] = ()

    @property
    def approximation(self) -> Approximation | None:
        """The method that is chosen; None where what is chosen is exact."""
        return next((m for m in self.methods if m.candidate.name == self.site.choice), None)

    @property
    def call(self) -> splice.Call | None:
        """What the choice is spliced as; None where the original code stays."""
        return self.calls.get(self.site.choice)


# --- devices ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def running_device(kind: str) -> Device:
    """The device that tensors of a torch device type are on. Raises ValueError for one that no data file describes."""
    if kind == "cuda":
        return _gpu(torch.cuda.get_device_name(), _architecture())
    if kind == "cpu":
        return _cpu(torch.get_num_threads())
    raise ValueError(
        f"no device file describes {kind!r} tensors: name a target; one of {', '.join(d.name for d in targets())}"
    )


@lru_cache(maxsize=16)
def _cpu(threads: int) -> Device:
    return with_threads(device_named("cpu"), threads)


def _architecture() -> str:
    properties = torch.cuda.get_device_properties()
    hip = getattr(properties, "gcnArchName", "")
    return hip.split(":")[0] if torch.version.hip else cuda_name(properties.major, properties.minor)


def _gpu(name: str, architecture: str) -> Device:
    """The device file with this name, else one of the same architecture."""
    gpus = [d for d in targets() if d.is_gpu]
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *(a + b for a, b in pairwise(words)), *map("".join, zip(words, words[1:], words[2:]))}
    for d in gpus:
        if d.name in known:
            return d
    for d in gpus:
        if d.arch == architecture:
            return d
    raise ValueError(
        f"no device file describes {name} ({architecture}): name a target; one of {', '.join(d.name for d in gpus)}"
    )


# --- a graph ------------------------------------------------------------------------------------------------------


def rewrite(captured: capture.Captured, request: Request, checks: list[Check] | None = None) -> Plan:
    """Plan every attention of a captured graph and splice the chosen calls in. The graph is changed in place.

    `checks` takes what is found where the calls are held against the original code.
    """
    record = [] if checks is None else checks
    sites: list[Site] = []
    misses: list[Miss] = []
    where = request.target
    taken: Counter[str] = Counter()
    for region in capture.regions(captured.graph):
        steps, missed = _scanned(region, request, taken, record)
        sites += steps
        misses += missed
        decisions, missed = _decided(region, request, taken)
        replaced: dict[fx.Node, fx.Node] = {}
        originals = Originals(region)
        misses += missed
        for d in decisions:
            try:
                new = _splice(originals, _reading(d, replaced), request, record)
                replaced |= {d.found.output: new} if new is not None else {}
                stays = d.call is not None and new is None
                sites.append(replace(d.site, choice=ORIGINAL, guards=()) if stays else d.site)
            except Exception as error:
                misses.append(_miss(defective(d.found.output, error)))
        erase_dead(region)
        restore_uncounted(region.graph, replaced)
        splice.finish(region)
        where = where or _device_of(region)
    return Plan(tuple(sites), tuple(misses), where or running_device("cpu"))


def _scanned(
    region: fx.GraphModule, request: Request, taken: Counter[str], record: list[Check]
) -> tuple[list[Site], list[Miss]]:
    """Put our scan in the place of the recurrences that it is chosen for.

    Where it is for none the graph stays as it is: a write in place moves less than a new value.
    """
    pure = functional(region) or region
    with_sizes(pure)
    erase_dead(pure)
    found, misses = scans.scans(pure.graph, taken)
    decided = [(f, *scans.decide(s, request.target or running_device(s.device_type), request.policy)) for f, s in found]
    if request.traced:
        decided = [(f, replace(site, choice=ORIGINAL), None) for f, site, _ in decided]
    kept = [name for name, choice in request.choices.items() if choice == ORIGINAL]
    decided = [(f, replace(s, choice=ORIGINAL), None) if s.name in kept else (f, s, k) for f, s, k in decided]
    if all(kernel is None for _, _, kernel in decided):
        _mark(region.graph, pure.graph)
    else:
        region.graph = pure.graph
        put = [kernel is not None and _splice_scan(region, f, site, kernel, request, record) for f, site, kernel in decided]
        decided = [(f, site if there else replace(site, choice=ORIGINAL), None) for (f, site, _), there in zip(decided, put)]
        splice.finish(region)
    return [site for _, site, _ in decided], misses


def _splice_scan(
    region: fx.GraphModule, f: FoundScan, site: Site, kernel: ScanKernel, request: Request, record: list[Check]
) -> bool:
    """Put a scan in; whether it is there. What must go back to its own code and cannot keeps it."""
    output = scans.output_of(region, f)
    original = Originals(region).of(output, scans.interior(f, output))
    policy, call = request.policy, scans.call_of(f, kernel)
    if original is None and call.guarded:
        why = "its own code cannot run again: a part of it is written in place"
        record.append(Check(_label(site), site.choice, "unchecked", why=why))
        return False
    watch = SiteWatch(
        _label(site), site.choice, site.chosen.source, every=policy.check if isinstance(policy.check, int) else 0,
        refuse=StrictError if policy.strict else None, record=record,
    )
    watched = policy.check != "never" and original is not None
    splice.replace(
        region, output, f.tensors, {}, call, name=site.name, original=original,
        watch=watch if watched else None,
    )
    return True


def _decided(region: fx.GraphModule, request: Request, taken: Counter[str]) -> tuple[list[Decision], list[Miss]]:
    """The decisions for a graph. Scores that are written in place are decided without the writes, and weights that are
    dropped with dropout that is counted, where the policy has it so.

    Where no call stands for them the graph stays as it is: a write in place moves less than a new value, and torch draws
    faster than one counts.
    """
    before, pure = Counter(taken), functional(region)
    seen: list[Decision] = []
    noticed: list[Miss] = []
    counting = _counting(pure or region) if request.policy.dropout == "own" else None
    for other, special in ((counting, _counts), (pure, _edits)):
        if other is None:
            continue
        decisions, missed = decide(other, request, taken)
        own = [d for d in decisions if special(d.found)]
        if any(d.call is not None for d in own):
            region.graph = other.graph
            return [_noted(d) for d in decisions], missed
        seen += [_noted(d) for d in own if d.site.where not in {x.site.where for x in seen}]
        noticed += missed
        taken.clear()
        taken.update(before)
    decisions, missed = decide(region, request, taken)
    places = {d.site.where for d in seen}
    # what looks like an attention only without its writes is named as well
    named = {*places, *(d.site.where for d in decisions), *(m.where for m in missed)}
    missed += [m for m in noticed if m.where not in named]
    return [*decisions, *seen], [m for m in missed if m.where not in places]


def _mark(graph: fx.Graph, pure: fx.Graph) -> None:
    """What belongs to recurrences in a graph without writes belongs to them in the graph as it stands."""
    marked = {n.name: n.target for n in pure.nodes if FOLDED in n.meta}
    for n in graph.nodes:
        if n.name in marked and marked[n.name] is n.target:
            n.meta[FOLDED] = True


def _counting(gm: fx.GraphModule) -> fx.GraphModule | None:
    """The graph with dropout that is counted; None where there is none, or where our code raised."""
    try:
        return counted(gm)
    except Exception as error:
        defect.reason("dropout", error)
        return None


def _edits(f: Found) -> bool:
    """Does an attention hold what was written in place?"""
    return any(EDITED in n.meta for n in interior(f))


def _noted(d: Decision) -> Decision:
    return replace(d, site=replace(d.site, notes=(*d.site.notes, _COUNTED))) if _counts(d.found) else d


_COUNTED = "its dropout is counted from a seed of each call: other elements are dropped than torch would drop"


def _counts(f: Found) -> bool:
    """Is the dropout of an attention counted?"""
    return any(COUNTED in n.meta for n in (*interior(f), f.output))


def _reading(d: Decision, replaced: Mapping[fx.Node, fx.Node]) -> Decision:
    """The decision where what one attention yields is what this one reads."""
    found, inner = (
        replace(f, tensors={name: replaced.get(n, n) for name, n in f.tensors.items()}) for f in (d.found, d.inner)
    )
    return replace(d, found=found, inner=inner)


def _splice(originals: Originals, d: Decision, request: Request, record: list[Check]) -> fx.Node | None:
    """Put in what was chosen, under the policy's watch; the new node. Where that raises, the graph stays as it is.

    What cannot be watched keeps the original code.
    """
    f, call, policy = d.found, d.call, request.policy
    if call is None:
        return None
    watched = policy.check != "never"
    if watched and request.traced:
        why = "nothing can step aside in a graph that Inductor compiles"
        record.append(Check(_label(d.site), d.site.choice, "unchecked", why=why))
        watched = False
    original = originals.of(f.output, interior(f), f.further) if call.guarded or watched else None
    if original is None and (watched or call.guarded):
        why = "its own code cannot run again: a part of it is written in place"
        record.append(Check(_label(d.site), d.site.choice, "unchecked", why=why))
        return None
    watch: SiteWatch | None = None
    if watched and original is not None:
        watch = _method_watch(d, d.approximation, policy, record) if d.approximation is not None else watch_of(
            d, original[1], policy, record
        )
    before = f.output.prev
    new = splice.replace(
        originals.gm, f.output, f.tensors, f.scalars, call, name=d.site.name, original=original, watch=watch,
        further=f.further,
    )
    originals.aliases.insert(list(_between(before, f.output)), f.output)
    return new


def _between(a: fx.Node, b: fx.Node) -> Iterator[fx.Node]:
    while (a := a.next) is not b:
        yield a


def _label(site: Site) -> str:
    """What a site is called where it stands alone: a model that is one attention has no module's name."""
    return site.name or site.where


def watch_of(d: Decision, inputs: Sequence[fx.Node], policy: Policy, record: list[Check]) -> SiteWatch:
    """The watch over a site whose own code reads these nodes."""
    view = attention(d.inner.cascade)
    assert isinstance(view, Attention), view
    read = {d.inner.tensors.get(str(x.attr)) for x in ex.loads(view.score)}
    numbers = [abs(x.value) for x in ex.walk(view.score) if x.is_const and x.is_float and math.isfinite(x.value)]
    return SiteWatch(
        _label(d.site), d.site.choice, d.site.chosen.source, every=policy.check if isinstance(policy.check, int) else 0,
        masks=frozenset(i for i, n in enumerate(inputs) if n in read), largest=max(numbers, default=0.0),
        repeated=_repeated(d.found, inputs), refuse=StrictError if policy.strict else None, record=record,
    )


def _method_watch(d: Decision, m: Approximation, policy: Policy, record: list[Check]) -> MethodWatch:
    """The watch over a site with a method: its kernel is held against the method's own cascade, not against the original."""
    assert d.call is not None
    slots = {t.name: Slot(t.name) for t in d.found.cascade.inputs}
    model, error = attention(d.found.cascade), m.candidate.error
    assert isinstance(model, Attention), model
    audit: Audit | None = None
    if error is not None and error.mass is not None:
        audit = Audit(model, m.view, error.mass.least, policy.check if isinstance(policy.check, int) else CALLS)
    return MethodWatch(
        _label(d.site), d.site.choice, d.site.chosen.source, every=policy.check if isinstance(policy.check, int) else 0,
        refuse=StrictError if policy.strict else None, record=record, view=m.view, tensors=m.tensors,
        layout=d.call.arguments(slots, lambda name: Slot(name, is_size=True)), audit=audit,
    )


def _repeated(f: Found, inputs: Sequence[fx.Node]) -> dict[int, tuple[int, ...]]:
    """The dimensions along which every reader of a node takes its first element, by the node's place in `inputs`."""
    at: dict[fx.Node, list[Sequence[ex.Expr]]] = {}
    for e in f.cascade.einsums:
        for x in e.reads:
            if str(x.attr) in f.tensors:
                at.setdefault(f.tensors[str(x.attr)], []).append(x.args)
    first = {n: [d for d, of in enumerate(zip(*reads)) if all(i is ZERO for i in of)] for n, reads in at.items()}
    return {i: tuple(d for d in first[n] if n.meta["val"].shape[d] != 1) for i, n in enumerate(inputs) if n in first}


def decide(
    gm: fx.GraphModule, request: Request, taken: Counter[str] | None = None
) -> tuple[list[Decision], list[Miss]]:
    """Every attention of a graph with its decision, and what was left alone. `taken` counts the names given before."""
    with_sizes(gm)
    erase_dead(gm)
    found, missed = find(gm)
    hints = hints_of(gm)
    decisions: list[Decision] = []
    for f, name in named(with_further(found, Aliases(gm.graph)), Counter() if taken is None else taken):
        if request.target is None:
            # a device that no file describes is no bug
            running_device(f.output.meta["val"].device.type)
        try:
            decisions.append(_decide(f, name, hints, request))
        except ExpectError:
            raise
        except Exception as error:
            missed.append(defective(f.output, error))
    return decisions, [_miss(m) for m in missed]


@dataclass(frozen=True)
class Places:
    """What a graph holds, as plain data: attentions, recurrences, what was left alone, and the work around them.

    `work` is a sentence where our own code raised: then there is no step, and the attentions are planned all the same.
    """

    attentions: list[Place]
    scans: list[scans.Scan]
    misses: list[Miss]
    work: LayerWork | str


def places(
    gm: fx.GraphModule, taken: Counter[str], *, sharded: bool = False, own_dropout: bool = False, planned: bool = False
) -> Places:
    """Every attention and every recurrence of a graph as plain data, for decisions at other sizes and on other devices.

    With `sharded` attentions also say what their keys and values are made of, with `planned` those of one query alone.
    With `own_dropout` dropout is counted.
    """
    # nothing runs here, so that what is written in place may as well be a new value
    gm = functional(gm) or gm
    gm = (_counting(gm) or gm) if own_dropout else gm
    with_sizes(gm)
    erase_dead(gm)
    walked, others = scans.scans(gm.graph, taken)
    found, missed = find(gm)
    out: list[Place] = []
    aliases = Aliases(gm.graph)
    for f, name in named(with_further(found, aliases), taken):
        try:
            stands = place(f, name)
            stands = replace(stands, notes=(*stands.notes, _COUNTED)) if _counts(f) else stands
            out.append(_with_upstream(stands, f, aliases) if sharded or (planned and _decodes(stands)) else stands)
        except Exception as error:
            missed.append(defective(f.output, error))
    try:
        work: LayerWork | str = outside(gm, found)
    except Exception as error:
        work = defect.reason("the step of the whole model", error)
    return Places(out, [s for _, s in walked], [*others, *(_miss(m) for m in missed)], work)


def _decodes(p: Place) -> bool:
    view = attention(p.cascade)
    return isinstance(view, Attention) and p.cascade.rank[view.query].size == 1 and not p.gradients


def _with_upstream(p: Place, f: Found, aliases: Aliases) -> Place:
    made = upstream(f.output.graph, aliases, f)
    return replace(p, upstream=made.cascade if isinstance(made, Reached) else made, model=projection_width(f.output))


def _miss(m: NearMiss) -> Miss:
    what = f"{m.what} in {m.module}" if m.module else m.what
    return Miss(m.where, what, m.reason, m.hint)


def _device_of(gm: fx.GraphModule) -> Device | None:
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type in ("cpu", "cuda"):
            return running_device(value.device.type)
    return None


# --- one attention ------------------------------------------------------------------------------------------------


def _decide(f: Found, name: str, hints: Mapping[str, int], request: Request) -> Decision:
    stands = place(f, name)
    site, calls = decide_place(stands, hints, request)
    plain = request.policy.methods and stands.several is None
    methods = methods_at(_question(stands, hints, request), site, request.installed) if plain else ()
    if any(m.candidate.name == site.choice for m in methods):
        return Decision(f, site, calls, f, methods)
    device = request.target or running_device(stands.device_type)
    alone = not request.traced and not f.further
    over = over_latents(f, stands, site, device, stands.sizes(hints), request.policy) if alone else None
    wished = request.choices.get(name, over.site.choice if over is not None else site.choice)
    if over is not None and wished == over.site.choice:
        guards = guard_sentences(over.call)
        return Decision(over.found, replace(over.site, guards=guards), {over.site.choice: over.call}, f)
    there = any(c.name == wished and (c.is_original or wished in calls) for c in site.candidates)
    if wished != site.choice and there:
        site = replace(site, choice=wished, guards=guard_sentences(calls.get(wished)))
    return Decision(f, site, calls, f, methods)


def decide_place(
    stands: Place, at: Mapping[str, int], request: Request
) -> tuple[Site, Mapping[str, splice.Call]]:
    """The decision for an attention at sizes of the graph's symbols. Equal questions are answered once."""
    question = _question(stands, at, request)
    site, calls = answer(question)
    site = replace(site, name=stands.name, where=stands.where, notes=(*site.notes, *stands.notes))
    if request.policy.methods and stands.several is None:
        site, calls = with_methods(question, site, calls, request.installed, request.choices.get(stands.name, ""))
    site = replace(site, guards=guard_sentences(calls.get(site.choice)))
    if not request.executable:
        site = with_engine_form(site, stands, question.device, stands.sizes(at))
    return site, calls


def _question(stands: Place, at: Mapping[str, int], request: Request) -> Question:
    return Question(
        stands.cascade, tuple(sorted(stands.sizes(at).items())), request.target or running_device(stands.device_type),
        request.policy, request.executable, stands.wanted, stands.bound, stands.dtype, stands.call(at), request.traced,
        stands.origins, stands.constants, stands.bare, stands.window, stands.several,
    )


def bind_sizes(c: Cascade, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, int]:
    """Every symbol of a cascade from its inputs' shapes and the graph's scalars."""
    return infer_sizes(c, tensors, {name: int(v) for name, v in scalars.items() if name in c.free_symbols})
