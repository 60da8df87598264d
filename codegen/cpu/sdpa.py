"""Prints the CPU kernel whose tiles are computed by torch's own SDPA on slices of the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...patterns import expr as ex
from ...patterns.attention.score import hiding
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.terms.arithmetic import FLOAT_FORMAT
from ..files.tile_plan import planned
from ..files.torch_file import (
    PrintedFunction,
    Printer,
    common_type,
    entry,
    file,
    indented,
    make_near,
    near_names,
    operands,
    query_operand,
    relatives,
    shared_alike,
)
from ..forms.form import Form, Softmax, rows_keep_a_key
from ..skeletons import cpu as loops
from ..text.print_torch import TorchBody, is_number, literal
from ..text.printer import PrintError
from ..text.tile_terms import relative_parts

# The body that cuts a causal triangle into slices as well, instead of leaving it to torch's own causal mode.
SLICES = "slices"


def text(f: Form, s: Softmax, m: TileMapping, version: str) -> str:
    """The kernel's file."""
    p = Printer(f)
    read = [t.dtype for t in (s.product.near, s.product.far, f.values) if t.op == "load"]
    if s.score.added is not None and f.real == "f64" and len(read) == 3 and "f64" not in read:
        raise PrintError("what the scores get added is computed in float64, which torch's kernel takes beside float64 only")
    near = relative_parts(s.score.added, f.attention.query, f.attention.key) if s.score.added is not None else ()
    shared = near == (s.score.added,)
    functions = _functions(p, s, near, shared)
    tiled = f.skips or s.limit is not None
    if tiled:
        functions.append(planned(p, m, s.full.added is not None, triangles=m.body != SLICES))
    table = {x.name: x for x in functions}
    main = _main(p, s, _Pieces(p, s, table, near, shared), table["planned"].call({}) if tiled else "")
    constants = [] if ex.symbols(s.score.scale) else [f"SCALE = {TorchBody(p.scope({}), []).real(s.score.scale)}"]
    if s.limit is not None:
        constants.append(f"# Scores below this leave masked weights at exactly 0.\nLIMIT = {s.limit!r}")
    return file(p, m, [*(x.text for x in functions), main], (loops,), constants, "SDPA on slices of the keys", version)


def _functions(p: Printer, s: Softmax, near: Sequence[Expr], shared: bool) -> list[PrintedFunction]:
    a = p.f.attention
    functions = relatives(p, near)
    if s.score.added is not None and not shared:
        cuts = {part: name for part, (name, _) in zip(near, near_names(near))}
        functions.append(_bias(p, s.score.added, cuts))
    if s.chosen:
        load = ex.load(s.product.name, a.products[0].out.index, a.cascade.tensor[s.product.name].dtype)
        outside = s.product.outside
        score = a.score if outside.is_const and outside.value == 1 else ex.substitute(a.score, {load: load * outside})
        functions.append(p.function("score", "The score as it is written.", [score], ("x",), {load: "x"}))
    if s.ending.finish is not None:
        leaves = {x: str(x.attr) for x in ex.loads(s.ending.finish) if str(x.attr) in ("o", "lse")}
        doc = f"The end of a row: `o` is SDPA's output, `lse` its log-sum-exp over {p.ranks[a.key]}."
        functions.append(p.function("end", doc, [s.ending.finish], ("o", "lse"), named=leaves))
    return functions


def _bias(p: Printer, added: Expr, cuts: Mapping[Expr, str]) -> PrintedFunction:
    doc = "What the scores get added."
    if not is_number(added):
        return p.function("bias", doc, [added], named=cuts)
    body = TorchBody(p.scope(cuts), [added])
    text = body.real(added)
    return p.define("bias", doc, [*body.lines, f"    return torch.full((1, 1), {text})"], (), body.scope)


def _main(p: Printer, s: Softmax, pieces: _Pieces, plan: str) -> str:
    """`attention`, which puts everything together."""
    f, a, n = p.f, p.f.attention, p.names
    q = query_operand(p, s.product.near, s.product.over)
    k, v = shared_alike(p, operands(p, a.key, s.product.far, s.product.over), operands(p, a.key, f.values, (a.value,)))
    setup = [f"q, k, v = {common_type(p, (s.product.near, s.product.far, f.values), (q, k, v))}"]
    queries, keys = n.rank(a.query), n.rank(a.key)
    small = [*pieces.finish("0"), pieces.once()]
    if not plan and s.score.added is None:
        return entry(p, small, setup)
    every = f"[(0, {p.batch}, strips({queries}, {keys}, TILE_P, True))]"
    fits = f"reach(q, k, {_scale(p, s)}) <= LIMIT"
    if s.limit is not None and not s.chosen:
        plan = f"{plan} if {fits} else {every}"
    lines = [
        *(pieces.exactly(fits) if s.chosen else []),
        f"if {queries} * {keys} <= FEW:", *indented(small), "    return out", "",
        "def part(z0, z1, plan):", *indented(pieces.part()), "",
        f"for z0, z1, plan in {plan or every}:", "    part(z0, z1, plan)",
    ]
    return entry(p, lines, setup)


class _Pieces:
    """The lines of `attention` that call the loops, for a plan of tiles and for one call."""

    def __init__(
        self, p: Printer, s: Softmax, table: Mapping[str, PrintedFunction], near: Sequence[Expr], shared: bool
    ) -> None:
        self.p, self.s, self.table, self.near, self.shared = p, s, table, near, shared
        a = p.f.attention
        self.query, self.key = p.ranks[a.query], p.ranks[a.key]
        self.batch = [p.ranks[r] for r in p.f.heads.lead]

    @property
    def added(self) -> bool:
        return self.s.score.added is not None

    @property
    def tail(self) -> list[str]:
        """The last arguments: what a row without a key yields, and how rows end."""
        empty = _empty(self.p.f, self.s)
        out = [f"empty={literal(empty)}"] if empty is not None else []
        return [*out, "finish=finish"] if self.s.ending.finish is not None else out

    @property
    def relatives(self) -> list[tuple[str, PrintedFunction]]:
        return [(name, self.table[made]) for name, made in near_names(self.near)]

    def finish(self, z0: str) -> list[str]:
        if self.s.ending.finish is None:
            return []
        start = "" if z0 == "0" else f"{z0} + "
        at = {r: f"{r}[{start}y0 : {start}y1]" for r in self.batch}
        at |= {self.query: f"{self.query}[p0:p1]", "lse": "lse.unsqueeze(3)"}
        return ["", "def finish(o, lse, y0, y1, p0, p1):", f"    return {self.table['end'].call(at)}", ""]

    def exactly(self, fits: str) -> list[str]:
        """Scores beyond the limit: the attention as it is written."""
        at = {r: f"{r}[at_z]" for r in self.batch} | {self.query: f"{self.query}[at_p]"}
        if self.p.f.heads.head:
            at[self.p.ranks[self.p.f.heads.head]] = f"{self.p.ranks[self.p.f.heads.head]}[at_h]"
        inner = ["", "def written(x, at_z, at_h, at_p):", f"    return {self.table['score'].call(at)}", ""]
        return [f"if not {fits}:", *indented([*inner, "plainly(q, k, v, rows, TILE_P, written)", "return out"]), ""]

    def once(self) -> str:
        """One call in which every query sees every key."""
        arguments = ["q, k, v, rows", _scale(self.p, self.s)]
        if self.added:
            whole = {name: made.call({}) for name, made in self.relatives}
            arguments.append(whole["near"] if self.shared else self.table["bias"].call(whole))
        return f"once({', '.join([*arguments, *self.tail])})"

    def part(self) -> list[str]:
        """A range of the batch along its plan."""
        batch = {r: f"{r}[z0:z1]" for r in self.batch}
        lines = make_near(self.p, self.relatives, batch)
        arguments = ["q[z0:z1], k[z0:z1], v[z0:z1], rows[z0:z1]", _scale(self.p, self.s), "plan"]
        if self.shared:
            arguments.append("near.cut")
        elif self.added:
            at = {**batch, self.query: f"{self.query}[p0:p1]", self.key: f"{self.key}[m0:m1]"}
            at |= {name: f"{name}.cut(p0, p1, m0, m1)" for name, _ in self.relatives}
            lines += ["", "def added(p0, p1, m0, m1):", f"    return {self.table['bias'].call(at)}", ""]
            arguments[2:] = ["single(plan)", "added"]
        return [*lines, *self.finish("z0"), f"sdpa({', '.join([*arguments, *self.tail])})"]


def _empty(f: Form, s: Softmax) -> float | None:
    """What a row without a key yields, where torch's kernel does not give it by itself."""
    if s.score.added is None or (s.ending.finish is None and s.ending.empty == 0):
        return None
    a, lowest = f.attention, sum(x for x in f.mask.fills)
    if f.hidden or hiding(s.score.added, a.key):
        return s.ending.empty
    # where every row is proved to keep a key, nobody has to look for those that do not
    return s.ending.empty if lowest < -FLOAT_FORMAT["f32"][2] and rows_keep_a_key(a, f.mask.keep) else None


def _scale(p: Printer, s: Softmax) -> str:
    return TorchBody(p.scope({}), [s.score.scale]).real(s.score.scale) if ex.symbols(s.score.scale) else "SCALE"
