"""The operators that are trained: the cascade's output with what its rows hand over, and the inputs' gradients from both.

    cascade_trained(tensors, sizes, program) -> (out, saved)            as reattend::cascade takes them
    cascade_backward(grad, out, saved, tensors, sizes, program, int[] wanted) -> Tensor[]

`saved` is float32 [Z, H, P, scalars]; the first are numbers of the row that leave the cascade as further outputs
(`numbers`), and have gradients themselves. A gradient of a gradient is refused where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cost_model.devices.device import Device
from ..patterns.backward.reached import reached
from ..patterns.cascade import Cascade
from ..patterns.mapping import TileMapping
from ..patterns.verdict import Refusal
from .cpu.kernel import BODIES_TRAINED, TrainedKernel, build_trained
from .forms.program import output_shape, read_program
from .operator import allocate, library
from .triton.backward import kernel as triton_kernel

__all__ = ["BODIES", "NO_SECOND", "TrainedKernel", "build", "call", "numbers"]

BODIES = frozenset((*BODIES_TRAINED, "triton"))

NO_SECOND = "reattend::cascade_backward has no derivative: differentiate the model's own code twice (reattend.restore)"

library.define(  # type: ignore[no-untyped-call]
    "cascade_trained(Tensor[] tensors, SymInt[] sizes, str program) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
library.define(  # type: ignore[no-untyped-call]
    "cascade_backward(Tensor grad, Tensor out, Tensor saved, Tensor[] tensors, SymInt[] sizes, str program, int[] wanted)"
    " -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,),
)


def build(c: Cascade, mapping: TileMapping, target: Device | None = None) -> TrainedKernel | Refusal:
    """The kernel with its backward, a GPU's for body "triton", or why there is none (on a device, that it does not fit)."""
    if mapping.body != "triton":
        return build_trained(c, mapping)
    made = triton_kernel.build(c, mapping, target)
    if isinstance(made, Refusal):
        return made
    return TrainedKernel(
        made.source, made.inputs, made.sizes, made.forward, made.backward, made.without, reached(c), made.scalars,
        made.row_dims,
    )


def call(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> Tensor:
    """The output, whose gradient the kernel computes as well."""
    out: Tensor = torch.ops.reattend.cascade_trained.default(tensors, sizes, program)[0]
    return out


def numbers(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, ...]:
    """All outputs of a cascade whose further ones are numbers of its rows: these in float32, as it declares them."""
    out, saved = torch.ops.reattend.cascade_trained.default(tensors, sizes, program)
    rows = [out.shape[d] for dims in _kernel(program).row_dims for d in dims]
    held = (saved[..., i].reshape(rows).permute(order) for i, (order, _) in enumerate(_places(program)))
    return (out, *(x.reshape([out.shape[d] for d in dims]) for x, (_, dims) in zip(held, _places(program))))


@lru_cache(maxsize=1024)
def _places(program: str) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """For each number of the row: the order of the kernel's row dimensions in it, and the output's dimensions that it has.

    The kernel's may lack one of a single element.
    """
    c, made = read_program(program).cascade, _kernel(program)
    (last,) = c.producers[c.outputs[0]]
    held = [last.out.index[d] for dims in made.row_dims for d in dims]
    own = [c.producers[name][-1].out.index for name in c.outputs[1:]]
    return tuple(
        (tuple(held.index(i) for i in at if i in held), tuple(last.out.index.index(i) for i in at)) for at in own
    )


@lru_cache(maxsize=1024)
def _kernel(program: str) -> TrainedKernel:
    p = read_program(program)
    made = build(p.cascade, p.mapping)
    if isinstance(made, Refusal):
        raise RuntimeError(f"reattend::cascade_trained cannot run: {made}")
    return _as_called(made, tuple(t.name for t in p.cascade.inputs), p.loose)


def _as_called(made: TrainedKernel, names: tuple[str, ...], loose: tuple[str, ...]) -> TrainedKernel:
    """The kernel on inputs and sizes in the program's order: its file has them as the attention's own cascade reads them."""
    if (made.inputs, made.sizes) == (names, loose):
        return made
    at = [names.index(n) for n in made.inputs]

    def forward(*tensors: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
        return made.forward(*[tensors[i] for i in at], **{n: sizes[n] for n in made.sizes})

    def backward(
        grad: Tensor, out: Tensor, saved: Tensor, wanted: Sequence[int], *tensors: Tensor, **sizes: int
    ) -> list[Tensor]:
        given, known = [tensors[i] for i in at], {n: sizes[n] for n in made.sizes}
        return made.backward(grad, out, saved, [at.index(i) for i in wanted], *given, **known)

    return replace(made, inputs=names, sizes=loose, forward=forward, backward=backward)


def _device(tensors: Sequence[Tensor]) -> str:
    """Numbers without dimensions may lie on the host."""
    return next(t.device.type for t in tensors if t.dim())


def _trained(tensors: Sequence[Tensor], sizes: Sequence[int], program: str) -> tuple[Tensor, Tensor]:
    made = _kernel(program)
    with torch.no_grad(), torch.autocast(_device(tensors), enabled=False):
        return made.forward(*tensors, **dict(zip(made.sizes, sizes)))


def _backward(
    grad: Tensor, out: Tensor, saved: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int], program: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    made = _kernel(program)
    with torch.no_grad(), torch.autocast(_device(tensors), enabled=False):
        found = made.backward(grad, out, saved, wanted, *tensors, **dict(zip(made.sizes, sizes)))
        return [_laid_as(g, tensors[i]) for g, i in zip(found, wanted)]


def _laid_as(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in memory as the fake kernel promises it."""
    made = torch.empty_like(like)
    return gradient if gradient.stride() == made.stride() else made.copy_(gradient)


for _key in ("CPU", "CUDA"):
    library.impl("cascade_trained", _trained, _key)  # type: ignore[no-untyped-call]
    library.impl("cascade_backward", _backward, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("reattend::cascade_trained", lib=library)  # type: ignore[untyped-decorator]
def _fake(tensors: Sequence[Tensor], sizes: Sequence[Any], program: str) -> tuple[Tensor, Tensor]:
    p, made = read_program(program), _kernel(program)
    c = p.cascade
    shape = output_shape(c, {t.name: x.shape for t, x in zip(c.inputs, tensors)}, dict(zip(p.loose, sizes)))
    rows = [1, 1, 1]
    for rows_dim, dims in enumerate(made.row_dims):
        for d in dims:
            rows[rows_dim] = rows[rows_dim] * shape[d]
    return allocate(p, tensors, sizes), tensors[0].new_empty((*rows, made.scalars), dtype=torch.float32)


@torch.library.register_fake("reattend::cascade_backward", lib=library)  # type: ignore[untyped-decorator]
def _fake_backward(
    grad: Tensor, out: Tensor, saved: Tensor, tensors: Sequence[Tensor], sizes: Sequence[Any], program: str,
    wanted: Sequence[int],
) -> list[Tensor]:
    return [torch.empty_like(tensors[i]) for i in wanted]


@torch.library.register_vmap("reattend::cascade_backward", lib=library)  # type: ignore[untyped-decorator]
def _mapped_backward(info: Any, in_dims: Any, *given: Any) -> tuple[list[Tensor], list[int]]:
    """One backward after the other: `is_grads_batched`, a Jacobian."""
    grad, out, saved, tensors, *rest = given
    dims, held = (*in_dims[:3], *in_dims[3]), (grad, out, saved, *tensors)
    each = []
    for i in range(info.batch_size):
        g, o, s, *x = (t if d is None else t.select(d, i) for t, d in zip(held, dims, strict=True))
        each.append(torch.ops.reattend.cascade_backward.default(g, o, s, x, *rest))
    made = [torch.stack(found) for found in zip(*each, strict=True)]
    return made, [0] * len(made)


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated, beside what they were made of."""

    @staticmethod
    def forward(ctx: Any, count: int, *given: Tensor) -> Any:
        return tuple(x.view_as(x) for x in given[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(NO_SECOND)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.sizes, ctx.program = inputs
    made, p = _kernel(ctx.program), read_program(ctx.program)
    ctx.wanted = [i for i, x in enumerate(tensors) if x.requires_grad and p.cascade.inputs[i].name in made.reached]
    lacking = [p.cascade.inputs[i].name for i in ctx.wanted if p.cascade.inputs[i].name in made.without]
    if lacking:
        raise RuntimeError(f"reattend::cascade_trained gives no gradient of {', '.join(lacking)}")
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _flow(ctx: Any, grad: Tensor | None, of_saved: Tensor | None) -> Any:
    out, saved, *tensors = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * len(tensors)
    leaving = len(read_program(ctx.program).cascade.outputs) - 1
    if leaving and (grad is not None or of_saved is not None):
        # the gradient of what leaves stands where that stood
        saved = saved.clone()
        saved[..., :leaving] = 0 if of_saved is None else of_saved[..., :leaving]
        grad = torch.zeros_like(out) if grad is None else grad
    # torch takes a list of numbers for one argument, and an empty one for a list of tensors
    answer: tuple[Any, ...] = (gradients, None if ctx.sizes else [], None)
    if grad is None:
        return answer
    with torch.no_grad():
        found = torch.ops.reattend.cascade_backward.default(grad, out, saved, tensors, ctx.sizes, ctx.program, ctx.wanted)
    if torch.is_grad_enabled():
        found = _Once.apply(len(found), *found, grad, *tensors)  # type: ignore[no-untyped-call]
    for i, g in zip(ctx.wanted, found):
        gradients[i] = g
    return answer


torch.library.register_autograd("reattend::cascade_trained", _flow, setup_context=_keep, lib=library)
