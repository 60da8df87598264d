"""Guards: conditions on run-time data under which a chosen call is exact, and the original subgraph where they fail.

    before   y = call(q, k, v)
    after    y = guarded((q, k, v), …)      call where every condition holds and the kernel can run, else the original

Shapes, types and modes need no guard here: Dynamo captures anew when they change.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.cascade import Access, Cascade, Einsum, bind
from ...patterns.cascade import Tensor as Shape
from ...patterns.evaluate import evaluate
from ...patterns.expr import Expr
from ...patterns.masks.split import runtime_classify, split
from ..capture.autocast import no_autocast
from ..check.gradient import saved_by_us
from ..check.watch import SiteWatch
from ..graph.aliases import Aliases
from ..graph.dropout import as_written, carry
from ..graph.same import said, signature
from ..graph.torch_private import checkpoint_ends, saved_tensors_are_hooked, tree_map
from . import flows as flows
from .derivatives import twice
from .race import Race

TILE = 64
_KEYED, _ADDED, _FINITE, _ALL_FINITE, _UNTRAINED = "keyed", "added", "finite", "all finite", "untrained"


@dataclass(frozen=True)
class Condition:
    """What must hold of the inputs: `holds(tensors by name, sizes by symbol)`.

    `rule`: by what name, and with what, it is made again for an attention (`condition`); empty where it cannot be.
    """

    sentence: str
    tensors: tuple[str, ...]
    sizes: tuple[str, ...]
    holds: Callable[[Mapping[str, Tensor], Mapping[str, int]], bool]
    rule: tuple[str, ...] = ()


def every_row_keeps_a_key(a: Attention) -> Condition:
    """Proved tile by tile from the mask and its run-time data; a row that is not proved to keep a key counts as empty.

    What the mask reads of the attention's prelude (a number of padded tokens) is computed for it.
    """
    c, keep = a.cascade, split(a.score, a.key).keep
    behind = _behind(a, keep)
    before, made, names = behind.before, behind.made, behind.names
    read = tuple(dict.fromkeys(str(x.attr) for x in ex.loads(keep)))
    ranks = {r: c.rank[r].size for r in {*keep.ranks, a.query, a.key}}
    symbols = tuple(s for s in c.free_symbols)

    def holds(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
        known = bind_shapes(c, tensors, sizes)
        extents = {r: int(bind(n, known)) for r, n in ranks.items()}
        data = {n: tensors[n].detach() for n in names}
        if made:
            data |= evaluate(replace(c, einsums=before, outputs=made), data, known)
        return _rows_are_keyed(keep, a, extents, known, {n: data[n] for n in read})

    return Condition("every row keeps a key", names or (c.inputs[0].name,), symbols, holds, (_KEYED,))


# What scores get added at most for the logarithm of a row's sum to keep, in float32, the digits that a backward needs.
LEVEL = 64.0


def every_row_is_added_to(a: Attention, within: float) -> Condition:
    """The largest number that each row's scores get added lies between −`within` and `within`; a mask adds its fill."""
    c = a.cascade
    zero = {ex.load(e.out.tensor, e.out.index, c.tensor[e.out.tensor].dtype): ex.const(0.0, "f32") for e in a.products}
    added = ex.substitute(a.score, zero)
    behind = _behind(a, added)
    rows = tuple(r for r in (*a.batch, a.query) if r in added.ranks)
    top = Einsum(Access("TOP", tuple(ex.index(r) for r in rows)), added, "max", (a.key,))
    shape = tuple(c.rank[r].size for r in rows)
    whole = replace(c, einsums=(*behind.before, top), outputs=("TOP",), tensors=(*c.tensors, Shape("TOP", shape)))

    def holds(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
        data = {n: tensors[n].detach() for n in behind.names}
        out = evaluate(whole, data, bind_shapes(c, tensors, sizes))["TOP"]
        return bool((out.abs() < within).all())

    return Condition(_within(within), behind.names, tuple(c.free_symbols), holds, (_ADDED, repr(within)))


def queries_and_keys_are_finite(a: Attention) -> Condition:
    """No NaN and no ∞ in what the products are made of."""
    names = tuple(dict.fromkeys(n for e in a.products for n in _behind(a, e.body).names))
    return Condition("queries and keys are finite", names, (), _finite(names), (_FINITE,))


def all_is_finite(a: Attention) -> Condition:
    """No NaN and no ∞ in anything that is read."""
    names = tuple(t.name for t in a.cascade.inputs if t.dtype in ex.FLOATS)
    return Condition("all that it reads is finite", names, (), _finite(names), (_ALL_FINITE,))


def _finite(names: Sequence[str]) -> Callable[[Mapping[str, Tensor], Mapping[str, int]], bool]:
    return lambda tensors, sizes: all(bool(tensors[n].detach().isfinite().all()) for n in names)


def needs_no_gradient(names: tuple[str, ...]) -> Condition:
    """Nobody wants the gradient of these tensors."""

    def holds(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bool:
        return not torch.is_grad_enabled() or not any(tensors[n].requires_grad for n in names)

    said = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} no gradient"
    return Condition(said, names, (), holds, (_UNTRAINED, *names))


def condition(rule: tuple[str, ...], a: Attention) -> Condition:
    """The condition of a rule. Raises ValueError for another rule than the ones here."""
    match rule:
        case (str(kind),) if kind == _KEYED:
            return every_row_keeps_a_key(a)
        case (str(kind), within) if kind == _ADDED:
            return every_row_is_added_to(a, float(within))
        case (str(kind),) if kind == _FINITE:
            return queries_and_keys_are_finite(a)
        case (str(kind),) if kind == _ALL_FINITE:
            return all_is_finite(a)
        case (str(kind), *names) if kind == _UNTRAINED and names:
            return needs_no_gradient(tuple(names))
    raise ValueError(f"no condition is made by the rule {rule}")


def _within(within: float) -> str:
    if math.isinf(within):
        return "no row's scores are all −∞ by what they get added"
    return f"the largest number that a row's scores get added lies within ±{within:g}"


@dataclass(frozen=True)
class _Behind:
    """What a term rests on: a part of the prelude, the tensors `made` there that it reads, and the inputs behind all."""

    before: tuple[Einsum, ...]
    made: tuple[str, ...]
    names: tuple[str, ...]


def _behind(a: Attention, term: Expr) -> _Behind:
    read = tuple(dict.fromkeys(str(x.attr) for x in ex.loads(term)))
    before = _upstream(a.prelude, read)
    made = tuple(n for n in read if n in {e.out.tensor for e in before})
    given = dict.fromkeys(str(x.attr) for e in before for x in e.reads if str(x.attr) not in a.cascade.producers)
    return _Behind(before, made, (*(n for n in read if n not in made), *(n for n in given if n not in read)))


def _upstream(einsums: Sequence[Einsum], names: Sequence[str]) -> tuple[Einsum, ...]:
    """Those of some Einsums in order that the named tensors depend on."""
    wanted, out = set(names), list[Einsum]()
    for e in reversed(einsums):
        if e.out.tensor in wanted:
            wanted |= {str(x.attr) for x in e.reads}
            out.append(e)
    return tuple(reversed(out))


def _rows_are_keyed(
    keep: Expr, a: Attention, extents: Mapping[str, int], sizes: Mapping[str, int], data: Mapping[str, Tensor]
) -> bool:
    on_device = any(t.device.type != "cpu" for t in data.values())
    arrays = data if on_device else {n: t.numpy() for n, t in data.items()}
    walk = runtime_classify(
        keep, query=a.query, key=a.key, extents=extents, symbols=sizes, tile_p=TILE, tile_m=TILE, arrays=arrays,
        xp=torch if on_device else np,
    )
    return bool(walk.certain.all())


def bind_shapes(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """Symbols from what is at hand: given sizes, and dimensions of the tensors that are symbols themselves."""
    known = {k: int(v) for k, v in sizes.items()}
    for t in c.inputs:
        if t.name in tensors:
            for size, actual in zip(t.shape, tensors[t.name].shape):
                if not isinstance(size, int) and size.is_Symbol:
                    known.setdefault(str(size), int(actual))
    return known


class Guarded(nn.Module):
    """A call with its conditions and the original subgraph. `fallbacks` counts, by name, how often the original ran.

    `once`: the call can be differentiated once; the original gives the second derivative, and with `one_flow` gradients of
    several flows at once.
    `written`: what runs in the call's place, where that is not what it is held against (dropout is drawn there).
    `known`: others may write to the memory of the result; where a backward may keep the kernel's, they get one of their own.
    A call that raises, or whose result the `watch` finds to differ from the original's, is not made again; nor is one that
    lost its `race`.
    """

    def __init__(
        self, name: str, target: Callable[..., Any], original: fx.GraphModule, conditions: Sequence[Condition],
        once: bool = False, watch: SiteWatch | None = None, race: Race | None = None,
        written: fx.GraphModule | None = None, one_flow: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.target, self.conditions = name, target, tuple(conditions)
        self.once, self.watch, self.race, self.one_flow = once, watch, race, one_flow
        self.known = False
        # what the call is held against, and what runs in its place
        self.original, self.written = original, as_written(original) if written is None else written
        self.fallbacks: Counter[str] = Counter()
        self.broken = ""
        self.lock = threading.Lock()

    def forward(
        self, arguments: Sequence[Any], inputs: Sequence[Any], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
    ) -> Any:
        if self.race is not None and not self.race.over and torch.is_grad_enabled() and saved_tensors_are_hooked():
            self.race.barred = True
        if not self.broken and not self.slower and (
            not self.conditions or all(c.holds(tensors, sizes) for c in self.conditions)
        ):
            out, why = self._attempt(arguments, inputs)
            if not why:
                return out
            self._step_aside(why)
        with self.lock:
            self.fallbacks[self.name] += 1
        return self.own(inputs)

    @property
    def slower(self) -> bool:
        """Has the call lost its race against the original?"""
        return self.race is not None and bool(self.race.lost)

    def own(self, inputs: Sequence[Any]) -> Any:
        """The original's result. Every cast that autocast made is written in it."""
        with no_autocast():
            return self.written(*inputs)

    def _step_aside(self, why: str) -> None:
        """Make no further call and say why, or raise where the watch is strict."""
        self.broken, watch = why, self.watch
        said = f"{self.name if watch is None else watch.site} keeps the original code: {why}"
        if watch is not None and watch.refuse is not None:
            raise watch.refuse(said)
        warnings.warn(f"reattend: {said}" + (f": {watch.advice}" if watch is not None else ""), stacklevel=3)

    def called(self, both: tuple[Sequence[Any], Sequence[Any]]) -> Any:
        """The call's result, given its arguments and the original's inputs, whatever holds of them."""
        return self._called(*both)

    def _called(self, arguments: Sequence[Any], inputs: Sequence[Any]) -> Any:
        if not torch.is_grad_enabled():
            return self.target(*arguments)
        out = (
            twice(self.target, arguments, self.original, inputs, self.one_flow) if self.once else self.target(*arguments)
        )
        if not self.known:
            return out
        return tree_map(lambda x: x.clone() if x.requires_grad else x, out)

    def _attempt(self, arguments: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, str]:
        """The call's result, and why it must not be used, if so.

        Where it is looked at in training, that is a call of its own: one that is not used has saved nothing for a backward
        that anybody counts (a checkpoint does). What it saves is detached: a result that its own backward holds lives on.
        """
        watch = self.watch
        tried = watch is not None and torch.is_grad_enabled() and watch.due(inputs)
        try:
            if tried:
                with saved_by_us():
                    out = self._called(arguments, inputs)
            else:
                out = self._called(arguments, inputs)
        except torch.OutOfMemoryError:
            raise
        except checkpoint_ends():
            # it has all that its backward needs
            raise
        except Exception as error:
            # A vendor's compiler may fail on what its checks let through: the model must not.
            lines = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {lines[0] if lines else ''}"
            if self.watch is not None:
                self.watch.raised(why)
            return None, why
        why = watch(self.original, self.target, arguments, inputs, out) if watch is not None else ""
        return self._called(arguments, inputs) if tried and not why else out, why


class Originals:
    """The own code of the attentions of a graph. Equal code is one module, whatever the nodes around it are called."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.aliases = gm, Aliases(gm.graph)
        self._known: dict[object, fx.GraphModule] = {}

    def of(
        self, output: fx.Node, interior: frozenset[fx.Node], further: Sequence[fx.Node] = ()
    ) -> tuple[fx.GraphModule, list[fx.Node]] | None:
        """The code of an attention as a module, and the nodes that it reads. With `further` outputs it answers a tuple.

        What shares memory with something outside and is written is no code to be run again: its value is read.

            before   q = linear(x); q.mul_(s); k = view(q)      after   given k

        None where such a value is written once more before the output, so that reading it late would differ.
        """
        aliases, outputs = self.aliases, (output, *further)
        foreign = _written_outside(self.gm.graph, aliases, {*interior, *outputs})
        inside = _needed(outputs, {*interior, *outputs} - foreign, aliases)
        members = set(inside)
        outside = list(dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in members))
        reads: dict[fx.Node, float] = {}
        for n in inside:
            for i in n.all_input_nodes:
                reads.setdefault(i, aliases.position[n])
        if foreign & set(outputs) or any(aliases.written_between(i, reads[i] - 1, output) for i in outside):
            return None
        return self._module(output if not further else outputs, inside, outside), outside

    def _module(
        self, output: fx.Node | tuple[fx.Node, ...], inside: list[fx.Node], outside: list[fx.Node]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        table: dict[fx.Node, fx.Node] = {}
        for i, n in enumerate(outside):
            table[n] = graph.placeholder(f"given_{i}")
            table[n].meta = dict(n.meta)
        for n in inside:
            table[n] = graph.node_copy(n, table.__getitem__)
            carry(n, table[n], table)
        graph.output(fx.map_arg(output, table.__getitem__))
        key = (said(graph), tuple(map(signature, outside)))
        if key not in self._known:
            self._known[key] = fx.GraphModule(self.gm, graph, "Original")
        return self._known[key]


def original_subgraph(
    gm: fx.GraphModule, output: fx.Node, interior: frozenset[fx.Node], further: Sequence[fx.Node] = ()
) -> tuple[fx.GraphModule, list[fx.Node]] | None:
    """The own code of one attention of a graph, as `Originals` has it."""
    return Originals(gm).of(output, interior, further)


def _written_outside(graph: fx.Graph, aliases: Aliases, inside: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The nodes inside whose memory is written and is known outside: running them again would write, or read, it again."""
    written = [n for n in inside if aliases.is_written(n)]
    shared = {aliases.storage(n) for n in graph.nodes if n not in inside} if written else ()
    return frozenset(n for n in written if aliases.storage(n) in shared)


def _needed(outputs: Sequence[fx.Node], members: Collection[fx.Node], aliases: Aliases) -> list[fx.Node]:
    """The members that the outputs rest on, and those that write what they read, in the graph's order."""
    seen: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        n = stack.pop()
        if n in members and n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
    return sorted(seen, key=aliases.position.__getitem__)
