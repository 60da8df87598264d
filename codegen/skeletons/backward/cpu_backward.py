"""The host's side of the fused CPU backward: operands and what flows back in, their gradients out. Printed into its file.

    q [Z, H, P, E]   k [Z, HKV, M, E]   v [Z, HKV, M, F]   out, grad [Z, H, P, F]   saved [Z, H, P, scalars]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...files.native import Kept, backward_type, load
from ..cpu_fused import FAILURES, dense, operand, read, seen

# Units that a thread should get: where heads are fewer, their keys are cut into segments.
UNITS = 3


@lru_cache(maxsize=8)
def backward_compiled(text: str) -> tuple[Callable[[object], int], int]:
    """The loop's entry, compiled where this machine has not compiled it before, and the floats of one row's sums."""
    library = load(text)
    entry, width = library.backward, library.sum_width
    entry.restype, entry.argtypes = ctypes.c_int, [ctypes.c_void_p]
    width.restype, width.argtypes = ctypes.c_int64, []
    return entry, int(width())


@lru_cache(maxsize=64)
def asked(text: str, bits: int) -> str:
    """The loop's text for a set of wanted leaves."""
    return f"constexpr int LEAVES = {bits};\n{text}"


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


class Gathered(NamedTuple):
    """What reaches leaves: of each read at keys, of those of rows [segments, Z, H, P, ·], of those of rows' ends."""

    kept: list[Tensor]
    rows: Tensor | None
    ends: Tensor | None


class Leaves(NamedTuple):
    """Floats that are no operands: bits of those that are wanted, and where the loop adds up what reaches them.

    `folded`: bits of those that batches share, and heads; `kept`: of each that is read at keys its bit, its kind and, over
    pairs, the elements Z / div % mod of the batch that it has, and whether one for each head; `rows`, `ends`: bits.
    """

    bits: int = 0
    folded: tuple[int, int] = (0, 0)
    kept: Sequence[tuple[int, str, int, int, bool]] = ()
    rows: Sequence[int] = ()
    ends: Sequence[int] = ()

    def units(self, z: int, heads: int) -> int:
        """How many units of the loop there are for each segment of the keys."""
        shared_z, shared_heads = (self.bits & x for x in self.folded)
        return (1 if shared_z else z) * (1 if shared_heads else heads)

    def room(self, segments: int, z: int, h: int, p: int, m: int) -> tuple[Gathered, list[Kept]]:
        """Zeros where the wanted ones are added up, and their addresses; nothing for others."""
        tensors, places = [], []
        for bit, kind, div, mod, heads in self.kept:
            shape = {"keys": (z, h, m), "distances": (segments, z, h, p + m - 1)}.get(kind, (mod, h if heads else 1, p, m))
            made = torch.zeros(shape if self.bits >> bit & 1 else 0, dtype=torch.float32, device="cpu")
            tensors.append(made)
            if not self.bits >> bit & 1:
                places.append(Kept(0, 0, 1, 1, 0, 0, 0))
            elif kind == "keys":
                places.append(Kept(made.data_ptr(), 0, 1, z, h * m, m, 0))
            elif kind == "distances":
                first, z_step, h_step, _ = made.stride()
                places.append(Kept(made.data_ptr() + (p - 1) * made.element_size(), first, 1, z, z_step, h_step, -1))
            else:
                z_step, h_step, _, _ = made.stride()
                places.append(Kept(made.data_ptr(), 0, div, mod, z_step, h_step if heads else 0, m))
        rows, ends = (any(self.bits >> bit & 1 for bit in x) for x in (self.rows, self.ends))
        sums = torch.zeros((segments, z, h, p, len(self.rows)), dtype=torch.float32, device="cpu") if rows else None
        of_ends = torch.empty((z, h, p, len(self.ends)), dtype=torch.float32, device="cpu") if ends else None
        return Gathered(tensors, sums, of_ends), places


NO_LEAVES = Leaves()


def gradients(
    text: str, queries: Sequence[Tensor], keys: Sequence[Tensor], values: Tensor, ends: tuple[Tensor, Tensor, Tensor],
    size: tuple[int, int, int, int, int], classes: Tensor | None, tensors: Sequence[Tensor], sizes: Sequence[int],
    tile_p: int, wanted_leaves: Leaves = NO_LEAVES,
) -> tuple[list[Tensor], Gathered]:
    """The gradients of queries, keys and values, in this order, and what reaches leaves.

    `ends`: out, grad, saved. `size`: Z, H, HKV, P, M.
    """
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
    segments = max(1, min(-(-UNITS * threads // max(1, wanted_leaves.units(z, hkv))), m))
    gathered, places = wanted_leaves.room(segments, z, h, p, m)
    kept = (Kept * len(places))(*places)
    sums = torch.empty((segments, z, h, tiles * tile_p * width), dtype=torch.float32, device="cpu")
    one = type(operand(values)) * n
    data, numbers = read(tensors, sizes)
    wanted = any(x.requires_grad for x in queries) + 2 * any(x.requires_grad for x in keys) + 4 * values.requires_grad
    call = backward_type(n)(
        one(*map(operand, queries)), one(*map(operand, keys)), operand(values), operand(out), operand(grad),
        one(*map(operand, made[:n])), one(*map(operand, made[n:-1])), operand(made[-1]), saved.data_ptr(), sums.data_ptr(),
        segments, *size, *seen(classes), threads, wanted, ctypes.addressof(data), ctypes.addressof(numbers),
        ctypes.addressof(kept) if places else 0, *(0 if x is None else x.data_ptr() for x in gathered[1:]),
    )
    failed = entry(ctypes.addressof(call))
    if failed:
        raise RuntimeError(f"the fused attention backward failed with number {failed}: {FAILURES.get(failed, 'unknown')}")
    return [g if g.shape == x.shape else g.sum_to_size(x.shape) for g, x in zip(made, operands)], gathered
