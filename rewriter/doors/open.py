"""Which libraries have a door, and how it is opened: the library is imported here, and nowhere before."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from ...cost_model.devices.device import Device
from ..choose.policy import Policy
from .site import Door

# The library, the file that knows it, and what installs it.
DOORS: Mapping[str, tuple[str, str]] = {
    "transformers": ("hf", "pip install 'reattend[models]'"), "diffusers": ("diffusion", "pip install diffusers"),
}


def open_door(library: str, policy: Policy, target: Device | None) -> None:
    """Register with a library. Raises ImportError with one sentence."""
    _library(library).register(Door(policy, target))


def processors_of(model: nn.Module) -> dict[str, Any]:
    """A diffusers model's processors with their SDPA through the door."""
    found: dict[str, Any] = _library("diffusers").processors(model)
    return found


def _library(name: str) -> ModuleType:
    """The file that knows a library."""
    file, install = DOORS[name]
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"reattend.register: {name} is not installed: {install}")
    return importlib.import_module(f".{file}", __package__)
