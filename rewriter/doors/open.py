"""Which libraries have a door, and how it is opened: the library is imported here, and nowhere before."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from ...cost_model.devices.device import Device
from ..choose.policy import Policy
from .site import Door

# The library, the file that knows it, and what installs it.
DOORS: Mapping[str, tuple[str, str]] = {
    "transformers": ("hf", "pip install 'reattend[models]'"), "diffusers": ("diffusion", "pip install diffusers"),
}


def open_door(library: str, policy: Policy, target: Device | None) -> None:
    """Register with a library. Raises ImportError with one sentence."""
    file, install = DOORS[library]
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"reattend.register: {library} is not installed: {install}")
    importlib.import_module(f".{file}", __package__).register(Door(policy, target))
