"""The candidate of an attention of which more is read than its output: one call that stands for all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from ...codegen import several, trained
from ...codegen.forms.form import rows_keep_a_key
from ...codegen.forms.program import loose, program_text
from ...cost_model.count.tiles import Data
from ...cost_model.devices.device import Device
from ...cost_model.sites.site import Candidate
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict_several, ranked_mappings, whole_mappings
from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, to_text
from ...patterns.mapping import TileMapping
from ...patterns.masks.split import split
from ...patterns.passes.further import main, with_numbers
from ...patterns.verdict import Obstacle, Refusal
from ..splice import splice
from ..splice.guards import Condition, every_row_keeps_a_key, needs_no_gradient
from ..splice.recipe import Recipe

# What a call of a kernel that must be compiled has to save over what need not: some seconds of a compiler, once for a
# machine, are paid back within 10 000 calls. Where nothing takes long, nobody waits for a compiler.
PAYBACK_SECONDS = 3e-4
# Why nothing else stands for such an attention.
ALONE = "it gives the output alone, and more is read of this attention"
_TRAINED = "gradients flow through what is read beside the output, of which no kernel has them"


def candidate(
    name: str, c: Cascade, device: Device, sizes: Mapping[str, int], data: Data, wanted: Sequence[str] | None, traced: bool
) -> tuple[Candidate, splice.Call | None]:
    """Our kernel with further outputs, under the mapping that is predicted fastest.

    `wanted`: the inputs whose gradients are; None where none flows.
    """
    try:
        found = sorted(_mappings(c, device, sizes, data, wanted), key=lambda x: x[1].seconds)
    except ValueError as no:
        return Candidate(name, feasible=False, why=str(no)), None
    plain = [x for x in found if not x[0].is_compiled]
    if found and plain and plain[0][1].seconds - found[0][1].seconds < PAYBACK_SECONDS:
        found = [*plain, *(x for x in found if x[0].is_compiled)]
    refusal = _TRAINED if wanted is not None else ""
    for mapping, cost in found:
        whole = mapping.body == "whole"
        kernel = several.build(c, mapping, device) if whole else trained.build(c, mapping, device)
        if isinstance(kernel, Refusal):
            refusal = kernel.reason
            continue
        without = kernel.without if isinstance(kernel, trained.TrainedKernel) and wanted is not None else ()
        if lacking := [n for n in without if traced or n in (wanted or ())]:
            refusal = f"the {mapping.body} body's backward gives no gradient of {', '.join(lacking)}"
            continue
        conditions = _conditions(c, without) if wanted is not None else ()
        if conditions and traced:
            refusal = f"it is trained where {conditions[0].sentence}, which cannot be guarded inside Inductor's graph"
            continue
        fragile = not traced and (mapping.is_compiled or mapping.body == "triton")
        why = "; ".join((str(mapping), *(f"where {x.sentence}" for x in conditions)))
        made = Candidate(name, cost=cost, mapping=mapping.to_text(), why=why, maker=partial(str, kernel.source))
        once = wanted is not None and not traced
        return made, replace(call(c, mapping), conditions=conditions, fragile=fragile, once=once)
    return Candidate(name, feasible=False, why=refusal or f"no kernel of ours on {device.name} has further outputs"), None


def _mappings(
    c: Cascade, device: Device, sizes: Mapping[str, int], data: Data, wanted: Sequence[str] | None
) -> Iterator[tuple[TileMapping, Cost]]:
    """The body of whole rows where no gradients flow; where numbers of rows alone leave, those that hand them over."""
    for mapping in whole_mappings(device) if wanted is None else ():
        cost = predict_several(c, mapping, device, sizes, data)
        if not isinstance(cost, Obstacle):
            yield mapping, cost
    if isinstance(with_numbers(c), Obstacle):
        return
    ranked = ranked_mappings(main(c), device, sizes, data, wanted)
    for mapping, cost in () if isinstance(ranked, Obstacle) else ranked:
        if mapping.body in trained.BODIES and mapping.split_m == 1:
            yield mapping, cost


def _conditions(c: Cascade, without: tuple[str, ...]) -> tuple[Condition, ...]:
    """Under which the gradients are the model's: of rows that keep a key."""
    a = attention(main(c))
    assert isinstance(a, Attention), a
    keep = split(a.score, a.key).keep
    masked = (every_row_keeps_a_key(a),) if keep is not ex.TRUE and rows_keep_a_key(a, keep) else ()
    return (*((needs_no_gradient(without),) if without else ()), *masked)


def call(c: Cascade, mapping: TileMapping) -> splice.Call:
    """Our operator: tensors in the order of the cascade's inputs, then the sizes that no input tells; a tuple of outputs."""
    names, sizes = [t.name for t in c.inputs], loose(c)
    text = program_text(c, mapping)

    def arguments(tensors: Mapping[str, fx.Node], size: Any) -> tuple[Any, ...]:
        return [tensors[n] for n in names], [size(s) for s in sizes], text

    kind, target = ("several", several.call) if mapping.body == "whole" else ("numbers", trained.numbers)
    recipe = Recipe(kind, to_text(c), mapping.to_text())
    return splice.Call("reattend", target, arguments, closed=False, recipe=recipe)
