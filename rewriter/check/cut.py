"""The model's own nodes, computed for some positions of their output only.

Which rows, heads and batches are wanted is followed from the output to the inputs:

    out [b, h, p, e], rows 0, 7 and 4095 wanted      scores [b, h, 3, m]      q [b, h, 3, e], all of k and v

Everything is computed twice, in the model's own types and with every float widened to float64. What is no float (indices,
comparisons, buckets) is what it is in the model's own types, so that both take the same decisions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import cast as typed

import torch
from torch import Tensor, fx

from ..graph.node import arguments, op_name
from ..graph.torch_private import OpOverload, tree_leaves, tree_map
from .demand import Demand, everything, joined, kept, pick
from .own import Own, Uncheckable, is_write
from .rules import ANYTHING, PARTS, SEVERAL, VIEWS, PlacedOperator, RowCut, called, rule_of, without

# --- the cut ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutStep:
    """One node: how its value is made, what is wanted of each argument and what its value has."""

    node: fx.Node
    cut: RowCut
    has: Demand


@dataclass(frozen=True)
class CutProgram:
    """A site's own code cut to some positions of its output.

    `bytes` is the memory that its largest values take while it runs, `held_bytes` that of all, `flops` what its products
    take. `repeated`: along which dimensions an input repeats its values, so that gradients there count together.
    """

    own: Own
    wanted: Demand
    steps: tuple[CutStep, ...]
    bytes: int
    held_bytes: int
    flops: float
    repeated: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def run(self, given: Sequence[Any], wide: Sequence[Any] | None = None) -> tuple[Tensor, Tensor]:
        """The wanted positions of the output: in the model's own types, and in float64."""
        return _run(self, given, wide)


def cut(own: Own, wanted: Demand) -> CutProgram:
    """The code cut to the wanted positions of its output."""
    demands: dict[fx.Node, Demand] = {own.output: wanted}
    steps: list[CutStep] = []
    for n in reversed(own.graph.nodes):
        value = own.values.get(n)
        if n.op == "output" or not isinstance(value, (Tensor, tuple, list)):
            continue
        first = value if isinstance(value, Tensor) else value[0]
        want = demands.get(n)
        if want is None:
            # Nobody reads an element of it: one will do.
            want = tuple((0,) if size else None for size in first.shape)
        step = _step(own, n, tuple(first.shape), want)
        for source, asked in _asked(own, step):
            demands[source] = joined(demands[source], asked) if source in demands else asked
        steps.append(step)
    made = tuple(reversed(steps))
    return CutProgram(own, wanted, made, *_costs(own, made))


def _step(own: Own, n: fx.Node, shape: tuple[int, ...], want: Demand) -> CutStep:
    if n.op == "placeholder":
        return CutStep(n, RowCut({}, want), want)
    if n.target is operator.getitem:
        source = n.args[0]
        name = op_name(source) if isinstance(source, fx.Node) and not own.written else ""
        if isinstance(source, fx.Node) and name in PARTS:
            d = typed("int", arguments(source)["dim"]) % len(shape)
            return CutStep(n, RowCut({"0": without(want, d)}), want)
        return CutStep(n, RowCut({"0": want if name in SEVERAL else everything(shape)}), want)
    if not isinstance(n.target, OpOverload) or own.written:
        return CutStep(n, RowCut({}, everything(shape)), want if isinstance(own.values[n], Tensor) else everything(shape))
    given = arguments(n)
    tensors = {i: v for i in n.all_input_nodes if isinstance(v := own.values[i], Tensor)}
    place = PlacedOperator(n.target, given, tensors, shape, want)
    made = rule_of(place, op_name(n))(place)
    return CutStep(n, made, want if isinstance(own.values[n], Tensor) else made.gives)


def _asked(own: Own, step: CutStep) -> Iterator[tuple[fx.Node, Demand]]:
    """What a step wants of each tensor that it reads."""
    for name, value in _named(step.node).items():
        wants = step.cut.wants.get(name)
        if wants is ANYTHING:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        for i, source in enumerate(items):
            held = own.values.get(source) if isinstance(source, fx.Node) else None
            if isinstance(held, (Tensor, tuple, list)):
                first = held if isinstance(held, Tensor) else held[0]
                each = wants[i] if isinstance(value, (list, tuple)) and wants is not None else wants
                yield source, each if each is not None else everything(first.shape)


def _named(n: fx.Node) -> dict[str, Any]:
    if n.op == "placeholder":
        return {}
    return dict(arguments(n))


# --- running ------------------------------------------------------------------------------------------------------


def _run(p: CutProgram, given: Sequence[Any], wide: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
    places = [n for n in p.own.graph.nodes if n.op == "placeholder"]
    inputs = dict(zip(places, zip(given, wide if wide is not None else given, strict=True), strict=True))
    last = {source: s.node for s in p.steps for source in s.node.all_input_nodes}
    has = {s.node: s.has for s in p.steps}
    own: dict[fx.Node, Any] = {}
    exact: dict[fx.Node, Any] = {}
    for step in p.steps:
        n = step.node
        if n.op == "placeholder":
            mine, other = inputs[n]
            own[n] = pick(mine, everything(mine.shape), step.has)
            exact[n] = _widened(own[n] if other is mine else pick(other, everything(other.shape), step.has))
        else:
            own[n], exact[n] = _both(p.own, step, own, exact, has)
        for source in n.all_input_nodes:
            if last[source] is n and source is not p.own.output:
                own.pop(source, None)
                exact.pop(source, None)
    out = p.own.output
    expected = kept(p.own.shape, p.wanted)
    if list(own[out].shape) != expected:
        raise Uncheckable(f"the cut gave the shape {list(own[out].shape)} for {expected}")
    return own[out], exact[out]


def _both(
    code: Own, step: CutStep, own: Mapping[fx.Node, Any], exact: Mapping[fx.Node, Any], has: Mapping[fx.Node, Demand]
) -> tuple[Any, Any]:
    mine, other = (_arguments(code, step, env, has) for env in (own, exact))
    value = _cut_to(_called(step, mine), step, has)
    tensors = [(a, b) for a, b in zip(tree_leaves(mine), tree_leaves(other)) if isinstance(a, Tensor)]
    if all(a is b for a, b in tensors) or not any(_floats(value)):
        return value, _widened(value)
    if is_write(step.node) and any(a is b for a, b in tensors):
        raise Uncheckable("it writes in place what is shared by both computations")
    wide = _cut_to(_called(step, _wide_types(other)), step, has)
    return value, tree_map(lambda a, b: a.double() if a.is_floating_point() else b, wide, value)


def _arguments(code: Own, step: CutStep, env: Mapping[fx.Node, Any], has: Mapping[fx.Node, Demand]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in _named(step.node).items():
        wants = step.cut.wants.get(name)
        if isinstance(value, (list, tuple)):
            parts = [_one(code, v, wants[i] if isinstance(wants, tuple) else wants, env, has) for i, v in enumerate(value)]
            out[name] = parts
        else:
            out[name] = _one(code, value, wants, env, has)
    return out


def _one(code: Own, value: Any, wants: Any, env: Mapping[fx.Node, Any], has: Mapping[fx.Node, Demand]) -> Any:
    """The value of one argument: numbers are those of the sizes at hand, tensors are cut to what is wanted."""
    if not isinstance(value, fx.Node):
        return value
    fake = code.values[value]
    if not isinstance(fake, Tensor):
        return env[value] if isinstance(fake, (tuple, list)) else fake
    if wants is ANYTHING:
        return env[value]
    return pick(env[value], has[value], wants if wants is not None else everything(fake.shape))


def _called(step: CutStep, given: dict[str, Any]) -> Any:
    target = step.node.target
    if step.cut.run is not None:
        return step.cut.run(given)
    if isinstance(target, OpOverload):
        return called(target, given)
    assert callable(target)
    return target(*given.values())


def _cut_to(value: Any, step: CutStep, has: Mapping[fx.Node, Demand]) -> Any:
    if not isinstance(value, Tensor):
        return value
    gives = has[step.node.args[0]] if step.node.target is operator.getitem else step.cut.gives  # type: ignore[index]
    return pick(value, gives, step.has)


def _floats(value: Any) -> Iterator[bool]:
    return (x.is_floating_point() for x in tree_leaves(value) if isinstance(x, Tensor))


def _widened(value: Any) -> Any:
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _wide_types(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments with every float type replaced by float64."""
    wide = {
        n: torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for n, v in given.items()
    }
    return wide | ({"half_to_float": False} if "half_to_float" in wide else {})


# --- what it takes --------------------------------------------------------------------------------------------------

_LARGEST = 4
_PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "addmm", "linear", "einsum", "scaled_dot_product_attention")


def _costs(own: Own, steps: Sequence[CutStep]) -> tuple[int, int, float]:
    """Bytes of the largest values, of all values, and the FLOP of the products, both computations together."""
    bytes_, flops = [], 0.0
    for s in steps:
        name = op_name(s.node)
        for fake in tree_leaves(own.values[s.node]):
            if isinstance(fake, Tensor) and name not in (*VIEWS, "placeholder"):
                made = math.prod(kept(fake.shape, s.cut.gives)) if len(s.cut.gives) == fake.dim() else fake.numel()
                bytes_.append(made * (fake.element_size() + 8 * fake.is_floating_point()))
        if name in _PRODUCTS:
            flops += _flops(own, s, name)
    ordered = sorted(bytes_, reverse=True)
    return sum(ordered[:_LARGEST]), sum(ordered), flops


def _flops(own: Own, s: CutStep, name: str) -> float:
    made = float(math.prod(kept(own.values[s.node].shape, s.cut.gives)))
    shapes = [own.values[i].shape for i in s.node.all_input_nodes if isinstance(own.values[i], Tensor)]
    if name == "scaled_dot_product_attention":
        # two products, over the channels and over the keys
        return 4.0 * 2 * made * int(shapes[1][-2])
    if name == "einsum":
        letters = str(s.node.args[0]).partition("->")[0].replace(" ", "").split(",")
        size = {x: n for spec, shape in zip(letters, shapes) for x, n in zip(spec, shape)}
        summed = [int(n) for x, n in size.items() if x not in str(s.node.args[0]).partition("->")[2]]
        return 4.0 * made * float(math.prod(summed))
    return 4.0 * made * float(shapes[-1][-2] if name != "linear" else shapes[0][-1])
