"""The host's side where several programs share the keys of one row block: scratch for their parts, two launches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .host import in_eights, index_type

# What a program should have to stream, and programs that a unit runs side by side.
LEAST_TILES, RESIDENT = 4, 2


def parts_of(planned: int, blocks: int, key_tiles: int, device: torch.device) -> int:
    """How many programs share the keys of a row block: enough to keep every unit busy, of so many keys as there are now.

    `planned` where nobody tells how many units there are.
    """
    if device.type != "cuda":
        return planned
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-RESIDENT * units // blocks), key_tiles // LEAST_TILES))


def launch_split(
    kernels: tuple[Any, Any], constants: tuple[Mapping[str, Any], Mapping[str, Any]], states: int, out: Tensor,
    inputs: tuple[Tensor, ...], sizes: tuple[int, ...], programs: int, row_blocks: int, walk: tuple[Any, ...],
    eights: tuple[int, ...] = (), *, planned: int,
) -> Tensor:
    """Run the kernel with several programs a row block, then the one that merges their parts; arguments as `launch`.

    `states`: how many scalars a row carries; `planned`: programs a row block at the sizes that it was planned for.
    """
    if out.numel() == 0:
        return out
    listed, blocks = len(walk) > 2, programs * row_blocks
    n_full, n_all = (0, 0) if listed else walk
    first, second = constants
    n_split = parts_of(planned, blocks, walk[-1] - 1 if listed else n_all, out.device)
    rows = blocks * n_split * first["BM"]
    part = torch.empty(rows * (first["BF"] + states), dtype=torch.float32, device=out.device)
    common = (
        (out, *out.stride()), tuple((t, *t.stride()) for t in inputs), sizes, walk if listed else (),
        (part, part[rows * first["BF"] :]), row_blocks,
    )
    same = {"INDEX": index_type(out, *inputs), "LISTED": listed}
    with torch.cuda.device_of(out):
        kernels[0][(blocks * n_split,)](
            *common, n_full, n_all, n_split, EIGHTS=in_eights(out, inputs, eights), **same, **first
        )
        kernels[1][(blocks,)](*common, n_split, **same, **second)
    return out
