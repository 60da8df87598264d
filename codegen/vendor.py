"""The vendors' kernels as candidates, read off the cascade like ours: SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Mapping

from ..cost_model.device import Device
from ..cost_model.predict import VendorUse
from ..patterns.recognise import Refusal
from . import sdpa as _sdpa
from .flex import flex
from .sdpa import backends, sdpa
from .vendor_call import VendorCall

__all__ = ["VendorCall", "backends", "flex", "refusal", "sdpa", "use"]


def refusal(call: VendorCall, device: Device, *, gradients: bool) -> Refusal | None:
    """Why a call that is right cannot run on a device, or for training."""
    if call.name != "flex" or device.kind != "cpu":
        return None
    if gradients:
        return Refusal("flex", "FlexAttention has no backward on the CPU, and gradients are wanted here")
    if "AuxRequest" in call.source:
        return Refusal("flex", "the row's end needs the log-sum-exp, which FlexAttention does not give on the CPU")
    return None


def use(call: VendorCall, device: Device, sizes: Mapping[str, int], *, gradients: bool = False) -> VendorUse:
    """How a call runs on a device, for the cost model."""
    if call.name == "flex":
        return VendorUse("flex", skips="BlockMask" in call.source)
    return _sdpa.use(call, device, sizes, gradients=gradients)
