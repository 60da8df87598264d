"""Choice: the candidates of every attention, what each would cost, which one runs, and why; then the rewrite itself.

    graph ─ detect → attentions ─ candidates → Site (plain data) + Call (what is spliced) ─ splice → graph

Candidates are the original code, SDPA, FlexAttention and our kernel. Cheapest first, of those that may run here: the policy
permits them, the device has them, gradients flow through them where they are wanted. Identical attentions are decided once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..codegen import operator as ours
from ..codegen import vendor
from ..codegen.program import Program, loose, memory_order
from ..cost_model.cost import Cost
from ..cost_model.device import Device, targets, with_threads
from ..cost_model.device import device as device_named
from ..cost_model.passes import key_passes
from ..cost_model.plan import ORIGINAL, Candidate, MaskView, Miss, Plan, Site, SiteShape, TileCounts, ranked
from ..cost_model.predict import VendorUse, best_mapping, predict, predict_original, predict_vendor, tiles_of
from ..patterns import expr as ex
from ..patterns.cascade import Cascade, show
from ..patterns.evaluate import DTYPE_NAME, infer_sizes
from ..patterns.mapping import Mapping as Tiling
from ..patterns.masks import conjuncts, split
from ..patterns.recognise import Attention, Refusal, attention, no_key_rule
from ..patterns.recognise import Miss as NoAttention
from ..patterns.rowstate import derive, stream
from ..patterns.traits import kind, traits
from . import capture, splice
from .detect import Found, NearMiss, find
from .guards import Condition, every_row_keeps_a_key, original_subgraph
from .lift import arguments, op_name
from .liveness import erase_dead, survivors
from .operators_contract import PRODUCTS
from .policy import Policy


@dataclass(frozen=True)
class Request:
    """What a graph is planned for. `executable`: the plan will run in this process, on the tensors' own device.

    `choices` names the candidate of some sites, by module path, instead of the cheapest. `traced`: the rewritten graph goes
    to Inductor, where nothing can branch on data.
    """

    policy: Policy
    target: Device | None = None
    executable: bool = True
    choices: Mapping[str, str] = field(default_factory=dict)
    traced: bool = False


@dataclass(frozen=True)
class Decision:
    """An attention of a graph with what was decided, and what each candidate that can run would be spliced as."""

    found: Found
    site: Site
    calls: Mapping[str, splice.Call]

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
    return hip.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _gpu(name: str, architecture: str) -> Device:
    """The device file with this name, else one of the same architecture."""
    gpus = [d for d in targets() if d.is_gpu]
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *(a + b for a, b in pairwise(words))}
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


def rewrite(captured: capture.Captured, request: Request) -> Plan:
    """Plan every attention of a captured graph and splice the chosen calls in. The graph is changed in place."""
    sites: list[Site] = []
    misses: list[Miss] = []
    where = request.target
    for region in capture.regions(captured.graph):
        decisions, missed = decide(region, request)
        for d in decisions:
            if d.call is not None:
                f = d.found
                original = original_subgraph(region, f.output, interior(f)) if d.call.guarded else None
                splice.replace(region, f.output, f.tensors, f.scalars, d.call, name=d.site.name, original=original)
        splice.finish(region)
        sites += [d.site for d in decisions]
        misses += missed
        where = where or _device_of(region)
    return Plan(tuple(sites), tuple(misses), where or running_device("cpu"))


def decide(gm: fx.GraphModule, request: Request) -> tuple[list[Decision], list[Miss]]:
    """Every attention of a graph with its decision, and what was left alone."""
    erase_dead(gm)
    found, missed = find(gm)
    hints = _hints(gm)
    decisions = [_decide(f, hints, request) for f in found]
    return decisions, [_miss(m) for m in missed]


def _miss(m: NearMiss) -> Miss:
    what = f"{m.what} in {m.module}" if m.module else m.what
    return Miss(m.where, what, m.reason, m.hint)


def _device_of(gm: fx.GraphModule) -> Device | None:
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type in ("cpu", "cuda"):
            return running_device(value.device.type)
    return None


def _hints(gm: fx.GraphModule) -> Mapping[str, int]:
    """The size that each symbol of the graph has in the example that it was traced with."""
    out: dict[str, int] = {}
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for s in sizes:
            if isinstance(s, torch.SymInt) and s.node.hint is not None:
                expression = s.node.expr
                if expression.is_Symbol:
                    out.setdefault(str(expression), int(s.node.hint))
    return out


# --- one attention ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """All that a decision depends on: equal questions have equal answers."""

    cascade: Cascade
    sizes: tuple[tuple[str, int], ...]
    device: Device
    policy: Policy
    executable: bool
    gradients: bool
    bound: str
    dtype: str
    written: VendorUse | None
    traced: bool


def _decide(f: Found, hints: Mapping[str, int], request: Request) -> Decision:
    value = f.output.meta["val"]
    device = request.target or running_device(value.device.type)
    sizes = {s: hints[s] for s in f.cascade.free_symbols if s in hints}
    for name, node in f.scalars.items():
        known = getattr(getattr(node.meta.get("val"), "node", None), "hint", None)
        if known is not None:
            sizes[name] = int(known)
    bound = _bound_to_original(f)
    question = _Question(
        f.cascade, tuple(sorted(sizes.items())), device, request.policy, request.executable, _wants_gradient(f), bound,
        str(value.dtype).removeprefix("torch."), _written(f), request.traced,
    )  # fmt: skip
    site, calls = _answer(question)
    wished = request.choices.get(f.module, site.choice)
    choice = wished if wished == ORIGINAL or wished in calls else site.choice
    site = replace(
        site, name=f.module, where=f.where, choice=choice, guards=_guards(calls.get(choice)),
        notes=(*site.notes, *f.notes),
    )  # fmt: skip
    return Decision(f, site, calls)


def _bound_to_original(f: Found) -> str:
    """Why this attention cannot be replaced where it stands, whatever its cascade says; empty when it can."""
    inside = interior(f)
    scores = _scores(f, inside)
    escaped = survivors(frozenset(scores), f.output)
    if escaped:
        reader = next(u for n in escaped for u in n.users if u not in inside and u is not f.output)
        return f"the scores or weights are read elsewhere ({reader.name}): they would be computed twice"
    if _wants_gradient(f) and (cut := _gradient_cut(inside)):
        return f"a gradient is cut inside the attention (at {cut.name})"
    return ""


def _wants_gradient(f: Found) -> bool:
    """Whether a gradient flows back through the output; under no_grad it does not, whatever the parameters want."""
    return bool(f.output.meta["val"].requires_grad)


def interior(f: Found) -> frozenset[fx.Node]:
    """The nodes between the inputs of an attention and its output."""
    stop = {*f.tensors.values(), *f.scalars.values()}
    seen: set[fx.Node] = set()
    stack = [f.output]
    while stack:
        n = stack.pop()
        if n in seen or n in stop or n.op != "call_function":
            continue
        seen.add(n)
        stack.extend(n.all_input_nodes)
    return frozenset(seen - {f.output})


_CONTRACTIONS = frozenset((*PRODUCTS, "baddbmm", "addmm")) - {"sum", "linear"}


def _scores(f: Found, inside: frozenset[fx.Node]) -> set[fx.Node]:
    """The interior nodes from the products of queries and keys on: scores, weights and what is between."""
    order = {n: i for i, n in enumerate(f.output.graph.nodes)}
    reached = {n for n in inside if op_name(n) in _CONTRACTIONS} or _meeting(f, inside, order)
    for n in sorted(inside, key=lambda x: order[x]):
        if any(i in reached for i in n.all_input_nodes):
            reached.add(n)
    return reached


def _meeting(f: Found, inside: frozenset[fx.Node], order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Where a product is spelled by hand: the nodes that depend on the query's and on the key's operand."""
    view = attention(f.cascade)
    assert isinstance(view, Attention), view
    sides: list[set[fx.Node]] = [set(), set()]
    for e in view.products:
        for load in ex.loads(e.body):
            if str(load.attr) in f.tensors:
                sides[view.key in load.ranks].add(f.tensors[str(load.attr)])
    for n in sorted(inside, key=lambda x: order[x]):
        for reached in sides:
            if any(i in reached for i in n.all_input_nodes):
                reached.add(n)
    return {n for n in inside if n in sides[0] and n in sides[1]}


def _gradient_cut(inside: frozenset[fx.Node]) -> fx.Node | None:
    """A node inside whose inputs want a gradient and whose floating value does not."""
    for n in inside:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            for i in n.all_input_nodes:
                given = i.meta.get("val")
                if isinstance(given, torch.Tensor) and given.requires_grad:
                    return n
    return None


@lru_cache(maxsize=1024)
def _answer(q: _Question) -> tuple[Site, Mapping[str, splice.Call]]:
    c, sizes = q.cascade, dict(q.sizes)
    view = attention(c)
    assert isinstance(view, Attention), view
    candidates: list[Candidate] = []
    calls: dict[str, splice.Call] = {}
    for candidate, call in _candidates(q, sizes):
        candidates.append(candidate)
        if call is not None:
            calls[candidate.name] = call
    order = ranked(tuple(candidates))
    permitted = [x for x in order if x.feasible and q.policy.permits(x.name)]
    chosen = next(iter(permitted), None) or next(x for x in order if x.feasible)
    order = tuple(replace(x, why=_why(x, order, q)) if x is chosen else x for x in order)
    lines = [show(stream(view, state))] if not isinstance(state := derive(view), NoAttention) else []
    site = Site(
        name="", where="", kind=kind(view), traits=traits(view), shape=_shape(c, q),
        mask=_mask(view, c, sizes, order), proofs=_proofs(view, q), guards=(), candidates=order, choice=chosen.name,
        cascade=show(c), chosen_cascade=lines[0] if lines and chosen.name == "reattend" else "",
    )  # fmt: skip
    return site, calls


def _why(chosen: Candidate, order: tuple[Candidate, ...], q: _Question) -> str:
    """Why this one: what it saves, or why nothing else may run."""
    others = [c for c in order if c.feasible and c.name != chosen.name]
    if chosen.name == ORIGINAL:
        if q.bound:
            return q.bound
        if others:
            return "predicted fastest"
        return "; ".join(f"{c.name}: {c.why}" for c in order if not c.feasible) or "nothing else is allowed"
    if others and others[0].cost is not None and chosen.cost is not None and chosen.cost.seconds > 0:
        ratio = others[0].cost.seconds / chosen.cost.seconds
        why = (
            f"predicted {ratio:.2f}× faster than {others[0].name}"
            if ratio >= 1
            else "the fastest that the policy permits"
        )
        return f"{why}; {chosen.why}" if chosen.why else why
    return chosen.why


# --- candidates ---------------------------------------------------------------------------------------------------


def _candidates(q: _Question, sizes: Mapping[str, int]) -> Iterator[tuple[Candidate, splice.Call | None]]:
    yield Candidate(ORIGINAL, cost=_original_cost(q, sizes)), None
    for make in (_ours, _sdpa, _flex):
        candidate, call = make(q, sizes)
        no = q.bound or ("" if q.policy.permits(candidate.name) else "the policy does not permit it")
        if no and candidate.feasible:
            candidate, call = replace(candidate, feasible=False, why=no), None
        yield candidate, call


def _original_cost(q: _Question, sizes: Mapping[str, int]) -> Cost | None:
    """The predicted time of the model's own code; None where a size of the cascade has no value to predict with."""
    try:
        if q.written is None:
            return predict_original(q.cascade, q.device, sizes)
        cost = predict_vendor(q.cascade, _original_use(q, q.written, sizes), q.device, sizes)
    except ValueError:
        return None
    return cost if isinstance(cost, Cost) else None


def _written(f: Found) -> VendorUse | None:
    """How the model itself calls SDPA, if that is what it does; the mask that it passes is made once for many layers."""
    if op_name(f.final) != "scaled_dot_product_attention":
        return None
    given = arguments(f.final)
    mask = given["attn_mask"]
    if not isinstance(mask, fx.Node):
        return VendorUse("", skips=bool(given["is_causal"]))
    value = mask.meta["val"]
    return VendorUse("", False, math.prod(splice.hint(s) for s in value.shape), DTYPE_NAME[value.dtype])


def _original_use(q: _Question, written: VendorUse, sizes: Mapping[str, int]) -> VendorUse:
    """The model's own call with the kernel that torch would run for it."""
    made = vendor.sdpa(q.cascade)
    if isinstance(made, Refusal):
        return replace(written, backend="math", skips=False)
    mask = ex.load("mask", (), written.mask_dtype) if written.mask_elements else None
    able = vendor.backends(replace(made, mask=mask), q.device, sizes, gradients=q.gradients)
    backend = next(b for b, why in able.items() if not why)
    return replace(written, backend=backend, skips=written.skips and backend != "math")


def _refused(name: str, why: str) -> tuple[Candidate, None]:
    return Candidate(name, feasible=False, why=why), None


def _ours(q: _Question, sizes: Mapping[str, int]) -> tuple[Candidate, splice.Call | None]:
    name = "reattend"
    if q.gradients:
        return _refused(name, "our kernel has no backward yet, and gradients are wanted here")
    refusal = ""
    for mapping, predicted in _mappings(q, sizes):
        cost = predicted
        kernel = ours.build(q.cascade, mapping, q.device)
        if not isinstance(kernel, Refusal):
            break
        refusal = refusal or kernel.reason
    else:
        return _refused(name, refusal or _no_mapping(q, sizes))
    view = attention(q.cascade)
    assert isinstance(view, Attention)
    state = derive(view)
    passes = key_passes(stream(view, state)) if not isinstance(state, NoAttention) else None
    candidate = Candidate(
        name, passes=passes, cost=cost, mapping=mapping.to_text(), why=str(mapping), maker=lambda: str(kernel.source)
    )
    # Triton compiles at the first launch; what is printed for the CPU was loaded when it was built.
    return candidate, our_call(q.cascade, mapping, fragile=q.device.is_gpu and not q.traced)


def _mappings(q: _Question, sizes: Mapping[str, int]) -> Iterator[tuple[Tiling, Cost]]:
    """The best mapping by prediction; where no kernel can be built for it, the best of another body."""
    try:
        best = best_mapping(q.cascade, q.device, sizes)
    except ValueError:
        return
    if not isinstance(best, tuple):
        return
    yield best
    for body in ("sdpa", "product"):
        if q.device.kind == "cpu" and body != best[0].body:
            mapping = replace(best[0], body=body)
            cost = predict(q.cascade, mapping, q.device, sizes)
            if isinstance(cost, Cost):
                yield mapping, cost


def _no_mapping(q: _Question, sizes: Mapping[str, int]) -> str:
    try:
        best = best_mapping(q.cascade, q.device, sizes)
    except ValueError as no:
        return str(no)
    return best.reason if isinstance(best, NoAttention) else ""


def our_call(c: Cascade, mapping: Tiling, fragile: bool = False) -> splice.Call:
    """Our operator: tensors in the order of the cascade's inputs, then the sizes that no input tells."""
    names, sizes = [t.name for t in c.inputs], loose(c)
    text = ours.program_text(c, mapping)

    def arguments(tensors: Mapping[str, fx.Node], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in names], [size(s) for s in sizes], text

    return splice.Call("reattend", torch.ops.reattend.cascade.default, arguments, closed=False, fragile=fragile)


def _sdpa(q: _Question, sizes: Mapping[str, int]) -> tuple[Candidate, splice.Call | None]:
    return _vendor("sdpa", vendor.sdpa, q, sizes)


def _flex(q: _Question, sizes: Mapping[str, int]) -> tuple[Candidate, splice.Call | None]:
    return _vendor("flex", vendor.flex, q, sizes)


def _vendor(name: str, make: Any, q: _Question, sizes: Mapping[str, int]) -> tuple[Candidate, splice.Call | None]:
    """A vendor's function, with the kernel that it would run here; under a guard where only rows without a key differ."""
    made = make(q.cascade)
    conditions: tuple[Condition, ...] = ()
    if isinstance(made, Refusal):
        keyed = make(q.cascade, keyed=True)
        if isinstance(keyed, Refusal) or q.traced:
            return _refused(name, made.reason)
        view = attention(q.cascade)
        assert isinstance(view, Attention)
        made, conditions = keyed, (every_row_keeps_a_key(q.cascade, view),)
    try:
        use = vendor.use(made, q.device, sizes, gradients=q.gradients)
        cost = predict_vendor(q.cascade, use, q.device, sizes) if isinstance(use, VendorUse) else None
    except ValueError as no:
        return _refused(name, str(no))
    if isinstance(use, Refusal):
        return _refused(name, use.reason)
    if not isinstance(cost, Cost):
        return _refused(name, cost.reason if cost is not None else "it has no predicted time")
    fragile = name == "flex"
    if fragile and q.traced:
        return _refused(name, "it is compiled when it first runs, which cannot be guarded inside Inductor's graph")
    why = f"{use.backend} kernel" + (", which leaves masked tiles out" if use.skips else "")
    why += "".join(f", where {c.sentence}" for c in conditions)
    return Candidate(name, cost=cost, why=why, maker=lambda: made.source), vendor_call(made, conditions, fragile)


def vendor_call(made: vendor.VendorCall, conditions: tuple[Condition, ...] = (), fragile: bool = False) -> splice.Call:
    """A printed function as an ordinary call of the graph; its result lies in memory as our operator's does."""
    names, loose_sizes = made.inputs, made.sizes
    order = memory_order(made.cascade)
    back = [order.index(d) for d in range(len(order))]
    program = Program(made.cascade, Tiling(1, 1))

    def run(*given: Any) -> torch.Tensor:
        return made.function(*given).permute(order).contiguous().permute(back)

    def fake(*given: Any) -> torch.Tensor:
        return ours.allocate(program, given[: len(names)], given[len(names) :])

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return (*(tensors[n] for n in names), *(size(s) for s in loose_sizes))

    run.__name__ = made.name
    return splice.Call(made.name, run, arguments, fake=fake, conditions=conditions, fragile=fragile)


def bind_sizes(c: Cascade, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, int]:
    """Every symbol of a cascade from its inputs' shapes and the graph's scalars."""
    return infer_sizes(c, tensors, {name: int(v) for name, v in scalars.items() if name in c.free_symbols})


# --- the site's plain data ----------------------------------------------------------------------------------------


def _shape(c: Cascade, q: _Question) -> SiteShape:
    return SiteShape({r.name: r.size if isinstance(r.size, int) else str(r.size) for r in c.ranks}, q.dtype)


def _mask(a: Attention, c: Cascade, sizes: Mapping[str, int], order: tuple[Candidate, ...]) -> MaskView | None:
    mask = split(a.score, a.key)
    if mask.keep is ex.TRUE:
        return None
    text = next((x.mapping for x in order if x.name == "reattend" and x.mapping), "")
    tiling = Tiling.parse(text) if text else Tiling(64, 64)
    try:
        jobs = tiles_of(c, tiling, sizes)
    except ValueError:
        return MaskView(ex.show(mask.keep), 1.0)
    if isinstance(jobs, NoAttention) or jobs.map is None:
        return MaskView(ex.show(mask.keep), 1.0)
    m = jobs.map
    return MaskView(
        ex.show(mask.keep), m.density, TileCounts(tiling.tile_p, tiling.tile_m, m.total, m.visited, m.full, m.partial)
    )


_RULES = {
    "nan": "a row without a key gives NaN, as in the original",
    "uniform": "a row without a key gives the mean over all values, as in the original",
    "zero": "a row without a key gives 0, as in the original",
    "never": "no mask can leave a row without a key",
    "unmasked": "a row whose keys are all masked attends as if unmasked, as in the original",
}


def _guards(call: splice.Call | None) -> tuple[str, ...]:
    if call is None:
        return ()
    compiled = ("the kernel compiles where it first runs",) if call.fragile else ()
    return (*(c.sentence for c in call.conditions), *compiled)


def _proofs(a: Attention, q: _Question) -> tuple[str, ...]:
    out = [
        f"the weights are normalised over {a.key}, which the last product reduces",
        "keys and values are not written between their reads",
        _RULES[no_key_rule(a)],
    ]
    mask = split(a.score, a.key)
    if mask.keep is not ex.TRUE:
        static = all(not ex.loads(part) for part in conjuncts(mask.keep))
        out.append("the mask is a function of positions" if static else "part of the mask is read from run-time data")
    if not q.bound:
        out.append("nobody else reads scores or weights")
    return tuple(out)
