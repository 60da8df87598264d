"""Methods as candidates of one attention: each a cascade of its own, computed by any kernel that can, under its conditions.

    attention ─ method → cascade ─ kernels → the fastest of them, as a candidate by the method's name      not exact

A method is never chosen here: what is installed was measured (`Installed`), and is named site by site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codegen import operator as ours
from ...codegen.forms.form import rows_keep_a_key
from ...codegen.forms.program import loose
from ...cost_model.count.expect import Expect, known
from ...cost_model.report.trade_off import TradeOff
from ...cost_model.sites.error import MeasuredError
from ...cost_model.sites.site import Candidate, MaskView, Site, ranked
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict_selection
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.attention.rowstate import derive, stream
from ...patterns.cascade import bind, show, size_term
from ...patterns.evaluate import DTYPE
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.masks.split import split
from ...patterns.methods.method import Method, Replacement
from ...patterns.verdict import Obstacle, Refusal
from ..graph.liveness import ARITHMETIC
from ..splice import splice
from ..splice.guards import Condition, bind_shapes, every_row_keeps_a_key
from .candidates import Question, kernels, mask_view
from .ground import Ground


@dataclass(frozen=True, eq=False)
class Approximation:
    """A method at one attention: the candidate, what it is spliced as, and what it computes, where it can run.

    `question`: what it is an answer to.
    """

    method: Method
    candidate: Candidate
    call: splice.Call | None = None
    made: Replacement | None = None
    mask: MaskView | None = None
    one_pass: str = ""
    question: Question | None = None

    def expecting(self, share: float) -> Approximation:
        """The same where its tables keep this share of their cells: another time, and perhaps other tiles."""
        return self if self.question is None else _approximation(self.question, self.method, share, self.candidate.name)

    @property
    def view(self) -> Attention:
        """What is computed."""
        assert self.made is not None
        view = attention(self.made.cascade)
        assert isinstance(view, Attention), view
        return view

    def tensors(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """All inputs of the cascade from those of the attention: its own are made."""
        assert self.made is not None
        return {**given, **self.made.make(torch, given, sizes)}


# What follows where a row's keys are chosen by later tokens as well.
AHEAD = "what a row keeps depends on later tokens: over a cached prefix rows are others than in a prompt of one piece"
# By site and a method's name, the method with the parameters that a calibration found for it there, or why it found none.
Fitted = Mapping[tuple[str, str], Method | Refusal]


@dataclass(frozen=True)
class Installed:
    """What a calibration found: the method by name at each site that has one, and the errors by site and method.

    `max_error` is the budget, `whole` the measured error of the whole model with all of it, on the examples held out.
    `said` tells a reader of it. `kinds`: what was measured at each site (`kind_of`). `ground` is the model that was.
    `fitted` has methods whose parameters differ from site to site, `curve` what was tried.
    """

    chosen: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[tuple[str, str], MeasuredError] = field(default_factory=dict)
    max_error: float = 0.0
    whole: float = 0.0
    said: tuple[str, ...] = ()
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    ground: Ground | None = None
    fitted: Fitted = field(default_factory=dict)
    curve: tuple[TradeOff, ...] = ()


def kind_of(site: Site) -> str:
    """What an error measured at a site is of: another place, type or mask under the same name is another attention."""
    return " ".join((site.where, site.shape.dtype, *sorted(site.traits)))


def methods_at(q: Question, site: Site, installed: Installed | None) -> tuple[Approximation, ...]:
    """The policy's methods at an attention, in its order, with the errors that were measured there."""
    question = replace(q, policy=q.policy.exactly)
    known = installed if installed is not None else Installed()
    measured = [known.errors.get((site.name, str(m))) for m in q.policy.methods]
    found = []
    for m, e in zip(q.policy.methods, measured):
        here = known.fitted.get((site.name, str(m)), m)
        if isinstance(here, Refusal):
            found.append(Approximation(m, Candidate(str(m), exact=False, feasible=False, why=here.reason)))
        else:
            found.append(_approximation(question, here, e.kept if e is not None else None, str(m)))
    return tuple(replace(m, candidate=replace(m.candidate, error=e)) for m, e in zip(found, measured))


def with_methods(
    q: Question, site: Site, calls: Mapping[str, splice.Call], installed: Installed | None, wished: str = ""
) -> tuple[Site, Mapping[str, splice.Call]]:
    """The site with the policy's methods among its candidates.

    One is chosen where a calibration found it, at lengths at which its error was measured, and else only if `wished`.
    """
    methods = methods_at(q, site, installed)
    site = replace(site, candidates=ranked((*site.candidates, *(m.candidate for m in methods))))
    calls = {**calls, **{m.candidate.name: m.call for m in methods if m.call is not None}}
    name = wished or (installed.chosen.get(site.name, "") if installed is not None else "")
    chosen = next((m for m in methods if m.candidate.name == name), None)
    if chosen is None or chosen.call is None:
        return site, calls
    error, view = chosen.candidate.error, attention(q.cascade)
    assert isinstance(view, Attention), view
    said = f"{name} is approximate: " + (f"it changes this attention's output by {error}" if error else "not measured")
    said += f"; here it is {chosen.method}" if str(chosen.method) != name else ""
    if error is not None:
        rows, keys = (bind(view.cascade.rank[r].size, dict(q.sizes)) for r in (view.query, view.key))
        if not (isinstance(rows, int) and isinstance(keys, int) and error.covers(rows, keys)):
            return replace(site, notes=(*site.notes, f"{name} was not measured with {rows} queries and {keys} keys")), calls
        if installed is not None and (kind := kind_of(site)) not in installed.kinds.get(site.name, ()):
            return replace(site, notes=(*site.notes, f"{name} was not measured of the attention at {kind}")), calls
        if (within := measured_lengths(view, error)) is not None:
            calls = {**calls, name: replace(chosen.call, conditions=(*chosen.call.conditions, within))}
        if installed is not None and installed.ground is not None:
            call = calls[name]
            calls = {**calls, name: replace(call, conditions=(*call.conditions, installed.ground.condition))}
        said += f"; {error.mass}" if error.mass is not None else ""
    ahead = (f"{name}: {chosen.made.ahead}, so that {AHEAD}",) if chosen.made is not None and chosen.made.ahead else ()
    notes = (*site.notes, said, *ahead)
    return replace(site, choice=name, mask=chosen.mask, chosen_cascade=chosen.one_pass, notes=notes), calls


@lru_cache(maxsize=1024)
def _approximation(q: Question, method: Method, share: float | None, name: str) -> Approximation:
    """`share` of their cells that tables were seen to keep; None: what the method expects. `name` is the candidate's."""

    def no(why: str) -> Approximation:
        return Approximation(method, Candidate(name, exact=False, feasible=False, why=why))

    view = attention(q.cascade)
    assert isinstance(view, Attention), view
    if q.bound:
        return no(q.bound)
    if q.gradients:
        return no("its error is measured on results: nothing is known of its gradients")
    made = method.replace(view)
    if isinstance(made, Refusal):
        return no(made.reason)
    changed = attention(made.cascade)
    if isinstance(changed, Obstacle):
        return no(f"no kernel computes it: {changed.reason}")
    own = [t.name for t in made.cascade.inputs if t.name not in view.cascade.tensor and t.name not in made.own]
    if own:
        return no(f"its inputs {', '.join(own)} are learned, and come with a calibration")
    conditions, of_table = _conditions(changed, made)
    if conditions and q.traced:
        return no(f"it is right where {conditions[0].sentence}, which cannot be guarded inside Inductor's graph")
    sizes = dict(q.sizes)
    if made.direct is not None:
        return _directly(method, made, changed, conditions, sizes, q, name)
    asked = replace(q, cascade=made.cascade, written=None, bare=False)
    density = made.density if share is None else share
    expected = (Expect(made.table, "share", (density,), False),) if made.program is not None and density is not None else ()
    taken = known(made.cascade, changed, sizes, (*expected, *q.policy.expectations), dict(q.origins), q.constants)
    # who calibrates waits for a compiler as well
    found = kernels(asked, sizes, taken.data, math.inf)
    able = [(c, call) for c, call in found if c.feasible and call is not None and q.policy.permits(c)]
    # what is made in front of a kernel is made in front of our operator alone
    able = [(c, call) for c, call in able if not made.own or c.is_tiled]
    if not able:
        return no("; ".join(f"{c.name}: {c.why or 'the policy does not permit it'}" for c, _ in found))
    inner, call = min(able, key=lambda x: x[0].seconds)
    mask = mask_view(changed, made.cascade, sizes, (inner,), taken.data)
    candidate = replace(
        _selected(inner, made, sizes, q), name=name, exact=False, why=f"{inner.name}: {inner.why}",
        density=mask.density if mask is not None else 1.0,
    )
    if made.own:
        call = _behind(call, made, candidate, of_table)
    fragile = call.fragile or bool(made.own)
    call = replace(call, name=name, conditions=(*call.conditions, *conditions), recipe=None, fragile=fragile)
    state = derive(changed)
    one_pass = show(stream(changed, state)) if not isinstance(state, Obstacle) else ""
    return Approximation(method, candidate, call, made, mask, one_pass if inner.is_tiled else "", q)


def _directly(
    method: Method, made: Replacement, view: Attention, conditions: tuple[Condition, ...], sizes: Mapping[str, int],
    q: Question, name: str,
) -> Approximation:
    """A method that says itself how it is computed."""
    assert made.direct is not None
    c, work = made.cascade, made.direct.work(sizes)
    seconds = predict_selection(work, q.device)
    cost = Cost(seconds, "launch", int(work.flops), int(work.bytes), int(work.exps), {"operators": seconds})
    if made.own:
        cost = replace(cost, seconds=seconds + predict_selection(made.work(sizes), q.device))
    given = [t.name for t in c.inputs if t.name not in made.own]
    symbols = c.free_symbols
    direct = made.direct

    def run(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        named = dict(zip(given, tensors))
        at = bind_shapes(c, named, dict(zip(symbols, sizes)))
        out: Tensor = direct.run(torch, {**named, **made.make(torch, named, at)}, at)
        return out

    def fake(tensors: Sequence[Tensor], sizes: Sequence[Any]) -> Tensor:
        at = bind_shapes(c, dict(zip(given, tensors)), dict(zip(symbols, sizes)))
        (last,) = c.producers[c.outputs[0]]
        return tensors[0].new_empty([bind(c.rank[str(i.attr)].size, at) for i in last.out.index])

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in given], [size(s) for s in symbols]

    call = splice.Call(name, run, arguments, fake=fake, conditions=conditions, fragile=True)
    candidate = Candidate(name, exact=False, cost=cost, why="operators of torch, chunk by chunk")
    mask = mask_view(view, c, sizes, (candidate,), known(c, view, sizes, (), dict(q.origins), q.constants).data)
    return Approximation(method, candidate, call, made, mask, "", q)


def _conditions(method: Attention, made: Replacement) -> tuple[tuple[Condition, ...], tuple[Condition, ...]]:
    """Under which the method leaves no row without a key: of what is given, and of the table; none where it is proved."""
    keep = split(method.score, method.key).keep
    if keep is ex.TRUE or not rows_keep_a_key(method, keep):
        return (), ()
    keyed = every_row_keeps_a_key(method)
    if made.program is None or made.table not in keyed.tensors:
        return (keyed,), ()
    return (), () if made.program.keyed else (keyed,)


def _selected(inner: Candidate, made: Replacement, sizes: Mapping[str, int], q: Question) -> Candidate:
    """The candidate with the time of its selection, which runs first."""
    if not made.own or inner.cost is None:
        return inner
    seconds, cost = predict_selection(made.work(sizes), q.device), inner.cost
    parts = {**cost.parts, "selection": seconds}
    return replace(inner, cost=replace(cost, seconds=cost.seconds + seconds, parts=parts))


def _behind(call: splice.Call, made: Replacement, inner: Candidate, conditions: Sequence[Condition]) -> splice.Call:
    """Our operator behind what makes its own inputs. Raises RuntimeError where a table breaks a condition."""
    c = made.cascade
    given = [t.name for t in c.inputs if t.name not in made.own]
    read = [*given, *(n for n in made.reads if n not in given)]
    order, open_, symbols = [t.name for t in c.inputs], loose(c), c.free_symbols
    text = ours.program_text(c, TileMapping.parse(inner.mapping))

    def run(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        named = dict(zip(read, tensors))
        at = bind_shapes(c, named, dict(zip(symbols, sizes)))
        named |= made.make(torch, named, at)
        for condition in conditions:
            if not condition.holds(named, at):
                raise RuntimeError(f"with the table that was selected it is not so that {condition.sentence}")
        out: Tensor = torch.ops.reattend.cascade.default([named[n] for n in order], [at[n] for n in open_], text)
        return out

    def fake(tensors: Sequence[Tensor], sizes: Sequence[Any]) -> Tensor:
        named, at = dict(zip(read, tensors)), dict(zip(symbols, sizes))
        for name in made.own:
            shape = [_size(size_term(n), at) for n in c.tensor[name].shape]
            named[name] = tensors[0].new_empty(shape, dtype=DTYPE[c.tensor[name].dtype])
        out: Tensor = torch.ops.reattend.cascade.default([named[n] for n in order], [at[n] for n in open_], text)
        return out

    def arguments(tensors: Mapping[str, Any], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in read], [size(s) for s in symbols]

    return replace(call, target=run, fake=fake, arguments=arguments)


def _size(e: Expr, at: Mapping[str, Any]) -> Any:
    """A size where the symbols are numbers of a trace, which may be open (and have no hash, as `bind` wants one)."""
    match e.op:
        case "const":
            return int(e.value)
        case "symbol":
            return at[str(e.attr)]
    return ARITHMETIC[e.op](*(_size(x, at) for x in e.args))


def measured_lengths(a: Attention, error: MeasuredError) -> Condition | None:
    """The lengths of a call lie between those at which the method was measured; None where sizes are fixed, and do."""
    rows, keys = (a.cascade.rank[r].size for r in (a.query, a.key))
    if isinstance(rows, int) and isinstance(keys, int):
        return None
    symbols, c = a.cascade.free_symbols, a.cascade

    def holds(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
        at = bind_shapes(c, tensors, sizes)
        return error.covers(*(int(bind(n, at)) for n in (rows, keys)))

    said = f"{error.queries[0]} to {error.queries[1]} queries meet {error.keys[0]} to {error.keys[1]} keys, as measured"
    return Condition(said, (c.inputs[0].name,), symbols, holds)
