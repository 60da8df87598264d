"""The host's side of the fused CPU backward: operands and what flows back in, their gradients out. Printed into its file.

    q [Z, H, P, E]   k [Z, HKV, M, E]   v [Z, HKV, M, F]   out, grad [Z, H, P, F]   saved [Z, H, P, scalars]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ...files.native import backward_type, load
from ..cpu_fused import FAILURES, dense, operand, read, seen

# Units that a thread should get: where heads are fewer, their keys are cut into segments.
UNITS = 3


@lru_cache(maxsize=1)
def backward_compiled(text: str) -> tuple[Callable[[object], int], int]:
    """The loop's entry, compiled where this machine has not compiled it before, and the floats of one row's sums."""
    library = load(text)
    entry, width = library.backward, library.sum_width
    entry.restype, entry.argtypes = ctypes.c_int, [ctypes.c_void_p]
    width.restype, width.argtypes = ctypes.c_int64, []
    return entry, int(width())


def leaves(given: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
    """The inputs, of which those in the wanted places begin a tape of their own."""
    return [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]


def inputs_gradients(
    operands: Sequence[Tensor], gradients: Sequence[Tensor], given: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """The gradients of the inputs in the wanted places, from those of the operands that are made of them."""
    ends = [(x, g) for x, g in zip(operands, gradients) if x.requires_grad]
    begins = [given[i] for i in wanted]
    if not ends:
        return [torch.zeros_like(x) for x in begins]
    found = torch.autograd.grad([x for x, _ in ends], begins, [g for _, g in ends], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(begins, found)]


def gradients(
    text: str, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Tensor, ends: tuple[Tensor, Tensor, Tensor],
    size: tuple[int, int, int, int, int], classes: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int],
    tile_p: int,
) -> list[Tensor]:
    """The gradients of queries, keys and values, in this order. `ends`: out, grad, saved. `size`: Z, H, HKV, P, M."""
    # hooks on what is saved may hand it back in another layout
    out, grad, saved = dense(ends[0]), dense(ends[1]), ends[2].contiguous()
    z, h, hkv, p, m = size
    operands = [*queries, *keys, values]
    shapes = [(z, h, p, x.shape[3]) for x in queries] + [(z, hkv, m, x.shape[3]) for x in (*keys, values)]
    made = [torch.empty_like(x) if x.shape == s else x.new_empty(s) for x, s in zip(operands, shapes)]
    made = [x if x.stride(3) == 1 else x.contiguous() for x in made]
    n, threads = len(queries), torch.get_num_threads()
    entry, width = backward_compiled(text)
    tiles = -(-p // tile_p)
    segments = max(1, min(-(-UNITS * threads // max(1, z * hkv)), m))
    sums = torch.empty((segments, z, h, tiles * tile_p * width), dtype=torch.float32, device="cpu")
    one = type(operand(values)) * n
    data, numbers = read(tensors, sizes)
    wanted = any(x.requires_grad for x in queries) + 2 * any(x.requires_grad for x in keys) + 4 * values.requires_grad
    call = backward_type(n)(
        one(*map(operand, queries)), one(*map(operand, keys)), operand(values), operand(out), operand(grad),
        one(*map(operand, made[:n])), one(*map(operand, made[n:-1])), operand(made[-1]), saved.data_ptr(), sums.data_ptr(),
        segments, *size, *seen(classes), threads, wanted, ctypes.addressof(data), ctypes.addressof(numbers),
    )
    failed = entry(ctypes.addressof(call))
    if failed:
        raise RuntimeError(f"the fused attention backward failed with number {failed}: {FAILURES.get(failed, 'unknown')}")
    return [g if g.shape == x.shape else g.sum_to_size(x.shape) for g, x in zip(made, operands)]
