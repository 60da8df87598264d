"""Prints the CPU kernel of a recurrence: chunks of steps, the state carried from one to the next.

    for a chunk    factor, added: terms over its steps, at once        states: one operator a step        outputs: at once

A matrix that each step changes by an outer product is carried over a chunk by matrix products. Of any other state the
elements must follow from themselves.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from ...patterns import expr as ex
from ...patterns.cascade import Einsum, Size, show
from ...patterns.expr import Expr
from ...patterns.recurrence.expand import factors_of, product_of
from ...patterns.recurrence.low_rank import LowRank, low_rank
from ...patterns.recurrence.recurrence import ONE, Recurrence, State
from ...patterns.verdict import Refusal
from ..files import cache
from ..files.torch_file import LICENCE, skeleton, used_names
from ..skeletons import carried
from ..skeletons import cpu as helpers
from ..skeletons import scan as loops
from ..text.print_torch import TYPES, TorchBody, TorchScope
from ..text.printer import PrintError

NAME = "reattend"
# Elements of a state in a chunk of steps, which should lie in a core's cache; the least and the most steps of a chunk.
IN_CACHE = 1 << 16
STEPS = (16, 128)
# Steps over which a matrix is carried at once.
MATRIX_STEPS = 64
IMPORTS = """from __future__ import annotations

import math
from collections.abc import Sequence
from math import inf, nan

import torch
from torch import Tensor"""
# The rank of the steps of a chunk.
CHUNK = "c"


@dataclass(frozen=True)
class ScanKernel:
    """A printed scan: the file's text, and what runs it. `entry(*inputs)` gives the outputs in the order of the
    cascade's; `steps` are computed at once."""

    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    entry: Callable[..., tuple[Tensor, ...]]
    steps: int
    forms: Mapping[str, LowRank]


@lru_cache(maxsize=256)
def build(r: Recurrence) -> ScanKernel | Refusal:
    """The kernel of a recurrence with fixed sizes, or why there is none."""
    return printed(r, ScanFile)


def printed(r: Recurrence, kind: type[ScanFile]) -> ScanKernel | Refusal:
    """The kernel of a recurrence in a file of this kind."""
    forms: dict[str, LowRank] = {}
    for s in r.states:
        form = low_rank(r, s)
        if isinstance(form, LowRank):
            forms[s.name] = form
        elif s.law == "matrix":
            return Refusal(NAME, f"a step contracts its state, and {form}")
    if any(not isinstance(x.size, int) for x in r.cascade.ranks):
        return Refusal(NAME, "its sizes are open")
    file = kind(r, forms)
    try:
        source = file.text()
    except PrintError as no:
        return Refusal(NAME, str(no))
    entry = cache.load(source).scan
    return ScanKernel(source, tuple(t.name for t in r.cascade.inputs), r.cascade.outputs, entry, file.chunk, forms)


def shared(m: LowRank) -> tuple[str, ...]:
    """The ranks along which matrices share what they are written and read by, under a decay for each whole matrix."""
    if m.read is not None or m.key in m.factor.ranks or not m.reads:
        return ()
    rows = frozenset().union(m.write.ranks, *(x.query.ranks for x in m.reads))
    return tuple(x for x in m.batch if x not in rows)


def narrow_first(e: Expr) -> Expr:
    """A term whose products take first together what varies along the same ranks: a[c] · b[n] · d[c] is (a · d) · b."""
    if e.op != "mul":
        return e if not e.args or e.op == "load" else ex.make(e.op, tuple(map(narrow_first, e.args)), e.attr, e.dtype)
    by_ranks: dict[frozenset[str], list[Expr]] = {}
    for f in factors_of(e):
        by_ranks.setdefault(f.ranks, []).append(narrow_first(f))
    return product_of(tuple(product_of(tuple(x)) for _, x in sorted(by_ranks.items(), key=lambda i: len(i[0]))))


class ScanFile:
    """One kernel's text. Values of a chunk have a dimension for its steps, then one a rank."""

    imports = IMPORTS
    modules: tuple[ModuleType, ...] = (helpers, loops, carried)
    # behind the names of the loops over steps
    suffix = ""

    def __init__(self, r: Recurrence, forms: Mapping[str, LowRank]) -> None:
        self.r, self.c, self.forms = r, r.cascade, forms
        self.size = {x.name: x.size for x in self.c.ranks if isinstance(x.size, int)}
        self.steps = self.size[r.rank]
        self.order = [x.name for x in self.c.ranks if x.name != r.rank]
        self.real = "f64" if any(t.dtype == "f64" for t in self.c.tensors) else "f32"
        held = max((math.prod(self.size[x] for x in s.ranks) for s in r.states if s.name not in forms), default=0)
        most = MATRIX_STEPS if forms else STEPS[1]
        self.chunk = min(max(IN_CACHE // max(held, 1), STEPS[0]), most, self.steps)
        self.shapes: dict[str, tuple[Size, ...]] = {t.name: t.shape for t in self.c.inputs}
        self.extent: dict[str, Size] = {**self.size, CHUNK: self.chunk}
        self.made: set[str] = set()
        # views of all steps, and what a chunk reads of them, by the text that makes it
        self.ahead: dict[str, str] = {}
        # the ranks of the state whose elements follow from themselves, while its terms are printed
        self.along: frozenset[str] = frozenset()
        self.here: dict[str, str] = {}

    def text(self) -> str:
        loop: list[str] = []
        for s in self.r.states:
            loop += self._matrix(self.forms[s.name]) if s.name in self.forms else self._state(s)
        names = {s.name for s in self.r.states}
        for e in self.r.outputs:
            loop += self._value(e)
        loop += [f"{s.name} = after_{s.name}[-1]" for s in self.r.states if s.name not in self.forms]
        first = [line for s in self.r.states for line in self._initial(s)]
        made = [self._empty(e.out.tensor) for e in self.r.outputs]
        last = [*(line for e in self.r.outputs for line in self._whole(e)), *map(self._last, self.r.states)]
        inputs = ", ".join(t.name for t in self.c.inputs)
        ranks = [f"{x} = torch.arange({self.size[x]}).view({self._view(x)})" for x in self.order]
        outputs = [o if o not in names else f"last_{o}" for o in self.c.outputs]
        t, used = self.r.rank, used_names("\n".join(loop))
        ahead = [f"{t} = torch.arange({self.steps}).view({self._view(CHUNK)})"] if self.ahead else []
        ahead += [f"{name} = {self._pieces(text)}" for text, name in self.ahead.items()]
        places = [
            *([f"{t} = torch.arange(t0, t0 + n).view({self._view(CHUNK)})"] if t in used else []),
            *([f"{CHUNK} = torch.arange(n).view({self._view(CHUNK)})"] if CHUNK in used else []),
        ]
        lines = [
            f"def scan({inputs}):", f'    """{", ".join(self.c.outputs)}: what the steps give, and the last states."""',
            *_indented([*ranks, *first, *made, *ahead, f"for t0 in range(0, {self.steps}, {self.chunk}):"]),
            *_indented([f"n = min({self.chunk}, {self.steps} - t0)", *places, *loop], 2),
            *_indented([*last, f"return {', '.join(outputs)},"]),
        ]
        body = "\n".join(lines)
        head = "\n".join(["A recurrence, in chunks of steps.", "", LICENCE, "", *show(self.c).splitlines(), ""])
        texts = skeleton(self.modules, used_names(body))
        return "\n\n\n".join([f'"""{head}"""', self.imports, *texts, body]) + "\n"

    # what a kernel that is trained has otherwise

    def _pieces(self, all_steps: str) -> str:
        return all_steps

    def _piece(self, name: str) -> str:
        """What a chunk reads of what is there of all steps."""
        return f"{name}[t0 : t0 + n]"

    def _empty(self, name: str) -> str:
        return f"{name} = torch.empty({self._shape(name)}, dtype={TYPES[self.c.tensor[name].dtype]})"

    def _given(self, e: Einsum, value: str, at: int) -> str:
        """The line that keeps what a chunk's steps give; `at`: the dimension of the steps in the output."""
        cut = ", ".join("t0 : t0 + n" if d == at else ":" if i.op == "index" else "0" for d, i in enumerate(e.out.index))
        return f"{e.out.tensor}[{cut}] = {value}"

    def _whole(self, e: Einsum) -> list[str]:
        """The lines that make an output of what its chunks give."""
        return []

    def _sums(self, m: LowRank) -> bool:
        """Whether a matrix is carried by the logarithms of its decays, which cost less in float64."""
        return m.key not in m.factor.ranks and m.factor.op == "exp" and self.real == "f32"

    # pieces

    def _view(self, rank: str) -> str:
        behind = len(self.order) if rank == CHUNK else len(self.order) - 1 - self.order.index(rank)
        return ", ".join(["-1", *["1"] * behind])

    def _shape(self, name: str) -> str:
        return f"({', '.join(str(n) for n in self.c.tensor[name].shape)},)"

    def _full(self, ranks: frozenset[str], steps: str) -> str:
        return f"({', '.join([steps, *(str(self.size[x]) if x in ranks else '1' for x in self.order)])},)"

    def _dims(self, ranks: tuple[str, ...]) -> str:
        return f"({', '.join(['0', *(str(1 + self.order.index(x)) for x in ranks)])},)"

    def _term(self, e: Expr, real: str = "") -> tuple[list[str], str]:
        """Lines and text of a term over a chunk's steps, after what it needs of the chunk; its floats are `real`."""
        before = [line for x in ex.loads(e) for line in self._needed(str(x.attr))]
        e = ex.substitute(e, {x: self._held(x) for x in ex.loads(e)})
        real = real or self.real
        scope = self._scope(real)
        plain = TorchBody(scope, [e], indent="")
        seen = {x: self._seen(x, plain, real, before) for x in ex.loads(e) if self._by_steps(x, plain)}
        seen |= {x: self._spread(x) for x in ex.loads(e) if self._is_held(x, real)}
        body = TorchBody(replace(scope, names={**scope.names, **seen}), [e], indent="")
        text = body.named(e)
        if body.helpers - {"tile"}:
            raise PrintError(f"a step needs {', '.join(sorted(body.helpers - {'tile'}))}")
        return [*before, *body.lines], text

    def _scope(self, real: str) -> TorchScope:
        ranks = [*self.order, self.r.rank, CHUNK]
        return TorchScope({ex.index(x): x for x in ranks}, {t: t for t in self.shapes}, self.shapes, self.extent, real)

    def _by_steps(self, x: Expr, body: TorchBody) -> bool:
        """Whether a read is an input's, each step's at its own place: a view of all steps, cut for a chunk."""
        name, t = str(x.attr), ex.index(self.r.rank)
        # a view by one step alone has no dimension for it
        return self.steps > 1 and name not in self.c.producers and t in x.args and body.is_plain(x, self.shapes[name])

    def _seen(self, x: Expr, body: TorchBody, real: str, before: list[str]) -> str:
        """The name of what a chunk reads of an input; `before` takes its line, where it is not there yet."""
        text = body.element(x)
        all_steps = self.ahead.setdefault(text, f"all_{len(self.ahead)}")
        cast = f".to({TYPES[real]})" if x.is_float and x.dtype != real else ""
        # what is spread over a state's elements decides how these lie
        spread = ".contiguous()" if x.ranks - {self.r.rank} < self.along else ""
        return self._cut(f"{self._piece(all_steps)}{cast}{spread}", before)

    def _is_held(self, x: Expr, real: str) -> bool:
        """Whether a read is of a chunk's own value, by whole ranks."""
        plain = x.args[:1] == (ex.index(CHUNK),) and len({i for i in x.args if i.op == "index"}) == len(x.args)
        return plain and str(x.attr) in self.shapes and not (x.is_float and x.dtype != real)

    def _spread(self, x: Expr) -> str:
        """A chunk's own value with a dimension for each rank."""
        ranks = [str(i.attr) for i in x.args[1:]]
        order = sorted(range(len(ranks)), key=lambda i: self.order.index(ranks[i]))
        moved = "" if order == sorted(order) else f".permute(0, {', '.join(str(1 + i) for i in order)})"
        return f"{x.attr}{moved}[:, {', '.join(':' if r in ranks else 'None' for r in self.order)}]"

    def _cut(self, text: str, before: list[str]) -> str:
        if text not in self.here:
            self.here[text] = f"here_{len(self.here)}"
            before.append(f"{self.here[text]} = {text}")
        return self.here[text]

    def _needed(self, name: str) -> list[str]:
        """The lines of a value of each step that is no state, where they are not there yet."""
        producers = self.c.producers.get(name, ())
        if name in self.made or len(producers) != 1 or name in {s.name for s in self.r.states}:
            return []
        return self._value(producers[0])

    def _held(self, x: Expr) -> Expr:
        """A read of what a chunk holds, by its own steps."""
        name, c = str(x.attr), ex.index(CHUNK)
        if name not in self.c.producers:
            return x
        state = next((s for s in self.r.states if s.name == name), None)
        if state is None:
            (e,) = self.c.producers[name]
            kept = [i for i, own in zip(x.args, e.out.index) if own.op == "index" and own.attr != self.r.rank]
            return ex.load(name, (c, *kept), self._type(name))
        if name in self.forms:
            raise PrintError("a step reads a matrix other than as a product")
        at = x.args[-1]
        before = at is ex.index(self.r.rank)
        if not before and at is not ex.index(self.r.rank) + ex.const(1):
            raise PrintError("a step reads a state of another step")
        kept = [i for i, own in zip(x.args, state.step.out.index) if own.op == "index"]
        made = f"{'before' if before else 'after'}_{name}"
        return ex.load(made, (c, *kept), self.real)

    def _type(self, name: str) -> str:
        dtype = self.c.tensor[name].dtype
        return self.real if dtype in ex.FLOATS else dtype

    def _layout(self, m: LowRank) -> tuple[str, ...]:
        """The ranks of a matrix in the order in which it lies."""
        group = shared(m)
        return (*(x for x in m.batch if x not in group), m.key, *group, m.value)

    def _initial(self, s: State) -> list[str]:
        first = next(e for e in self.c.producers[s.name] if e is not s.step)
        lines, text = self._term(first.body)
        ranks = self._layout(self.forms[s.name]) if s.name in self.forms else s.ranks
        full = self._full(frozenset(ranks), "1")
        return [*lines, f"{s.name} = laid({text}, {full}, {self._dims(ranks)}, {TYPES[self.real]})[0]"]

    def _state(self, s: State) -> list[str]:
        full = self._full(frozenset(s.ranks), "n")
        dims, real, name = self._dims(s.ranks), TYPES[self.real], s.name
        product, self.along = narrow_first(s.added), frozenset(s.ranks)
        lines, added = self._term(product)
        # what is computed over all ranks has memory of its own
        fresh = product.op == "mul" and product.ranks >= {*s.ranks, self.r.rank} and product.dtype == self.real
        lines.append(f"after_{name} = {'shown' if fresh else 'laid'}({added}, {full}, {dims}, {real})")
        if s.law == "factor" and s.factor is ONE:
            lines.append(f"after_{name} = summed{self.suffix}({name}, after_{name})")
        else:
            by = s.factor
            if by.op == "exp" and self.real == "f32":
                # torch.exp takes ten times as long where it gives 0, as many decays do
                by = ex.unary("exp2", ex.const(1 / math.log(2)) * by.args[0])
            more, factor = self._term(narrow_first(by))
            lines += [*more, f"factor_{name} = shown({factor}, {full}, {dims}, {real})"]
            loop = "scaled" if s.law == "factor" else "largest"
            lines.append(f"after_{name} = {loop}{self.suffix}({name}, factor_{name}, after_{name})")
        self.along = frozenset()
        self.shapes[f"after_{name}"] = self.shapes[f"before_{name}"] = (self.chunk, *(self.size[x] for x in s.ranks))
        others = (x for e in self.c.einsums if e is not s.step for x in e.reads)
        read = any(str(x.attr) == name and x.args[-1] is ex.index(self.r.rank) for x in others)
        return [*lines, f"before_{name} = earlier({name}, after_{name})"] if read else lines

    def _matrix(self, m: LowRank) -> list[str]:
        """The lines that carry a matrix over a chunk, and give what is read of it."""
        name, lines = m.state.name, list[str]()

        group = shared(m)
        batch = tuple(x for x in m.batch if x not in group)

        def rows(e: Expr, width: str, stem: str, real: str = "") -> str:
            """The name of a term of each step, [n, *batch, width]; of what is not shared, [n, *batch, *group, width]."""
            own = (*batch, *group) if width != m.key else batch
            ranks, real = (*own, width) if width else own, real or self.real
            full, dims = frozenset(ranks), self._dims(ranks)
            plain = TorchBody(self._scope(real), [e], indent="")
            if e.op == "load" and e.dtype == real and self._by_steps(e, plain):
                # all steps are seen as rows, not cut and turned chunk by chunk
                rows = f"shown({plain.element(e)}, {self._full(full, str(self.steps))}, {dims}, {TYPES[real]})"
                value = self._piece(self.ahead.setdefault(rows, f"all_{len(self.ahead)}"))
            else:
                more, text = self._term(e, real)
                lines.extend(more)
                value = f"shown({text}, {self._full(full, 'n')}, {dims}, {TYPES[real]})"
            lines.append(f"{stem}_{name} = {value}{'' if width or group else '[..., None]'}")
            return f"{stem}_{name}"

        along, sums = m.key in m.factor.ranks, self._sums(m)
        # one decay a matrix costs little in float64
        factor = rows(m.factor.args[0] if sums else m.factor, m.key if along else "", "factor", "" if along else "f64")
        write, added = rows(m.write, m.key, "write"), rows(m.added, m.value, "added")
        read = f"({rows(m.read, m.key, 'read')}, {m.read_faded})" if m.read is not None else "None"
        queries = [f"({rows(x.query, m.key, f'query{i}')}, {x.after})" for i, x in enumerate(m.reads)]
        taken = [] if group else [read]
        given = [name, factor, write, added, *taken, f"[{', '.join(queries)}]", *(["True"] if sums else [])]
        lines.append(f"{name}, given_{name} = {'side_by_side' if group else 'carried'}{self.suffix}({', '.join(given)})")
        for i, x in enumerate(m.reads):
            made = x.einsum.out.tensor
            order = [0, *(1 + (*batch, *group, m.value).index(r) for r in x.ranks)]
            moved = "" if order == sorted(order) else f".permute({', '.join(map(str, order))})"
            lines.append(f"{made} = given_{name}[{i}]{moved}")
            self.made.add(made)
            self.shapes[made] = (self.chunk, *(self.size[r] for r in x.ranks))
        return lines

    def _value(self, e: Einsum) -> list[str]:
        """A value of each step of the chunk: an output, or what one needs."""
        self.made.add(e.out.tensor)
        if any(i.op not in ("index", "const") for i in e.out.index):
            raise PrintError("a step gives several elements side by side")
        over = frozenset(e.over)
        if e.op == "add" and e.body.op == "mul" and over and over <= e.body.args[0].ranks & e.body.args[1].ranks:
            return self._laid(e, *self._product(e))
        lines, text = self._term(e.body)
        if over:
            if e.op not in ("add", "max", "min"):
                raise PrintError(f"a step reduces by {e.op}")
            reduce = {"add": "sum", "max": "amax", "min": "amin"}[e.op]
            dims = ", ".join(str(1 + self.order.index(x)) for x in e.over)
            wide = self._full(over | e.body.ranks, "n")
            text = f"torch.as_tensor({text}).expand({wide}).{reduce}(({dims},), keepdim=True)"
        return self._laid(e, lines, text)

    def _product(self, e: Einsum) -> tuple[list[str], str]:
        """A sum of products by torch's own; dimensions of one element are spread over the other's."""
        (first, a), (second, b) = (self._term(x) for x in e.body.args)
        letters = string.ascii_lowercase[: len(self.order) + 1]
        kept = "".join(x for x, r in zip(letters, ["", *self.order]) if r not in e.over)
        cut = ", ".join("None" if r in e.over else ":" for r in self.order)
        spread = len(letters)
        a, b = (f"wide({x}, {spread})" for x in (a, b))
        return [*first, *second], f'torch.einsum("{letters},{letters}->{kept}", {a}, {b})[:, {cut}]'

    def _laid(self, e: Einsum, lines: list[str], text: str) -> list[str]:
        """The lines that keep a value of each step."""
        ranks = tuple(str(i.attr) for i in e.out.index if i.op == "index" and i.attr != self.r.rank)
        name = e.out.tensor
        full, made = self._full(frozenset(ranks), "n"), self._dims(ranks)
        if name not in self.c.outputs:
            self.shapes[name] = (self.chunk, *(self.size[x] for x in ranks))
            return [*lines, f"{name} = laid({text}, {full}, {made}, {TYPES[self._type(name)]})"]
        at = next(d for d, i in enumerate(e.out.index) if i is ex.index(self.r.rank))
        before = sum(i.op == "index" for i in e.out.index[:at])
        value = f"shown({text}, {full}, {made}, {TYPES[self._type(name)]}){f'.movedim(0, {before})' if before else ''}"
        return [*lines, self._given(e, value, at)]

    def _last(self, s: State) -> str:
        shape = self.c.tensor[s.name].shape[:-1]
        form = self.forms.get(s.name)
        moved = "" if form is None else f".permute({', '.join(str(self._layout(form).index(x)) for x in s.ranks)})"
        return f"last_{s.name} = {s.name}{moved}.reshape({tuple(shape)}).to({TYPES[self.c.tensor[s.name].dtype]})"


def _indented(lines: list[str], by: int = 1) -> list[str]:
    return [f"{'    ' * by}{x}" for x in lines]
