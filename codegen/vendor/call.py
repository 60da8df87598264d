"""A vendor's function as a candidate: an ordinary Python function printed from the cascade, spliced as such into graphs.

Terms are printed over all coordinates at once and without caches, so that the function can be traced and differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ...patterns.cascade import Cascade, show
from ...patterns.expr import Expr
from ..files import cache
from ..files.beforehand import einsum
from ..files.torch_file import LICENCE, Printer, imports, indented, sizes, skeleton, used_names
from ..forms.form import Form
from ..forms.operands import view
from ..forms.program import loose
from ..skeletons import cpu as helpers
from ..text.print_torch import TorchBody
from ..text.printer import ATOM, Text


@dataclass(frozen=True)
class VendorCall:
    """A printed function: its file's text, and how it is called.

    `inputs`: the cascade's inputs, in order; `sizes`: what no input has as a dimension, as further arguments.
    `mask`: the term that is made a tensor, if any; `causal`: the function is told so instead; `grouped`: heads share keys.
    `compiled`: it is compiled when it first runs.
    """

    name: str
    source: str
    cascade: Cascade
    mask: Expr | None = None
    causal: bool = False
    grouped: bool = False
    compiled: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.cascade.inputs)

    @property
    def sizes(self) -> tuple[str, ...]:
        return loose(self.cascade)

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        """`function(*tensors, *sizes)`: the cascade's output, in its rank order."""
        found: Callable[..., Tensor] = getattr(cache.load(self.source), self.name)
        return found

    def run(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
        return self.function(*(tensors[n] for n in self.inputs), *(sizes[n] for n in self.sizes))


class Whole(TorchBody):
    """Terms over whole ranks: a tensor that is read plainly is a view, everything else a gather."""

    printer: Printer
    kept: frozenset[Expr]

    @staticmethod
    def of(p: Printer, roots: Sequence[Expr], kept: frozenset[Expr] = frozenset()) -> Whole:
        """`kept`: tensors that keep their type, where they are all of a term."""
        body = Whole(p.scope({}, views=False), roots)
        body.printer, body.kept = p, kept
        body.taken |= p.taken
        return body

    def _load(self, e: Expr) -> Text:
        p, shape = self.printer, self.scope.shapes.get(str(e.attr))
        if shape is not None and e.ranks and e.ranks <= set(p.order) and self.is_plain(e, shape):
            found = view(e, p.order, p.f.heads, p.names)
            if found is not None and found[1] < 2:
                real = p.f.real
                wide = e.dtype == real or not e.is_float or e in self.kept
                return Text(found[0] if wide else f"{found[0]}.to({_torch(real)})", ATOM)
        return super()._load(e)


def _torch(real: str) -> str:
    return {"f32": "torch.float32", "f64": "torch.float64"}[real]


def axes(p: Printer, text: str) -> list[str]:
    """Lines that make the coordinates that a text uses, each along its dimension of [lead..., head, query, key]."""
    used = used_names(text)
    after = {r: len(p.order) - 1 - d for d, r in enumerate(p.order)}
    return [f"{p.ranks[r]} = {p.names.axis(p.names.rank(r), after[r])}" for r in p.order if p.ranks[r] in used]


def result(p: Printer, text: str) -> str:
    """Text of [batch, head, query, value] as the cascade declares its output."""
    f, c = p.f, p.f.cascade
    (e,) = c.producers[c.outputs[0]]
    declared = [str(i.attr) for i in e.out.index]
    at = f.heads
    if not at.head:
        text += "[0, 0]"
    elif not at.lead:
        text += "[0]"
    elif len(at.lead) > 1:
        text += f".unflatten(0, ({', '.join(p.names.rank(r) for r in at.lead)}))"
    order = [*at.order, f.attention.query, f.attention.value]
    if declared != order:
        text += f".permute({', '.join(str(order.index(r)) for r in declared)})"
    return text


def function(p: Printer, name: str, lines: Sequence[str]) -> str:
    """The text of a function of the cascade's inputs and loose sizes."""
    names = p.names
    parameters = [*(names.tensors[t.name] for t in p.f.cascade.inputs), *(names.symbols[s] for s in p.loose)]
    before = [f"{names.tensors[e.out.tensor]} = {einsum(names, p.f.real, e)}" for e in p.f.attention.prelude]
    body = [*sizes(p), *before, *lines]
    used = used_names("\n".join([*before, *lines]))
    body = [x for x in body if x not in sizes(p) or x.split(" = ")[0] in used]
    doc = f"The output {p.f.cascade.outputs[0]}."
    return f'def {name}({", ".join(parameters)}):\n    """{doc}"""\n' + "\n".join(indented(body))


def file(f: Form, title: str, decision: Sequence[str], functions: Sequence[str], more: Sequence[str] = ()) -> str:
    """The whole file; `more` are further import lines."""
    text = "\n\n\n".join(functions)
    loops = skeleton((helpers,), used_names(text))
    head = "\n".join([title, "", LICENCE, "", *show(f.cascade).splitlines(), "", *decision])
    lines = "\n".join([imports("\n".join([text, *loops])), *more])
    return "\n\n\n".join([f'"""{head}\n"""', lines, *loops, text]) + "\n"
