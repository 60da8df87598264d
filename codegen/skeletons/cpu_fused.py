"""The host's side of the fused CPU kernel: tensors in, one structure of addresses and strides out. Printed into its file.

    q [Z, H, P, E]   k [Z, HKV, M, E]   v [Z, HKV, M, F]   out [Z, H, P, F]      H / HKV neighbouring heads share their keys

A dimension of one element stands for all: its stride is 0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..files.native import Operand, call_type, load


@lru_cache(maxsize=1)
def compiled(text: str) -> Callable[[object], int]:
    """The loop's entry, compiled where this machine has not compiled it before."""
    entry = load(text).attention
    entry.restype, entry.argtypes = ctypes.c_int, [ctypes.c_void_p]
    return entry


def expect(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse memory that is not laid out as the C++ reads it."""
    if t.dtype != dtype or t.shape != shape or not t.is_cpu:
        raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; this kernel reads {dtype} {shape} on the cpu")


def dense(t: Tensor) -> Tensor:
    """The tensor with its last dimension without gaps."""
    return t if t.stride(3) == 1 else t.contiguous()


def unit(t: Tensor, d: int) -> Tensor:
    """The tensor with the elements along a dimension next to one another; what is repeated is not copied."""
    if t.stride(d) == 1 or t.shape[d] == 1:
        return t
    once = t[tuple(slice(0, 1) if s == 0 and i != d else slice(None) for i, s in enumerate(t.stride()))]
    return once.movedim(d, -1).contiguous().movedim(-1, d).expand(t.shape)


def operand(t: Tensor) -> Operand:
    z, h, n, _ = t.stride()
    return Operand(t.data_ptr(), z if t.shape[0] > 1 else 0, h if t.shape[1] > 1 else 0, n)


def tile_classes(some: Tensor, every: Tensor, skip: Tensor | bool, shape: tuple[int, int]) -> Tensor:
    """Classes of tiles, uint8 [Z or 1, H or 1, tiles of queries, tiles of keys]: 0 empty, 1 partial, 2 full.

    Bool, broadcast to that shape: `some`, is some point of the tile kept? `every`, are all? `skip`: may empty tiles be
    skipped, everywhere or for each tile of queries [.., tiles of queries]?
    """
    if not isinstance(skip, bool):
        # a full tile proves as well that its rows keep a key
        some = some | ~(skip | every.any(-1)).unsqueeze(-1)
    elif not skip:
        some = torch.ones_like(some)
    found = (some | every).to(torch.uint8) + every
    return found[(None,) * (4 - found.dim())].expand(-1, -1, *shape).contiguous()


@lru_cache(maxsize=256)
def all_partial(rows: int, columns: int) -> Tensor:
    """Classes under which every tile is visited and masked."""
    return torch.ones((1, 1, rows, columns), dtype=torch.uint8, device="cpu")


def seen(classes: Tensor | None) -> tuple[int, int, int, int]:
    """Where the classes of tiles lie, and their strides; nothing where all tiles are full."""
    if classes is None:
        return 0, 0, 0, 0
    z, h, p, _ = classes.stride()
    return classes.data_ptr(), z if classes.shape[0] > 1 else 0, h if classes.shape[1] > 1 else 0, p


def read(
    tensors: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64]]:
    """What a printed program loads: addresses and sizes."""
    addresses = (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])
    return addresses, (ctypes.c_int64 * len(sizes))(*sizes)


def run(
    text: str, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Tensor, out: Tensor,
    size: tuple[int, int, int, int, int], classes: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int],
    saved: Tensor | None = None,
) -> None:
    """Compute `out` [Z, H, P, F]. `size`: Z, H, HKV, P, M. `tensors`, `sizes`: what the printed program loads.

    `saved` [Z, H, P, scalars], float32: what a row hands over, of a program that does.
    """
    one = Operand * len(queries)
    z, h, p, _ = out.stride()
    data, numbers = read(tensors, sizes)
    more = () if saved is None else (saved.data_ptr(),)
    call = call_type(len(queries), saved is not None)(
        one(*map(operand, queries)), one(*map(operand, keys)), operand(values), out.data_ptr(), z, h, p, *size,
        *seen(classes), torch.get_num_threads(), ctypes.addressof(data), ctypes.addressof(numbers), *more,
    )
    failed = compiled(text)(ctypes.addressof(call))
    if failed:
        raise RuntimeError(f"the fused attention kernel failed with number {failed}: {FAILURES.get(failed, 'unknown')}")


# What the C++ answers.
FAILURES = {1: "there is not enough memory for a thread's scratch", 2: "the system refuses the matrix registers"}
