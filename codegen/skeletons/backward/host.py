"""The host's side of a kernel that is trained, in plain torch: three launches, and a gradient as its tensor lies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import index_type


def given(*tensors: Tensor) -> tuple[Any, ...]:
    """Each with its strides, as kernels take them."""
    return tuple((t, *t.stride()) for t in tensors)


def launch_trained(
    kernel: Any, constants: Mapping[str, Any], out: Tensor, saved: Tensor, inputs: tuple[Tensor, ...],
    sizes: tuple[int, ...], programs: int, row_blocks: int, walk: tuple[Any, ...],
) -> None:
    """The forward, which hands row scalars over: `saved` [programs, rows, scalars]."""
    if out.numel() == 0:
        return
    listed = len(walk) > 2
    n_full, n_all = (0, 0) if listed else walk
    with torch.cuda.device_of(out):
        kernel[(programs * row_blocks,)](
            (out, *out.stride(), saved), given(*inputs), sizes, walk if listed else (), (), row_blocks, n_full, n_all, 1,
            INDEX=index_type(out, saved, *inputs), LISTED=listed, EIGHTS=False, **constants,
        )


def launch_backward(
    kernels: tuple[Any, Any], constants: tuple[Mapping[str, Any], Mapping[str, Any]], grads: tuple[Tensor, ...],
    ends: tuple[Tensor, Tensor, Tensor], inputs: tuple[Tensor, ...], sizes: tuple[int, ...], programs: int, queries: int,
    walk: tuple[Any, ...], keyed: tuple[int, int, int], sums: int, leaves: tuple[Tensor, ...] = (),
    bits: tuple[int, int] = (0, 0),
) -> None:
    """The gradients of queries, which sum over values as well, then those of keys and values.

    `ends`: out, its gradient and `saved`. `keyed`: programs of keys, how many programs of rows share one's keys, keys.
    `leaves`: where what reaches each leaf goes; `bits` of those that each kernel adds up.
    """
    out, dout, saved = ends
    rows, keys = constants
    of_row = torch.empty((programs, queries, sums), dtype=torch.float32, device=out.device)
    if out.numel() == 0 or keyed[2] == 0:
        for g in grads:
            g.zero_()
        return
    listed = len(walk) > 2
    n_full, n_all = (0, 0) if listed else walk
    index = index_type(out, dout, saved, *grads, *inputs)
    row_blocks, blocks = -(-queries // rows["BM"]), -(-keyed[2] // keys["BN"])
    shared = (given(out)[0], given(dout)[0], saved, of_row, given(*inputs), sizes)
    with torch.cuda.device_of(out):
        kernels[0][(programs * row_blocks,)](
            grads, leaves, *shared, walk if listed else (), row_blocks, queries, n_full, n_all, INDEX=index, LISTED=listed,
            LEAVES=bits[0], **rows,
        )
        kernels[1][(keyed[0] * blocks,)](
            grads, leaves, *shared, blocks, queries, keyed[2], keyed[1], INDEX=index, LEAVES=bits[1], **keys
        )


Part = tuple[Tensor, Sequence[int], Sequence[int], Sequence[int | None]]


def room(bits: int, shapes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Zeros where what reaches each wanted leaf goes; a number where nobody wants it."""
    made = (shape if bits >> i & 1 else (1,) for i, shape in enumerate(shapes))
    return tuple(torch.zeros(tuple(shape), dtype=torch.float32, device=device) for shape in made)


def looked_up(part: Tensor, at: Sequence[Tensor | int], like: Tensor) -> Tensor:
    """The gradient of a tensor that is read at computed places: summed there in the same order every time."""
    place = torch.zeros((1,) * part.dim(), dtype=torch.int64, device=part.device)
    for i, step in zip(at, like.contiguous().stride()):
        place = place + i * step
    part = part.sum_to_size(place.shape)
    made = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
    return made.index_put_((place.reshape(-1),), part.reshape(-1), accumulate=True).view(like.shape).to(like.dtype)


def total(parts: Sequence[Part], like: Tensor) -> Tensor:
    """The gradient of an input: the sum over the operands that read it."""
    made = torch.zeros_like(like)
    for buffer, summed, order, place in parts:
        if summed:
            buffer = buffer.sum(tuple(summed))
        # dense over ranks: in the tensor's own order, at the one place that the operand reads of what it lacks
        made[tuple(slice(None) if i is None else i for i in place)] += buffer.permute(tuple(order)).to(like.dtype)
    return made
