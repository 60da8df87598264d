"""The operator of an attention with further outputs: weights, their averages, numbers of rows beside what it yields.

    cascade_several(Tensor[] tensors, SymInt[] sizes, str program) -> Tensor[]        as reattend::cascade takes them

The program's cascade names its outputs, the attention's own first. It has no backward and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cost_model.devices.device import Device
from ..patterns.cascade import Cascade
from ..patterns.evaluate import DTYPE
from ..patterns.mapping import TileMapping
from ..patterns.passes.further import Several, main, several
from ..patterns.verdict import Obstacle, Refusal
from .cpu import whole
from .cpu.kernel import NAME, version
from .files import cache
from .forms.form import form
from .forms.program import Program, loose, output_shape, read_program
from .operator import NO_GRADIENT, allocate, library
from .text.printer import PrintError

__all__ = ["SeveralKernel", "build", "call"]

library.define(  # type: ignore[no-untyped-call]
    "cascade_several(Tensor[] tensors, SymInt[] sizes, str program) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)


@dataclass(frozen=True)
class SeveralKernel:
    """A printed kernel with several outputs: the file's text, and a call that runs it on `inputs`, in order, and `sizes`."""

    source: str
    inputs: tuple[str, ...]
    sizes: tuple[str, ...]
    entry: Callable[..., tuple[Tensor, ...]]


@lru_cache(maxsize=512)
def build(c: Cascade, mapping: TileMapping, target: Device | None = None) -> SeveralKernel | Refusal:
    """The kernel of a cascade with further outputs, or why there is none."""
    if target is not None and target.kind != "cpu":
        return Refusal("several", "what else is read of its scores leaves no kernel on a GPU yet")
    s, f = several(c), form(main(c))
    if isinstance(s, Obstacle) or isinstance(f, Obstacle):
        return Refusal(NAME, str(s if isinstance(s, Obstacle) else f))
    if mapping.body != "whole":
        return Refusal(f"{NAME} {mapping.body}", "the body of whole rows alone has further outputs")
    assert isinstance(s, Several)
    try:
        source = whole.text(f, s, mapping, version())
    except PrintError as no:
        return Refusal(f"{NAME} {mapping.body}", str(no))
    made = cache.load(source)
    return SeveralKernel(source, tuple(t.name for t in f.cascade.inputs), loose(f.cascade), made.attention)


def call(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, ...]:
    """The outputs, as a graph's call has them."""
    return tuple(torch.ops.reattend.cascade_several.default(tensors, sizes, program))


@lru_cache(maxsize=1024)
def _kernel(program: str) -> SeveralKernel:
    p = read_program(program)
    made = build(p.cascade, p.mapping)
    if isinstance(made, Refusal):
        raise RuntimeError(f"reattend::cascade_several cannot run: {made}")
    return made


def _refuse_gradients(tensors: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(NO_GRADIENT)


def _run(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> list[Tensor]:
    _refuse_gradients(tensors)
    made, p = _kernel(program), read_program(program)
    given = dict(zip((t.name for t in p.cascade.inputs), tensors))
    known = dict(zip(p.loose, sizes))
    with torch.autocast(next(t.device.type for t in tensors if t.dim()), enabled=False):
        return list(made.entry(*(given[n] for n in made.inputs), **{n: known[n] for n in made.sizes}))


library.impl("cascade_several", _run, "CPU")  # type: ignore[no-untyped-call]


@torch.library.register_fake("reattend::cascade_several", lib=library)  # type: ignore[untyped-decorator]
def _fake(tensors: Sequence[Tensor], sizes: Sequence[Any], program: str) -> list[Tensor]:
    _refuse_gradients(tensors)
    p = read_program(program)
    given = dict(zip((t.name for t in p.cascade.inputs), tensors))
    own = Program(main(p.cascade), p.mapping)
    known: Mapping[str, Any] = dict(zip(p.loose, sizes))
    first = allocate(own, [given[t.name] for t in own.cascade.inputs], [known[n] for n in own.loose])
    return [first, *(_made(p.cascade, name, given, known) for name in p.cascade.outputs[1:])]


def _made(c: Cascade, name: str, given: Mapping[str, Tensor], known: Mapping[str, Any]) -> Tensor:
    shape = output_shape(c, {n: t.shape for n, t in given.items()}, known, name)
    return next(iter(given.values())).new_empty(shape, dtype=DTYPE[c.tensor[name].dtype])
