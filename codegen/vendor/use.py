"""The vendors' kernels as candidates, read off the cascade like ours: SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Mapping

from ...cost_model.devices.device import Device
from ...cost_model.time.predict import VendorUse
from ...patterns.verdict import Refusal
from . import flex as _flex
from . import sdpa as _sdpa
from .call import VendorCall
from .flex import flex
from .sdpa import backends, sdpa

__all__ = ["VendorCall", "backends", "flex", "sdpa", "use"]
_USES = {_flex.NAME: _flex.use, _sdpa.NAME: _sdpa.use}


def use(call: VendorCall, device: Device, sizes: Mapping[str, int], *, gradients: bool = False) -> VendorUse | Refusal:
    """How a call runs on a device, for the cost model, or why it cannot run there (or not for training)."""
    return _USES[call.name](call, device, sizes, gradients=gradients)
