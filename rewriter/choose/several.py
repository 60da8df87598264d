"""The candidate of an attention of which more is read than its output: one call that stands for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ...codegen import several
from ...codegen.forms.program import loose, program_text
from ...cost_model.count.tiles import Data
from ...cost_model.devices.device import Device
from ...cost_model.sites.site import Candidate
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict_several, whole_mappings
from ...patterns.cascade import Cascade, to_text
from ...patterns.mapping import TileMapping
from ...patterns.verdict import Obstacle, Refusal
from ..splice import splice
from ..splice.recipe import Recipe

# Why nothing else stands for such an attention.
ALONE = "it gives the output alone, and more is read of this attention"
_TRAINED = "gradients flow through what is read beside the output, of which no kernel has them"


def candidate(
    name: str, c: Cascade, device: Device, sizes: Mapping[str, int], data: Data, *, gradients: bool, traced: bool
) -> tuple[Candidate, splice.Call | None]:
    """Our kernel with further outputs, under the mapping that is predicted fastest."""
    if gradients:
        return Candidate(name, feasible=False, why=_TRAINED), None
    found: list[tuple[float, TileMapping, Cost]] = []
    refusal = ""
    for mapping in whole_mappings(c, device, sizes):
        try:
            cost = predict_several(c, mapping, device, sizes, data)
        except ValueError as no:
            return Candidate(name, feasible=False, why=str(no)), None
        if isinstance(cost, Obstacle):
            refusal = refusal or cost.reason
        else:
            found.append((cost.seconds, mapping, cost))
    for _, mapping, cost in sorted(found, key=lambda x: x[0]):
        kernel = several.build(c, mapping, device)
        if isinstance(kernel, Refusal):
            refusal = refusal or kernel.reason
            continue
        source = kernel.source
        made = Candidate(name, cost=cost, mapping=mapping.to_text(), why=str(mapping), maker=lambda: source)
        return made, call(c, mapping)
    return Candidate(name, feasible=False, why=refusal or f"no kernel of ours on {device.name} has further outputs"), None


def call(c: Cascade, mapping: TileMapping) -> splice.Call:
    """Our operator: tensors in the order of the cascade's inputs, then the sizes that no input tells; a tuple of outputs."""
    names, sizes = [t.name for t in c.inputs], loose(c)
    text = program_text(c, mapping)

    def arguments(tensors: Mapping[str, fx.Node], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in names], [size(s) for s in sizes], text

    return splice.Call(
        "reattend", several.call, arguments, closed=False, recipe=Recipe("several", to_text(c), mapping.to_text())
    )
