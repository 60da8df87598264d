"""Prints the CPU kernel that is trained: the fused pass, which hands over row scalars, and its gradients in a second one.

    SOURCE, BACKWARD     two C++ texts, each compiled where it first runs
    attention            the output, and what its rows hand over
    backward             the gradients of inputs, through what operands are made of them
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
from ..skeletons.backward import cpu_backward
from ..text.printer import PrintError
from .cpp import backward as cpp_backward
from .cpp.backward import BackwardProgram
from .fused import FusedFile, check_tiles

BODY = "one pass in C++ around the score and the row's state, and one around their derivatives"
# More names that the printed Python uses for itself.
LOCALS = (*parts(cpu_backward), "wanted", "given", "flow", "grad")


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
    if made.row and out in ("bf16", "f16") and any(x.dtype in ("f32", "f64") for e in operands for x in ex.loads(e)):
        raise PrintError(f"an output that is rounded to {out} tells too little of the gradients of wider operands")
    f = visiting(f, made, _elements(made))
    return PrintedTraining(_TrainingFile(f, m, made).text(version), _without(f, made), len(made.saved))


def visiting(f: Form, made: Adjoint, elements: Sequence[Expr]) -> Form:
    """The form whose tiles both loops visit: a row without a key may have weights that are NaN, at every key."""
    if f.rule != "always" or idle_without_a_key(elements, [x.load for x in made.saved]):
        return f
    return replace(f, rule="guarded", proof=rows_keep_a_key(f.attention, f.mask.keep))


def _without(f: Form, made: Adjoint) -> tuple[str, ...]:
    """Float inputs that the score, the row's end or what multiplies a product reads, also through the prelude."""
    read = {str(g.load.attr) for g in made.leaves} | {str(x.attr) for p in f.products for x in ex.loads(p.outside)}
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
    bound = (-max(f.mask.fills) - UNDERFLOW) / 2 if f.rule == "bounded" else FINITE
    return vanishes_backwards(_elements(made), f.mask.keep, bound)


def _elements(made: Adjoint) -> list[Expr]:
    """What is computed for every query and key."""
    return [made.weight, *(x.term for x in made.scores)]


def _terms(f: Form) -> Terms:
    return Terms(f.attention.score, f.mask, f.state)


class _TrainingFile(FusedFile):
    """A file with two loops."""

    def __init__(self, f: Form, m: TileMapping, made: Adjoint) -> None:
        super().__init__(f, m, tuple(x.term for x in made.saved), LOCALS)
        self.backward = BackwardProgram(f, _terms(f), self.given, made)
        self.programs.append(self.backward)
        self.adjoint = made

    def text(self, version: str) -> str:
        second = native.source(self.backward_holes(), "fused_backward").strip()
        constants = [*self.constants(), f"BACKWARD = r'''\n{second}\n'''"]
        printed = [*self.functions(), self.main(), self.backward_main()]
        modules = (cache, native, cpu, cpu_fused, cpu_backward)
        return file(self.p, self.m, printed, modules, constants, BODY, version)

    def ready(self) -> list[str]:
        """A compiler that fails does so in the forward, where another kernel can take its place."""
        return ["backward_compiled(BACKWARD)"]

    def backward_holes(self) -> str:
        made = self.adjoint
        counts = f", SAVED = {len(made.saved)}, SCALARS = {len(made.saved) + len(made.row)}"
        said = str(made).splitlines()
        return "\n".join([
            f"// ---- printed from the adjoint of {self.f.cascade.name}", "//", *(f"//     {x}" for x in said), "",
            *self.types(counts), "", cpp_backward.text(self.backward),
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
            f"flow = gradients(BACKWARD, {operands}, {ends}, {rest}, TILE_P)",
            f"return inputs_gradients([{', '.join(made)}], flow, given, wanted)",
        ]
        own = signature(p).replace("*, ", "")
        doc = "The gradients of the inputs in the wanted places, from the output and its gradient."
        return f'def backward(grad, out, saved, wanted, {own}):\n    """{doc}"""\n' + "\n".join(indented(body))

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
