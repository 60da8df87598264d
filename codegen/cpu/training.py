"""Prints the CPU kernel that is trained: the fused pass, which hands over row scalars, and its gradients in a second one.

    SOURCE, BACKWARD     two C++ texts, each compiled where it first runs
    attention            the output, and what its rows hand over
    backward             the gradients of inputs, through what operands and leaves are made of them

Which leaves somebody wants is known at a call: BACKWARD is compiled once for each set of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...patterns import expr as ex
from ...patterns.backward.adjoint import Adjoint, adjoint
from ...patterns.expr import Expr
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Obstacle
from ..files import cache, native
from ..files.torch_file import file, indented, parts, prelude, signature, sizes
from ..forms.form import UNDERFLOW, Form, rows_keep_a_key
from ..forms.skip import FINITE, idle_without_a_key, vanishes_backwards
from ..forms.terms import Terms
from ..skeletons import cpu, cpu_fused
from ..skeletons.backward import cpu_backward, cpu_product_backward
from ..text.print_torch import identifier
from ..text.printer import PrintError
from .cpp import backward as cpp_backward
from .cpp.backward import BackwardProgram
from .cpp.leaves import ENDS, LeafTerm, leaves
from .fused import FusedFile, check_tiles
from .leaf_sums import LeafSums

BODY = "one pass in C++ around the score and the row's state, and one around their derivatives"
# More names that the printed Python uses for itself.
LOCALS = (
    *parts(cpu_backward), *parts(cpu_product_backward), "wanted", "given", "flow", "grad", "gathered", "leaf_bits", "asked",
)
# Types in which an output is rounded so much that it tells δ too little for tensors of wider types.
NARROW = ("bf16", "f16")


@dataclass(frozen=True)
class PrintedTraining:
    """A file; the float inputs of which its backward gives no gradient; how many scalars a row hands over."""

    text: str
    without: tuple[str, ...]
    scalars: int


def printed(f: Form, m: TileMapping, version: str) -> PrintedTraining:
    """The kernel's file. Raises PrintError where a body does not fit the attention or the machine."""
    check_tiles(f, m)
    made = _adjoint(f)
    out = f.cascade.tensor[f.cascade.outputs[0]].dtype
    operands = [x for p in f.products for x in (p.near, p.far)] + [f.values]
    if _rounded(f, made) and any(x.dtype in ("f32", "f64") for e in operands for x in ex.loads(e)):
        raise PrintError(f"an output that is rounded to {out} tells too little of the gradients of wider operands")
    given = [x for x in leaves(f, made) if _is_given(f, made, x)]
    f = visiting(f, made, [*_elements(made), *_of_tiles(given)])
    without = _without(f, made, [x.load for x in given])
    return PrintedTraining(_TrainingFile(f, m, made, given).text(version), without, len(made.saved))


def _rounded(f: Form, made: Adjoint) -> bool:
    """Is δ of an output in a narrow type?"""
    return bool(made.row) and f.cascade.tensor[f.cascade.outputs[0]].dtype in NARROW


def _is_given(f: Form, made: Adjoint, leaf: LeafTerm) -> bool:
    """Is the loop's gradient of a leaf exact enough, and do tiles that it leaves out have no part in it?"""
    if _rounded(f, made) and leaf.load.dtype not in NARROW:
        return False
    return leaf.kind == ENDS or (not f.skips and f.rule != "bounded") or _vanish(f, [leaf.term])


def _of_tiles(given: Sequence[LeafTerm]) -> list[Expr]:
    return [x.term for x in given if x.kind != ENDS]


def visiting(f: Form, made: Adjoint, elements: Sequence[Expr]) -> Form:
    """The form whose tiles both loops visit: a row without a key may have weights that are NaN, at every key."""
    if f.rule != "always" or idle_without_a_key(elements, [x.load for x in made.saved]):
        return f
    return replace(f, rule="guarded", proof=rows_keep_a_key(f.attention, f.mask.keep))


def _without(f: Form, made: Adjoint, given: Sequence[Expr]) -> tuple[str, ...]:
    """Float inputs of leaves that are not among those given, also through the prelude."""
    loads = [*(g.load for g in made.leaves), *(x for p in f.products for x in ex.loads(p.outside))]
    read = {str(x.attr) for x in loads if x not in given}
    for e in reversed(f.attention.prelude):
        if e.out.tensor in read:
            read |= {str(x.attr) for x in e.reads}
    return tuple(t.name for t in f.cascade.inputs if t.name in read and t.dtype in ex.FLOATS)


def _adjoint(f: Form) -> Adjoint:
    made = adjoint(f.attention)
    if isinstance(made, Obstacle):
        raise PrintError(str(made))
    if made.passes:
        raise PrintError(f"the gradient needs another pass over the keys: {made.passes[0]}")
    if any(f.attention.value in x.ranks for x in cpp_backward.scalars(made)):
        raise PrintError("the gradient needs what the forward sums, value by value: a row hands over scalars alone")
    if f.rule != "never" and not _skips(f, made):
        raise PrintError("a masked key may have a gradient: its tile cannot be left out")
    return made


def _skips(f: Form, made: Adjoint) -> bool:
    """Does a key that the mask hides change no gradient, so that tiles of such keys may be left out?"""
    return _vanish(f, _elements(made))


def _vanish(f: Form, terms: Sequence[Expr]) -> bool:
    bound = (-max(f.mask.fills) - UNDERFLOW) / 2 if f.rule == "bounded" else FINITE
    return vanishes_backwards(terms, f.mask.keep, bound)


def _elements(made: Adjoint) -> list[Expr]:
    """What is computed for every query and key."""
    return [made.weight, *(x.term for x in made.scores)]


def _terms(f: Form) -> Terms:
    return Terms(f.attention.score, f.mask, f.state)


class _TrainingFile(FusedFile):
    """A file with two loops."""

    def __init__(self, f: Form, m: TileMapping, made: Adjoint, given: Sequence[LeafTerm]) -> None:
        super().__init__(f, m, tuple(x.term for x in made.saved), LOCALS)
        self.backward = BackwardProgram(f, _terms(f), self.given, made, given)
        self.programs.append(self.backward)
        self.adjoint = made
        taken = set(self.p.taken)
        names = []
        for x in given:
            names.append(identifier(f"d_{self.p.names.tensors[str(x.load.attr)]}", taken))
            taken.add(names[-1])
        self.leaves = LeafSums(self.p, tuple(given), tuple(names))

    def text(self, version: str) -> str:
        second = native.source(self.backward_holes(), "fused_backward").strip()
        constants = [*self.constants(), f"BACKWARD = r'''\n{second}\n'''"]
        places = [x.text for x in self.leaves.functions]
        printed = [*self.functions(), *places, self.main(), self.backward_main()]
        modules = (cache, native, cpu, cpu_fused, cpu_backward, cpu_product_backward)
        return file(self.p, self.m, printed, modules, constants, BODY, version)

    def ready(self) -> list[str]:
        """A compiler that fails does so in the forward, where another kernel can take its place."""
        if not self.leaves.leaves:
            return ["backward_compiled(BACKWARD)"]
        return [self._bits(), "backward_compiled(asked(BACKWARD, leaf_bits))"]

    def _bits(self) -> str:
        """The line that says which leaves are wanted: those made of an input that is."""
        made = [[self.p.names.tensors[t] for t in self._made_of(str(x.load.attr))] for x in self.leaves.leaves]
        texts = [" or ".join(f"{t}.requires_grad" for t in x) or "False" for x in made]
        return f"leaf_bits = {' | '.join(f'({t}) << {i}' for i, t in enumerate(texts))}"

    def _made_of(self, tensor: str) -> list[str]:
        """The float inputs of which a tensor is made."""
        read = {tensor}
        for e in reversed(self.f.attention.prelude):
            if e.out.tensor in read:
                read |= {str(x.attr) for x in e.reads}
        return [t.name for t in self.f.cascade.inputs if t.name in read and t.dtype in ex.FLOATS]

    def backward_holes(self) -> str:
        made = self.adjoint
        counts = f", SAVED = {len(made.saved)}, SCALARS = {len(made.saved) + len(made.row)}"
        said = str(made).splitlines()
        return "\n".join([
            f"// ---- printed from the adjoint of {self.f.cascade.name}", "//", *(f"//     {x}" for x in said), "",
            *self.types(counts), self.backward.counts(), "", cpp_backward.text(self.backward),
        ])

    def backward_main(self) -> str:
        """The text of `backward`."""
        p = self.p
        names = [p.names.tensors[t.name] for t in self.f.cascade.inputs]
        setup, _ = self.operands()
        lines, (operands, rest) = self.call(self.backward)
        many = range(len(self.f.products))
        made = [f"{x}_{i}" if len(many) > 1 else x for x in "qk" for i in many] + ["v"]
        ends = f"({self._rows('out')}, {self._rows('grad')}, saved)"
        body = [
            *sizes(p), f"given = leaves([{', '.join(names)}], wanted)", f"{', '.join(names)}, = given",
            "with torch.enable_grad():", *indented([*prelude(p), *setup]), *lines,
            *self._flow(operands, ends, rest, len(made)),
            f"return inputs_gradients([{', '.join([*made, *self.leaves.tensors])}], flow, given, wanted)",
        ]
        own = signature(p).replace("*, ", "")
        doc = "The gradients of the inputs in the wanted places, from the output and its gradient."
        return f'def backward(grad, out, saved, wanted, {own}):\n    """{doc}"""\n' + "\n".join(indented(body))

    def _flow(self, operands: str, ends: str, rest: str, count: int) -> list[str]:
        """Lines that make `flow`: the gradients of that many operands, then of leaves."""
        call = f"{operands}, {ends}, {rest}, TILE_P"
        if not self.leaves.leaves:
            return [f"flow, _ = gradients(BACKWARD, {call})"]
        made = f"flow, gathered = gradients(asked(BACKWARD, leaf_bits), {call}, {self.leaves.told()})"
        return [self._bits(), made, *self.leaves.lines(count)]

    def _rows(self, name: str) -> str:
        """The output or its gradient as [batch, head, query, value]."""
        a, c, at = self.f.attention, self.f.cascade, self.f.heads
        declared = [str(i.attr) for i in c.producers[c.outputs[0]][0].out.index]
        wanted = [*at.lead, *([at.head] if at.head else []), a.query, a.value]
        order = [declared.index(r) for r in wanted]
        text = name if order == sorted(order) else f"{name}.permute({', '.join(map(str, order))})"
        if not at.head:
            text = f"{text}.unsqueeze(0)"
        return f"{text}.flatten(0, {len(at.lead) - 1})" if len(at.lead) > 1 else text if at.lead else f"{text}.unsqueeze(0)"
