"""The host's side of listing tiles: one launch and one sort, no look at what they find; lists that sizes decide are kept."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .host import index_type

# Lists that no tensor decides, by kernel, sizes, device and stream: at most so many.
MOST_LISTS = 64
LISTS: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def tile_lists(
    kernel: Any, constants: Mapping[str, Any], inputs: tuple[Tensor, ...], sizes: tuple[int, ...], lists: int,
    row_blocks: int, keys: int, heavy_first: bool, device: torch.device,
) -> tuple[Tensor, ...]:
    """(row blocks in the order of the programs, full tiles, all tiles, key tiles), as the kernel of `lists` leaves them.

    Nothing waits for the device, so that a CUDA graph may hold it.
    """
    width = -(-keys // constants["BN"]) + 1
    full, every = (torch.empty((lists, row_blocks), dtype=torch.int32, device=device) for _ in range(2))
    found = torch.empty((lists, row_blocks, width), dtype=torch.int32, device=device)
    if found.numel() == 0:
        return full, full, every, found
    with torch.cuda.device_of(found):
        kernel[(lists * row_blocks,)](
            full, every, found, tuple((t, *t.stride()) for t in inputs), sizes, row_blocks, keys,
            INDEX=index_type(*inputs), **constants,
        )
    order = every if heavy_first else torch.zeros_like(every)
    return torch.argsort(order, dim=-1, descending=True, stable=True), full, every, found


def kept_lists(make: Callable[[], tuple[Tensor, ...]], key: tuple[Any, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Lists made once for a key. One that is born inside the capture of a CUDA graph belongs to the graph alone."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return make()
        # made by one stream, they are not ready for another
        key = (*key, torch.cuda.current_stream(device).cuda_stream)
    if key not in LISTS:
        while len(LISTS) >= MOST_LISTS:
            LISTS.pop(next(iter(LISTS)))
        LISTS[key] = make()
    return LISTS[key]
