"""The host's side where several programs share the keys of one row block: scratch for their parts, two launches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .host import in_eights, index_type


def launch_split(
    kernels: tuple[Any, Any], constants: tuple[Mapping[str, Any], Mapping[str, Any]], states: int, out: Tensor,
    inputs: tuple[Tensor, ...], sizes: tuple[int, ...], programs: int, row_blocks: int, walk: tuple[Any, ...],
    eights: tuple[int, ...] = (),
) -> Tensor:
    """Run the kernel with several programs a row block, then the one that merges their parts; arguments as `launch`.

    `states`: how many scalars a row carries.
    """
    if out.numel() == 0:
        return out
    listed, blocks = len(walk) > 2, programs * row_blocks
    n_full, n_all = (0, 0) if listed else walk
    first, second = constants
    rows = blocks * first["SPLIT"] * first["BM"]
    part = torch.empty(rows * (first["BF"] + states), dtype=torch.float32, device=out.device)
    common = (
        (out, *out.stride()), tuple((t, *t.stride()) for t in inputs), sizes, walk if listed else (),
        (part, part[rows * first["BF"] :]), row_blocks,
    )
    same = {"INDEX": index_type(out, *inputs), "LISTED": listed}
    with torch.cuda.device_of(out):
        kernels[0][(blocks * first["SPLIT"],)](
            *common, n_full, n_all, EIGHTS=in_eights(out, inputs, eights), **same, **first
        )
        kernels[1][(blocks,)](*common, **same, **second)
    return out
