"""The candidates of one attention: what each would cost on a device, what is spliced for it, and which one is chosen.

Everything here depends on the cascade, its sizes, the device and a few facts about its place (`Question`), so that identical
attentions are decided once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import fx

from ...codegen import operator as ours
from ...codegen import trained
from ...codegen.forms.form import rows_keep_a_key
from ...codegen.forms.program import Program, loose, memory_order
from ...codegen.vendor import use as vendor
from ...cost_model.count.expect import known
from ...cost_model.count.memory import AttentionMemory, memory
from ...cost_model.count.passes import key_passes
from ...cost_model.count.tiles import NOTHING, Data
from ...cost_model.devices.device import Device
from ...cost_model.sites.detail import detail
from ...cost_model.sites.picture import picture
from ...cost_model.sites.site import ORIGINAL, Candidate, MaskView, Site, SiteShape, TileCounts, ranked
from ...cost_model.time.cost import TOTAL, Cost
from ...cost_model.time.predict import (
    VENDORS,
    VendorUse,
    best_mapping,
    predict_original,
    predict_vendor,
    ranked_mappings,
    tiles_of,
)
from ...cost_model.words import seconds_text
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.rowstate import derive, stream
from ...patterns.attention.score import hiding
from ...patterns.attention.traits import kind, low_row_rule, no_key_rule, traits
from ...patterns.cascade import Cascade, Size, bind, show, to_text
from ...patterns.mapping import TileMapping
from ...patterns.masks.selection import Selection, selection
from ...patterns.masks.split import conjuncts, split
from ...patterns.verdict import Obstacle, Refusal
from ..splice import splice
from ..splice.guards import (
    LEVEL,
    Condition,
    all_is_finite,
    every_row_is_added_to,
    every_row_keeps_a_key,
    needs_no_gradient,
    queries_and_keys_are_finite,
)
from ..splice.race import TIMED_BYTES
from ..splice.recipe import Recipe
from . import several
from .policy import Policy


@dataclass(frozen=True)
class Question:
    """All that a decision depends on: equal questions have equal answers.

    `wanted`: the inputs of the cascade whose gradients flow on; None where none flows back through the output.
    `origins` names the inputs of the graph behind each tensor that the mask reads; `constants` has those that none reaches.
    `bare`: the model passes the mask of its call to a trace alone. `window`: so many keys are copied for each row.
    `several`: the cascade with what else is read of it.
    """

    cascade: Cascade
    sizes: tuple[tuple[str, int], ...]
    device: Device
    policy: Policy
    executable: bool
    wanted: tuple[str, ...] | None
    bound: str
    dtype: str
    written: VendorUse | None
    traced: bool
    origins: tuple[tuple[str, tuple[str, ...]], ...] = ()
    constants: Data = NOTHING
    bare: bool = False
    window: Size = 0
    several: Cascade | None = None

    @property
    def gradients(self) -> bool:
        return self.wanted is not None


@lru_cache(maxsize=1024)
def answer(q: Question) -> tuple[Site, Mapping[str, splice.Call]]:
    c, sizes = q.cascade, dict(q.sizes)
    view = attention(c)
    assert isinstance(view, Attention), view
    if why := _nothing(c, sizes):
        none = tuple(Candidate(n, feasible=False, why=why) for n in ("reattend", "sdpa", "flex"))
        candidates = (Candidate(ORIGINAL, why=why), *none)
        return Site("", "", kind(view), traits(view), _shape(c, q, sizes), None, (), (), candidates, ORIGINAL, show(c)), {}
    taken = known(c, view, sizes, q.policy.expectations, dict(q.origins), q.constants)
    found = list(_candidates(q, sizes, taken.data))
    calls: dict[str, splice.Call] = {candidate.name: call for candidate, call in found if call is not None}
    order = ranked(tuple(candidate for candidate, _ in found))
    permitted = [x for x in order if x.feasible and q.policy.permits(x)]
    first = next(iter(permitted), None) or next(x for x in order if x.feasible)
    chosen, held = first, _memory(view, c, sizes)
    window, keys = bind(q.window, sizes), bind(c.rank[view.key].size, sizes)
    if held is not None and isinstance(window, int) and isinstance(keys, int) and window and keys:
        # the model's own scores are of its windows alone
        held = replace(held, eager_bytes=held.eager_bytes * window // keys)
    doubted = _doubted(q, first, order, held)
    if doubted:
        chosen = next(x for x in order if x.is_original)
    order = tuple(replace(x, why=doubted or _why(x, order, q)) if x is chosen else x for x in order)
    said = _said(c)
    ours_text = next((x.mapping for x in order if x.is_tiled), "")
    site = Site(
        name="", where="", kind=said.kind, traits=said.traits, shape=_shape(c, q, sizes),
        mask=mask_view(view, c, sizes, order, taken.data), proofs=_proofs(view, q), guards=(), candidates=order,
        choice=chosen.name,
        cascade=said.text if q.several is None else show(q.several),
        chosen_cascade=said.one_pass_text if chosen.is_tiled else "",
        notes=taken.words, memory=held, eager=_eager_cost(q, sizes),
        detailer=cache(lambda: detail(c, said.one_pass, ours_text, sizes, taken.data)),
    )
    return site, calls


@dataclass(frozen=True)
class _Said:
    """What is said of a cascade whatever its sizes are. `rules`: how rows without a key end."""

    kind: str
    traits: frozenset[str]
    text: str
    one_pass: Cascade | None
    one_pass_text: str
    passes: int | None
    rules: tuple[str, ...]


@lru_cache(maxsize=512)
def _said(c: Cascade) -> _Said:
    a = attention(c)
    assert isinstance(a, Attention), a
    state = derive(a)
    one_pass = stream(a, state) if not isinstance(state, Obstacle) else None
    rules = sorted({no_key_rule(a), low_row_rule(a, _added(a))} - {"never"}) or ["never"]
    text, passes = (show(one_pass), key_passes(one_pass)) if one_pass is not None else ("", None)
    return _Said(kind(a), traits(a), show(c), one_pass, text, passes, tuple(rules))


def _doubted(q: Question, first: Candidate, order: tuple[Candidate, ...], held: AttentionMemory | None) -> str:
    """Why the model's own code stays where a kernel is predicted faster: nothing is timed in a graph that Inductor compiles,
    and on a CPU the kernel's time is known to its band. Whoever names kernels, or saves much memory by them, has them.
    """
    original = next((x for x in order if x.is_original and q.policy.permits(x)), None)
    if not q.traced or q.device.kind != "cpu" or first.is_original or original is None or q.policy.allow:
        return ""
    if held is None or held.eager_bytes > TIMED_BYTES or first.cost is None or original.cost is None:
        return ""
    if original.cost.seconds > first.cost.seconds * (1 + first.cost.band):
        return ""
    return f"{first.name} may be faster, which predictions cannot tell here and nothing times inside Inductor's graph"


def _nothing(c: Cascade, sizes: Mapping[str, int]) -> str:
    """What is said of an attention without an element; nothing of others."""
    empty = [r.name for r in c.ranks if bind(r.size, sizes) == 0]
    return f"there is nothing to compute: {' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} 0 long" if empty else ""


def _why(chosen: Candidate, order: tuple[Candidate, ...], q: Question) -> str:
    """Why this one: what it saves, or why nothing else may run."""
    others = [c for c in order if c.feasible and c.name != chosen.name]
    if chosen.is_original:
        if q.bound:
            return q.bound
        if others:
            return "predicted fastest"
        return "; ".join(f"{c.name}: {c.why}" for c in order if not c.feasible) or "nothing else is allowed"
    if others and others[0].cost is not None and chosen.cost is not None and chosen.cost.seconds > 0:
        ratio = others[0].cost.seconds / chosen.cost.seconds
        why = (
            f"{ratio:.2f}× faster than {others[0].name}{_saved(chosen.cost, others[0].cost)}"
            if ratio >= 1
            else "the fastest that the policy permits"
        )
        return f"{why}; {chosen.why}" if chosen.why else why
    return chosen.why


def _saved(mine: Cost, other: Cost) -> str:
    """The part of a time that makes most of a difference, where one does."""
    parts = [(other.parts.get(n, 0.0) - mine.parts.get(n, 0.0), n) for n in {*mine.parts, *other.parts} if n != TOTAL]
    most, name = max(parts, default=(0.0, ""))
    if most < 0.5 * (other.seconds - mine.seconds):
        return ""
    return f": {name} {seconds_text(mine.parts.get(name, 0.0))} for {seconds_text(other.parts.get(name, 0.0))}"


# --- candidates ---------------------------------------------------------------------------------------------------


def _candidates(
    q: Question, sizes: Mapping[str, int], data: Data
) -> Iterator[tuple[Candidate, splice.Call | None]]:
    if empty := [r.name for r in q.cascade.ranks if bind(r.size, sizes) == 0]:
        yield Candidate(ORIGINAL), None
        for name in ("reattend", "sdpa", "flex"):
            yield _refused(name, q.bound or f"rank {empty[0]} has no elements: there is nothing to compute")
        return
    # what it takes to copy windows, and to multiply with each, nobody has measured
    original = Candidate(ORIGINAL, cost=_original_cost(q, sizes) if q.window == 0 else None)
    yield original, None
    for candidate, call in kernels(q, sizes, data, original.seconds):
        if candidate.feasible and q.window != 0:
            candidate, call = _beside_windows(q, candidate, call)
        no = q.bound or ("" if q.policy.permits(candidate) else "the policy does not permit it")
        if no and candidate.feasible:
            candidate, call = replace(candidate, feasible=False, why=no), None
        yield candidate, call


def kernels(
    q: Question, sizes: Mapping[str, int], data: Data, rival: float
) -> tuple[tuple[Candidate, splice.Call | None], ...]:
    """What computes an attention beside its own code; `rival` is the predicted time of that."""
    if q.several is not None:
        made = several.candidate("reattend", q.several, q.device, sizes, data, q.wanted, q.traced)
        return made, _refused("sdpa", several.ALONE), _refused("flex", several.ALONE)
    sdpa = _sdpa(q, sizes, data)
    return _ours(q, sizes, data, min(rival, sdpa[0].seconds)), sdpa, _flex(q, sizes, data)


def _beside_windows(
    q: Question, candidate: Candidate, call: splice.Call | None
) -> tuple[Candidate, splice.Call | None]:
    """Under which a kernel whose tiles reach past a row's window gives what code does that reads the window alone.

    What is NaN or infinite there would meet weights of 0, and, in a backward, keys the weights of rows without one.
    """
    view = attention(q.cascade)
    assert isinstance(view, Attention)
    keep = split(view.score, view.key).keep
    more = [all_is_finite(view)]
    if q.gradients and keep is not ex.TRUE and rows_keep_a_key(view, keep):
        more.append(every_row_keeps_a_key(view))
    had = {y.sentence for y in call.conditions} if call is not None else set()
    more = [x for x in more if x.sentence not in had]
    if q.traced and more:
        where = f"it is right where {more[0].sentence}"
        return _refused(candidate.name, f"{where}, which cannot be guarded inside Inductor's graph")
    candidate = replace(candidate, why=", ".join(x for x in (candidate.why, *(f"where {x.sentence}" for x in more)) if x))
    if call is None:
        return candidate, None
    conditions = (*call.conditions, *more)
    recipe = replace(call.recipe, conditions=tuple(x.rule for x in conditions)) if call.recipe is not None else None
    return candidate, replace(call, conditions=conditions, recipe=recipe)


def _original_cost(q: Question, sizes: Mapping[str, int]) -> Cost | None:
    """The predicted time of the model's own code; None where a size of the cascade has no value to predict with."""
    try:
        if q.written is None:
            return predict_original(q.cascade, q.device, sizes, q.wanted, fusing=q.traced)
        cost = predict_vendor(q.cascade, _original_use(q, q.written, sizes), q.device, sizes, wanted=q.wanted)
    except ValueError:
        return None
    return cost if isinstance(cost, Cost) else None


def _eager_cost(q: Question, sizes: Mapping[str, int]) -> Cost | None:
    """The predicted time of the model's own call where nothing traces it, if it then passes no mask; else None.

    What a mask says beside the triangle (a window that is longer than the context was) needs one at other sizes.
    """
    made = vendor.sdpa(q.cascade) if q.bare and q.written is not None else None
    if q.written is None or made is None or isinstance(made, Refusal) or made.mask is not None:
        return None
    bare = replace(q.written, mask_elements=0, mask_dtype="b1", skips=made.causal)
    try:
        cost = predict_vendor(q.cascade, _original_use(q, bare, sizes), q.device, sizes, wanted=q.wanted)
    except ValueError:
        return None
    return cost if isinstance(cost, Cost) else None


def _original_use(q: Question, written: VendorUse, sizes: Mapping[str, int]) -> VendorUse:
    """The model's own call with the kernel that torch would run for it."""
    made = vendor.sdpa(q.cascade)
    if isinstance(made, Refusal):
        return replace(written, backend="math", skips=False)
    mask = ex.load("mask", (), written.mask_dtype) if written.mask_elements else None
    able = vendor.backends(replace(made, mask=mask), q.device, sizes, gradients=q.gradients)
    backend = next(b for b, why in able.items() if not why)
    return replace(written, backend=backend, skips=written.skips and not VENDORS[backend].eager)


def _refused(name: str, why: str) -> tuple[Candidate, None]:
    return Candidate(name, feasible=False, why=why), None


# Other bodies fit, which are no candidates where gradients are wanted.
_NO_BACKWARD = "its fused body, which alone has a backward, has no tiling here"


def _ours(
    q: Question, sizes: Mapping[str, int], data: Data, rival: float = math.inf
) -> tuple[Candidate, splice.Call | None]:
    """Our kernel; `rival` is the least time of what runs without a compiler and is not ours."""
    name = "reattend"
    found = _mappings(q, sizes, data)
    if q.gradients:
        found = [x for x in found if x[0].body in trained.BODIES]
    # who names our kernel for training has a step to wait for, not a call
    order, held = (found, "") if q.gradients and name in q.policy.allow else _paid_back(found, rival)
    refusal = ""
    for mapping, predicted in order:
        cost = predicted
        kernel = _trained(q, mapping) if q.wanted is not None else ours.build(q.cascade, mapping, q.device)
        if not isinstance(kernel, Refusal):
            break
        refusal = refusal or kernel.reason
    else:
        return _refused(name, refusal or _no_mapping(q, sizes) or _NO_BACKWARD)
    view = attention(q.cascade)
    assert isinstance(view, Attention)
    why = "; ".join(s for s in (str(mapping), held or refusal) if s)
    candidate = Candidate(
        name, passes=_said(q.cascade).passes, cost=cost, mapping=mapping.to_text(), why=why, maker=lambda: str(kernel.source)
    )
    # Triton and the fused body compile at the first launch; what else is printed for the CPU was loaded when it was built.
    compiles = q.device.is_gpu or mapping.is_compiled
    if not isinstance(kernel, trained.TrainedKernel):
        return candidate, our_call(q.cascade, mapping, fragile=compiles and not q.traced)
    rows = _nan_rows_have_gradients(view)
    if rows and q.traced:
        return _refused(name, f"it is trained where {rows[0].sentence}, which cannot be guarded inside Inductor's graph")
    conditions = (*((needs_no_gradient(kernel.without),) if kernel.without else ()), *rows)
    why = "; ".join((candidate.why, *(f"where {x.sentence}" for x in conditions)))
    call = our_trained_call(q.cascade, mapping, conditions, fragile=compiles and not q.traced, once=not q.traced)
    return replace(candidate, why=why), call


def _trained(q: Question, mapping: TileMapping) -> trained.TrainedKernel | Refusal:
    """The kernel with its backward, where that gives every gradient that is wanted: in Inductor's graph all that may be."""
    made = trained.build(q.cascade, mapping, q.device)
    if isinstance(made, Refusal):
        return made
    lacking = [n for n in made.without if q.traced or n in (q.wanted or ())]
    if lacking:
        need = "may need" if q.traced else "needs" if len(lacking) == 1 else "need"
        why = f"the {mapping.body} body's backward gives no gradient of {', '.join(lacking)}, which {need} one"
        return Refusal(mapping.body, why)
    return made


def _nan_rows_have_gradients(a: Attention) -> tuple[Condition, ...]:
    """Under which no row is NaN that the model sets to 0: autograd's gradients of such a row are NaN, a kernel's are 0."""
    if not any(e.op == "isnan" for e in ex.walk(a.weight, a.finish)):
        return ()
    keep = split(a.score, a.key).keep
    masked = (every_row_keeps_a_key(a),) if keep is not ex.TRUE and rows_keep_a_key(a, keep) else ()
    return (*masked, *((every_row_is_added_to(a, math.inf),) if _added(a) else ()))


def _mappings(q: Question, sizes: Mapping[str, int], data: Data) -> list[tuple[TileMapping, Cost]]:
    """The best mapping of every body by prediction, best first: where no kernel can be built for one, the next may do."""
    try:
        found = ranked_mappings(q.cascade, q.device, sizes, data, q.wanted)
    except ValueError:
        return []
    best: dict[str, tuple[TileMapping, Cost]] = {}
    for mapping, cost in () if isinstance(found, Obstacle) else found:
        if not q.gradients or mapping.split_m == 1:
            best.setdefault(mapping.body, (mapping, cost))
    return list(best.values())


def _paid_back(found: list[tuple[TileMapping, Cost]], rival: float) -> tuple[list[tuple[TileMapping, Cost]], str]:
    """Mappings in the order in which they are tried, and what is said of one that does not pay for its compilation."""
    compiled = [(m, c) for m, c in found if m.is_compiled]
    others = [(m, c) for m, c in found if not m.is_compiled]
    if not compiled:
        return found, ""
    saved = min([rival, *(c.seconds for _, c in others[:1])]) - compiled[0][1].seconds
    if saved >= several.PAYBACK_SECONDS:
        return found, ""
    said = f"the {compiled[0][0].body} body would save {saved * 1e3:.2g} ms a call, which does not pay for its compilation"
    return [*others, *compiled], said if saved > 0 else ""


def _no_mapping(q: Question, sizes: Mapping[str, int]) -> str:
    """Why no mapping is there to be tried."""
    try:
        best = best_mapping(q.cascade, q.device, sizes)
    except ValueError as no:
        return str(no)
    return best.reason if isinstance(best, Obstacle) else ""


def our_call(c: Cascade, mapping: TileMapping, fragile: bool = False) -> splice.Call:
    """Our operator: tensors in the order of the cascade's inputs, then the sizes that no input tells."""
    names, sizes = [t.name for t in c.inputs], loose(c)
    text = ours.program_text(c, mapping)

    def arguments(tensors: Mapping[str, fx.Node], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in names], [size(s) for s in sizes], text

    recipe = Recipe("ours", to_text(c), mapping.to_text())
    target = torch.ops.reattend.cascade.default
    return splice.Call("reattend", target, arguments, closed=False, fragile=fragile, recipe=recipe)


def our_trained_call(
    c: Cascade, mapping: TileMapping, conditions: tuple[Condition, ...], fragile: bool, once: bool
) -> splice.Call:
    """Our operator with its backward; the original stands by for a second derivative and for a compiler that fails."""
    recipe = Recipe("trained", to_text(c), mapping.to_text(), conditions=tuple(x.rule for x in conditions))
    return replace(
        our_call(c, mapping), target=trained.call, fragile=fragile, once=once, conditions=conditions, recipe=recipe
    )


def _sdpa(q: Question, sizes: Mapping[str, int], data: Data) -> tuple[Candidate, splice.Call | None]:
    return _vendor("sdpa", vendor.sdpa, q, sizes, data)


def _flex(q: Question, sizes: Mapping[str, int], data: Data) -> tuple[Candidate, splice.Call | None]:
    return _vendor("flex", vendor.flex, q, sizes, data)


def _vendor(
    name: str, make: Any, q: Question, sizes: Mapping[str, int], data: Data
) -> tuple[Candidate, splice.Call | None]:
    """A vendor's function, with the kernel that it would run here; under a guard where only rows without a key differ."""
    made = make(q.cascade)
    view = attention(q.cascade)
    assert isinstance(view, Attention)
    conditions, keyed = _row_conditions(q, view), isinstance(made, Refusal)
    if isinstance(made, Refusal):
        under = make(q.cascade, keyed=True)
        if isinstance(under, Refusal) or q.traced:
            return _refused(name, made.reason)
        first = every_row_keeps_a_key(view)
        made, conditions = under, (first, *(c for c in conditions if c.sentence != first.sentence))
    if made.compiled and q.device.kind == "cpu":
        # the compiled kernel takes a row with a NaN for one without a key, and gives it 0
        conditions = (*conditions, queries_and_keys_are_finite(view))
    if conditions and q.traced:
        return _refused(name, f"it is right where {conditions[0].sentence}, which cannot be guarded inside Inductor's graph")
    try:
        use = vendor.use(made, q.device, sizes, gradients=q.gradients)
        cost = predict_vendor(q.cascade, use, q.device, sizes, data, q.wanted) if isinstance(use, VendorUse) else None
    except ValueError as no:
        return _refused(name, str(no))
    if isinstance(use, Refusal):
        return _refused(name, use.reason)
    if not isinstance(cost, Cost):
        return _refused(name, cost.reason if cost is not None else "it has no predicted time")
    if made.compiled and q.traced:
        return _refused(name, "it is compiled when it first runs, which cannot be guarded inside Inductor's graph")
    why = f"{use.backend} kernel" + (", which leaves masked tiles out" if use.skips else "")
    why += "".join(f", where {c.sentence}" for c in conditions)
    # Inductor differentiates a graph once, whatever is in it; and what the model calls itself has the model's derivatives
    once = q.gradients and not q.traced and q.written is None
    recipe = Recipe(name, to_text(q.cascade), keyed=keyed, conditions=tuple(x.rule for x in conditions))
    call = replace(vendor_call(made, conditions, once), recipe=recipe)
    return Candidate(name, cost=cost, why=why, maker=lambda: made.source), call


def _row_conditions(q: Question, a: Attention) -> tuple[Condition, ...]:
    """Under which a vendor's function ends rows, and differentiates them, as the model's own operators do.

    It gives rows whose scores are all −∞ a 0. Its backward rests on max + log(sum) of a row: a fill that is all a row
    holds swallows the logarithm. Where the model itself calls it, these are the model's ways.
    """
    if q.written is not None:
        return ()
    added = _added(a)
    if q.gradients:
        if added:
            return (every_row_is_added_to(a, LEVEL),)
        keep = split(a.score, a.key).keep
        return (every_row_keeps_a_key(a),) if keep is not ex.TRUE and rows_keep_a_key(a, keep) else ()
    if low_row_rule(a, added) in ("never", "zero"):
        return ()
    return (every_row_is_added_to(a, math.inf),)


def _added(a: Attention) -> tuple[ex.Expr, ...]:
    """Run-time data that scores get added where no mask that stands in the terms hides them."""
    products = {e.out.tensor for e in a.products}
    return tuple(x for x in hiding(split(a.score, a.key).full, a.key) if str(x.attr) not in products)


def vendor_call(made: vendor.VendorCall, conditions: tuple[Condition, ...] = (), once: bool = False) -> splice.Call:
    """A printed function as an ordinary call of the graph; its result lies in memory as our operator's does."""
    names, loose_sizes = made.inputs, made.sizes
    order = memory_order(made.cascade)
    back = [order.index(d) for d in range(len(order))]
    program = Program(made.cascade, TileMapping(1, 1))

    def run(*given: Any) -> torch.Tensor:
        out = made.function(*given)
        # as it lies, a view of nothing: of a view that was made without gradients autograd refuses writes with them
        return out.contiguous() if list(order) == sorted(order) else out.permute(order).contiguous().permute(back)

    def fake(*given: Any) -> torch.Tensor:
        return ours.allocate(program, given[: len(names)], given[len(names) :])

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return (*(tensors[n] for n in names), *(size(s) for s in loose_sizes))

    run.__name__ = made.name
    return splice.Call(made.name, run, arguments, fake=fake, conditions=conditions, fragile=made.compiled, once=once)


# --- the site's plain data ----------------------------------------------------------------------------------------


def _shape(c: Cascade, q: Question, sizes: Mapping[str, int]) -> SiteShape:
    bound = {r.name: bind(r.size, sizes) for r in c.ranks if not isinstance(r.size, int)}
    at = {r: n for r, n in bound.items() if isinstance(n, int)}
    return SiteShape(_size_texts(c), q.dtype, at)


@lru_cache(maxsize=512)
def _size_texts(c: Cascade) -> Mapping[str, int | str]:
    return {r.name: r.size if isinstance(r.size, int) else str(r.size) for r in c.ranks}


def _memory(a: Attention, c: Cascade, sizes: Mapping[str, int]) -> AttentionMemory | None:
    """None where a size of the cascade has no value."""
    try:
        return memory(a, c, sizes)
    except ValueError:
        return None


def mask_view(
    a: Attention, c: Cascade, sizes: Mapping[str, int], order: tuple[Candidate, ...], data: Data
) -> MaskView | None:
    mask = split(a.score, a.key)
    if mask.keep is ex.TRUE:
        return None
    if (chosen := selection(a, mask.keep)) is not None:
        return MaskView(ex.show(mask.keep), _named(chosen, c, sizes, a.key))
    text = next((x.mapping for x in order if x.is_tiled), "")
    tiling = TileMapping.parse(text) if text else TileMapping(64, 64)
    try:
        jobs = tiles_of(c, tiling, sizes, data)
    except ValueError:
        return MaskView(ex.show(mask.keep), 1.0)
    n = jobs.tally if not isinstance(jobs, Obstacle) else None
    if n is None:
        return MaskView(ex.show(mask.keep), 1.0)
    counts = TileCounts(tiling.tile_p, tiling.tile_m, n.total, n.visited, n.full, n.partial)
    paint = cache(lambda: picture(c, tiling, sizes, data))
    return MaskView(ex.show(mask.keep), n.visited / max(n.total, 1), counts, painter=paint)


def _named(chosen: Selection, c: Cascade, sizes: Mapping[str, int], key: str) -> float:
    """The share of the keys that a row names; 1 where a size has no value."""
    slots, keys, first = (bind(n, sizes) for n in (c.rank[chosen.slot].size, c.rank[key].size, chosen.first))
    if not (isinstance(slots, int) and isinstance(keys, int) and isinstance(first, int) and keys):
        return 1.0
    return min(1.0, (first + slots * chosen.block) / keys)


_RULES = {
    "nan": "a row without a key gives NaN, as in the original",
    "uniform": "a row without a key gives the mean over all values, as in the original",
    "zero": "a row without a key gives 0, as in the original",
    "never": "no mask can leave a row without a key",
    "unmasked": "a row whose keys are all masked attends as if unmasked, as in the original",
    "varies": "what a row without a key gives depends on data, as in the original",
}


def guard_sentences(call: splice.Call | None) -> tuple[str, ...]:
    if call is None:
        return ()
    compiled = ("the kernel compiles where it first runs",) if call.fragile else ()
    return (*(c.sentence for c in call.conditions), *compiled)


_NOBODY = "nobody else reads scores or weights"


def _proofs(a: Attention, q: Question) -> tuple[str, ...]:
    out = [
        f"the weights are normalised over {a.key}, which the last product reduces",
        "keys and values are not written between their reads",
        *(_RULES[r] for r in _said(q.cascade).rules),
    ]
    mask = split(a.score, a.key)
    if mask.keep is not ex.TRUE:
        chosen = selection(a, mask.keep)
        if chosen is not None:
            out.append(f"{chosen.slots} names a row's keys: a key that is named twice counts once")
        static = all(not ex.loads(part) for part in conjuncts(chosen.rest if chosen is not None else mask.keep))
        out.append("the mask is a function of positions" if static else "part of the mask is read from run-time data")
    if not q.bound:
        more = ", ".join(q.several.outputs[1:]) if q.several is not None else ""
        out.append(f"what else reads scores or weights is computed with them: {more}" if more else _NOBODY)
    return tuple(out)
