"""The host's side of a streaming kernel in plain torch: tile classes and lists, index width, the launch.

    classes [lists, row blocks, key tiles]    0: no key kept    1: some    2: all    (uint8, on the kernel's device)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Elements of a mask that are evaluated at once.
CHUNK = 1 << 24


def tile_classes(
    kept: Callable[[Tensor, Tensor], Tensor], lists: int, queries: int, keys: int, tile_p: int, tile_m: int,
    skip: str, device: torch.device,
) -> Tensor:
    """Evaluate a mask block by block.

    `skip`: which tiles without a kept key are left out: "always" all, "guarded" those of row blocks in which every row
    keeps a key, "never" none.
    """
    n_p, n_m = -(-queries // tile_p), -(-keys // tile_m)
    # The last row and key stand for those past the end: they change neither "some" nor "all".
    m = torch.arange(n_m * tile_m, device=device).clamp(max=keys - 1)
    step = max(1, CHUNK // (lists * tile_p * n_m * tile_m))
    parts = []
    for first in range(0, n_p, step):
        count = min(step, n_p - first)
        p = torch.arange(first * tile_p, (first + count) * tile_p, device=device).clamp(max=queries - 1)
        keep = kept(p[:, None], m[None, :]).expand(lists, count * tile_p, n_m * tile_m)
        tiles = keep.reshape(lists, count, tile_p, n_m, tile_m)
        some, every = tiles.any(4).any(2), tiles.all(4).all(2)
        if skip != "always":
            alive = keep.any(-1).view(lists, count, tile_p).all(-1)
            some = some | ~alive[:, :, None] if skip == "guarded" else torch.ones_like(some)
        parts.append(some.to(torch.uint8) + every.to(torch.uint8))
    return torch.cat(parts, 1)


def tile_lists(classes: Tensor, ragged: bool, heavy_first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(row blocks in the order of the programs, full tiles, all tiles, key tiles with the full ones first, width).

    `ragged`: the last key tile reaches past the end, so it is never full. A program reads its list one number ahead, so that
    each has one number more.
    """
    if ragged:
        classes = torch.cat([classes[..., :-1], classes[..., -1:].clamp(max=1)], -1)
    n_full, n_all = (classes == 2).sum(-1), (classes != 0).sum(-1)
    keys = torch.argsort(classes, dim=-1, descending=True, stable=True)
    rows = torch.arange(classes.shape[1], device=classes.device).expand(classes.shape[:2])
    if heavy_first:
        rows = torch.argsort(n_all, dim=-1, descending=True, stable=True)
        n_full, n_all = n_full.gather(1, rows), n_all.gather(1, rows)
        keys = keys.gather(1, rows[:, :, None].expand(keys.shape))
    keys = torch.cat([keys, keys[..., :1]], -1)
    rows, n_full, n_all, keys = (t.to(torch.int32).contiguous() for t in (rows, n_full, n_all, keys))
    return rows, n_full, n_all, keys, keys.shape[2]


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

    `walk` is (full tiles, all tiles) when every row block visits every key tile, else the lists of `tile_lists`. `eights`:
    places of inputs whose strides may be multiples of 8.
    """
    if out.numel() == 0:
        return out
    listed = len(walk) > 2
    n_full, n_all = (0, 0) if listed else walk
    with torch.cuda.device_of(out):
        kernel[(programs * row_blocks,)](
            (out, *out.stride()), tuple((t, *t.stride()) for t in inputs), sizes, walk if listed else (), (), row_blocks,
            n_full, n_all, INDEX=index_type(out, *inputs), LISTED=listed,
            EIGHTS=in_eights(out, inputs, eights), **constants,
        )
    return out
