"""Prints the holes of the row state: its start, one tile's step, and the merge of two states where keys are split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...patterns import expr as ex
from ...patterns.attention.rowstate import OLD, Carried, RowState
from ...patterns.expr import Expr
from ..forms.base2 import positive_factor
from ..forms.skip import null
from ..text.print_triton import number
from .device_function import DeviceFunction, KernelNames, Printed, coordinates, ragged
from .streaming import Streaming, variant


def printed(names: KernelNames, tile_m: int, split: bool) -> tuple[Printed, ...]:
    """The holes of the row state, with those for split keys."""
    parts = (_save(names), _restore(names), _join(names)) if split else ()
    return (_start(names), _step(names, tile_m), *parts)


def _start(names: KernelNames) -> Printed:
    f = DeviceFunction(names, "start", "BM: tl.constexpr", ())
    parts = [f"tl.full([BM, 1], {number(c.identity, 'f32')}, tl.float32)" for c in names.s.state.carried]
    f.body.line(f"return ({', '.join(parts)}{',' if len(parts) == 1 else ''})")
    return f.printed("The row state before the first key.")


def _step(names: KernelNames, tile_m: int) -> Printed:
    s = names.s
    m = names.ranks[s.key]
    f = DeviceFunction(
        names, "step", f"state, x, at, {m}, base, lane, inputs, sizes, PARTIAL: tl.constexpr", (*coordinates(s), s.key)
    )
    for i, c in enumerate(s.state.carried):
        f.body.line(f"{names.old[c.name]} = state[{i}]")
    for i, p in enumerate(s.products):
        f.body.line(f"{names.products[p.load]} = x[{i}]")
        f.body.bind(p.load, names.products[p.load])
    _StepWriter(f, tile_m).write()
    return f.printed("Take a tile of scores into the row state: new state, weights, factor of what was summed before.")


class _StepWriter:
    """The body of `step`: score, carried scalars in order, weight, correction of the accumulator."""

    def __init__(self, f: DeviceFunction, tile_m: int) -> None:
        self.f, self.body, self.names, self.s = f, f.body, f.names, f.names.s
        self.partial, self.full = self.s.state, variant(self.s, True)[1]
        self.ragged = ragged(self.s, tile_m)
        self.null = null(self.s.state, self.s.score, self.s.key) if self.ragged else None
        self.exists = f"{self.names.ranks[self.s.key]} < {self.f.size(self.s.key)}"
        if self.ragged:
            self.body.scope.guards = {self.s.key: self.exists}

    def write(self) -> None:
        self.score()
        self.body.count(_terms(self.partial))
        new = [self.carried(c, full) for c, full in zip(self.partial.carried, self.full.carried)]
        weight = self.element(self.partial.weight, self.full.weight, "w", 0.0)
        factor = self.partial.correction
        c = "1.0" if factor is None else self.body.let("c", factor)
        self.body.line(f"return ({', '.join(new)}{',' if len(new) == 1 else ''}), {weight}, {c}")

    def score(self) -> None:
        """Print the score under the name `s`, on partial tiles as the model wrote it."""
        s, body = self.s, self.body
        if s.score in body.memo and self.null is None:
            return
        name = body.fresh("s")
        # On full tiles every key exists, so that loads there need no mask.
        apart = s.mask.full is not s.score or (self.ragged and any(s.key in x.ranks for x in _tensors(s)))
        if not apart:
            body.count([s.score])
            body.line(f"{name} = {body.real(s.score)}")
        if apart or self.null is not None:
            with body.block("if PARTIAL:"):
                if apart:
                    body.count([s.score])
                    body.line(f"{name} = {body.real(s.score)}")
                if self.null is not None:
                    body.line(self.guard(name, self.null, name))
        if apart:
            with self.full_tile():
                body.count([s.mask.full])
                body.line(f"{name} = {body.real(s.mask.full)}")
        body.bind(s.score, name)

    @contextmanager
    def full_tile(self) -> Iterator[None]:
        guards, self.body.scope.guards = self.body.scope.guards, {}
        with self.body.block("else:"):
            yield
        self.body.scope.guards = guards

    def guard(self, name: str, value: float, source: str) -> str:
        return f"{name} = tl.where({self.exists}, {source}, {number(value, 'f32')})"

    def element(self, partial: Expr, full: Expr, stem: str, idle: float) -> str:
        """A term over the tile, with keys past the end idle where the score itself does not make them so."""
        body = self.body
        if ex.substitute(partial, {self.s.score: self.s.mask.full}) is full:
            name = body.let(stem, partial)
        else:
            name = body.fresh(stem)
            with body.block("if PARTIAL:"):
                body.line(f"{name} = {body.real(partial)}")
            with self.full_tile():
                if self.s.score in body.memo:
                    body.bind(self.s.mask.full, body.term(self.s.score))
                body.line(f"{name} = {body.real(full)}")
        if self.ragged and self.null is None:
            source, name = name, body.fresh(stem)
            body.line(f"{name} = {source}")
            with body.block("if PARTIAL:"):
                body.line(self.guard(name, idle, source))
        return name

    def carried(self, c: Carried, full: Carried) -> str:
        body, names = self.body, self.names
        new, old = names.carried[c.name], names.old[c.name]
        for e in {x for t in _terms(self.partial) + _terms(self.full) for x in ex.loads(t)}:
            if str(e.attr).removeprefix(OLD) == c.name:
                body.bind(e, old if str(e.attr).startswith(OLD) else new)
        element = self.element(c.lift, full.lift, "w" if c.lift is self.partial.weight else "t", c.identity)
        if self.s.key not in c.lift.ranks:
            element = f"tl.where({names.ranks[self.s.key]} >= 0, {element}, 0.0)"
        if c.op == "add":
            before = old if c.correction is None else f"{old} * {body.let('c', c.correction)}"
            body.line(f"{new} = {before} + tl.sum({element}, 1, keep_dims=True)")
        else:
            body.line(f"{new} = tl.{c.op}imum({old}, {self.extreme(c, full, element)})")
        return new

    def extreme(self, c: Carried, full: Carried, element: str) -> str:
        """The largest or least element of a row; a factor of all of them is left to the row, where the tile is full."""
        body = self.body
        whole, factored = f"tl.{c.op}({element}, 1, keep_dims=True)", positive_factor(full.lift)
        if factored is None or self.s.key not in factored[0].ranks:
            return whole
        once = f"tl.{c.op}({{}}, 1, keep_dims=True) * {number(factored[1].value, 'f32')}"
        if c.lift is full.lift and not self.ragged:
            return once.format(body.real(factored[0]))
        name = body.fresh("top")
        with body.block("if PARTIAL:"):
            body.line(f"{name} = {whole}")
        with self.full_tile():
            body.line(f"{name} = {once.format(body.real(factored[0]))}")
        return name


def _tensors(s: Streaming) -> list[Expr]:
    """Loads of the score that are no product."""
    products = {p.load for p in s.products}
    return [x for x in ex.loads(s.score) if x not in products]


def _terms(state: RowState) -> list[Expr]:
    return [state.weight, *(c.lift for c in state.carried), *state.corrections]


# --- split keys ---------------------------------------------------------------------------------------------------


def _save(names: KernelNames) -> Printed:
    f = DeviceFunction(names, "save", "p_state, state, o", ())
    count = len(names.s.state.carried)
    for i in range(count):
        f.body.line(f"tl.store(p_state + o * {count} + {i}, state[{i}])")
    if not count:
        f.body.line("pass")
    return f.printed("Keep the row state of the rows at `o`.")


def _restore(names: KernelNames) -> Printed:
    f = DeviceFunction(names, "restore", "p_state, o", ())
    count = len(names.s.state.carried)
    parts = [f"tl.load(p_state + o * {count} + {i})" for i in range(count)]
    f.body.line(f"return ({', '.join(parts)}{',' if count == 1 else ''})")
    return f.printed("The row state of the rows at `o`.")


def _join(names: KernelNames) -> Printed:
    """new = old ⊕ part's, each moved to the new bounds by the same correction that a tile uses."""
    s = names.s
    f = DeviceFunction(names, "join", "state, part, at, inputs, sizes", coordinates(s), s.state.corrections)
    body = f.body
    part = {c.name: body.fresh(f"{names.carried[c.name]}_part") for c in s.state.carried}
    for i, c in enumerate(s.state.carried):
        body.line(f"{names.old[c.name]} = state[{i}]")
        body.line(f"{part[c.name]} = part[{i}]")
    reads = {x for e in s.state.corrections for x in ex.loads(e) if str(x.attr).removeprefix(OLD) in part}
    for x in reads:
        name = str(x.attr)
        body.bind(x, names.old[name.removeprefix(OLD)] if name.startswith(OLD) else names.carried[name])
    # The same corrections with the part's values for the old ones.
    theirs: dict[Expr, Expr] = {}
    for x in (x for x in reads if str(x.attr).startswith(OLD)):
        name = str(x.attr).removeprefix(OLD)
        theirs[x] = ex.load(f"part:{name}", x.args, x.dtype)
        body.bind(theirs[x], part[name])

    def factors(correction: Expr | None) -> tuple[str, str]:
        if correction is None:
            return "1.0", "1.0"
        return body.let("a", correction), body.let("b", ex.substitute(correction, theirs))

    for c in s.state.carried:
        new, old, other = names.carried[c.name], names.old[c.name], part[c.name]
        if c.op == "add":
            a, b = factors(c.correction)
            body.line(f"{new} = {old} * {a} + {other} * {b}")
        else:
            body.line(f"{new} = tl.{c.op}imum({old}, {other})")
    a, b = factors(s.state.correction)
    new = ", ".join(names.carried[c.name] for c in s.state.carried)
    body.line(f"return ({new}{',' if len(part) == 1 else ''}), {a}, {b}")
    return f.printed("Merge two row states: the new one, and the factors of both sums.")
