"""Autocast and grad mode while a graph is traced: the nodes that switch them act on this thread."""

from __future__ import annotations

import torch
from torch import fx

from ..graph import torch_private
from .autocast import DEVICES


def modes() -> object:
    """All that is around a call and that its trace depends on."""
    cast = (d for d in DEVICES if torch.amp.is_autocast_available(d))
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
        *((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in cast),
    )


class Switches:
    """The regions of autocast that a walk over a graph is in."""

    def __init__(self) -> None:
        self.regions: dict[fx.Node, tuple[str, bool, torch.dtype]] = {}

    def act(self, n: fx.Node) -> None:
        """Do to this thread what a node does where the graph runs. Tracing records regions, but does not enter them."""
        if n.target is torch_private.SET_GRAD:
            torch.set_grad_enabled(bool(n.args[0]))
        elif n.target is torch_private.ENTER_AUTOCAST:
            device, dtype, enabled, *_ = n.args
            name = str(device)
            self.regions[n] = (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name))
            _set(name, bool(enabled), dtype)  # type: ignore[arg-type]
        elif n.target is torch_private.EXIT_AUTOCAST:
            _set(*self.regions.pop(n.args[0]))  # type: ignore[arg-type]

    def leave(self) -> None:
        """Restore the state around the graph where an error left a region open."""
        while self.regions:
            _set(*self.regions.popitem()[1])


def _set(device: str, enabled: bool, dtype: torch.dtype | None) -> None:
    torch.set_autocast_enabled(device, enabled)
    if dtype is not None:
        torch.set_autocast_dtype(device, dtype)
    torch.clear_autocast_cache()
