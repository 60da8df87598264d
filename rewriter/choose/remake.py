"""A call made again from its recipe: what runs, under which conditions, and the text of its kernel. Nothing is decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...codegen import operator as ours
from ...codegen import several, trained
from ...codegen.vendor import use as vendor
from ...cost_model.devices.device import Device
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import parse
from ...patterns.mapping import TileMapping
from ...patterns.passes.further import main
from ...patterns.verdict import Refusal
from ..splice.guards import Condition, condition
from ..splice.recipe import Recipe
from .candidates import vendor_call

_MAKERS: dict[str, Any] = {"sdpa": vendor.sdpa, "flex": vendor.flex}
# What runs, and what builds its kernel.
_OPERATORS: dict[str, tuple[Any, Any]] = {
    "ours": (torch.ops.reattend.cascade.default, ours.build), "trained": (trained.call, trained.build),
    "several": (several.call, several.build), "numbers": (trained.numbers, trained.build),
}


@dataclass(frozen=True)
class Remade:
    """What stands in a graph for an attention."""

    target: Callable[..., Any]
    conditions: tuple[Condition, ...]
    source: Callable[[], str]


@lru_cache(maxsize=256)
def remade(r: Recipe, device: Device) -> Remade:
    """The call of a recipe on a device. Raises ValueError where it makes none."""
    c = parse(r.cascade)
    view = attention(main(c))
    if not isinstance(view, Attention):
        raise ValueError(f"{c.name} is no attention: {view.reason}")
    conditions = tuple(condition(rule, view) for rule in r.conditions)
    if r.kind in _MAKERS:
        made = _MAKERS[r.kind](c, keyed=r.keyed)
        if isinstance(made, Refusal):
            raise ValueError(made.reason)
        return Remade(vendor_call(made).target, conditions, lambda: str(made.source))
    target, build = _OPERATORS[r.kind]
    mapping = TileMapping.parse(r.mapping)

    @lru_cache(maxsize=1)
    def source() -> str:
        kernel = build(c, mapping, device)
        if isinstance(kernel, Refusal):
            raise ValueError(kernel.reason)
        return str(kernel.source)

    return Remade(target, conditions, source)
