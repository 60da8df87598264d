"""The host's side of a streaming kernel in plain torch: index width, what strides are multiples of, the launch."""

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def index_type(*tensors: Tensor) -> Any:
    """int32 where it reaches every element of the tensors, else int64."""
    reach = max(sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride())) for t in tensors)
    return tl.int64 if reach >= 2**31 else tl.int32


def in_eights(out: Tensor, inputs: tuple[Tensor, ...], places: tuple[int, ...]) -> bool:
    """May a kernel count on multiples of 8 in the strides of the output and of the inputs at these places?"""
    tensors = (out, *(inputs[i] for i in places))
    outer = [(n, x) for t in tensors for n, x in zip(t.shape[:-1], t.stride()[:-1])]
    return bool(places) and all(x % 8 == 0 for n, x in outer if n > 1)


def launch(
    kernel: Any, constants: Mapping[str, Any], out: Tensor, inputs: tuple[Tensor, ...], sizes: tuple[int, ...],
    programs: int, row_blocks: int, walk: tuple[Any, ...], eights: tuple[int, ...] = (),
) -> Tensor:
    """Run `kernel` on a grid of `programs` · `row_blocks`.

    `walk` is (full tiles, all tiles) when every row block visits every key tile, else its lists (`lists`). `eights`:
    places of inputs whose strides may be multiples of 8.
    """
    if out.numel() == 0:
        return out
    listed = len(walk) > 2
    n_full, n_all = (0, 0) if listed else walk
    with torch.cuda.device_of(out):
        kernel[(programs * row_blocks,)](
            (out, *out.stride()), tuple((t, *t.stride()) for t in inputs), sizes, walk if listed else (), (), row_blocks,
            n_full, n_all, 1, INDEX=index_type(out, *inputs), LISTED=listed,
            EIGHTS=in_eights(out, inputs, eights), **constants,
        )
    return out
