"""A rewritten graph as plain data, and the graph again: operators by name, calls by their recipes, own code beside each.

    node    [op, target, name, arguments, named arguments]        argument    a number, a text, or [kind, …]: ["node", 3]

What is not of this kind (weights that a graph holds, bodies, functions without a name here) is `Unfit`, and is not written;
a few numbers that a trace made constants of are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...cost_model.devices.device import Device
from ...cost_model.json import Json, Read
from ..capture.templates import Unfit
from ..check.verdicts import Check
from ..check.watch import SiteWatch
from ..choose.policy import Policy, StrictError
from ..choose.remake import Remade, remade
from ..graph import torch_private
from ..graph.aliases import SPLICED, Aliases
from ..graph.liveness import ARITHMETIC
from ..splice.guards import Guarded
from ..splice.recipe import RECIPE, Recipe
from ..splice.splice import SITE

# A constant of more numbers than this is no number that somebody wrote down.
CONSTANT = 64
_SPACES = ("aten", "reattend")
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{f.__module__}.{f.__qualname__}": f for f in (operator.getitem, *ARITHMETIC.values(), *torch_private.SWITCHES)
}
_NAMED: Mapping[str, type] = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format, "device": torch.device,
}


class Damaged(ValueError):
    """What was read is no graph that this version writes; the sentence says why."""


# --- written ------------------------------------------------------------------------------------------------------


@dataclass
class _Writer:
    """Recipes and own code stand once; nodes have their places in them."""

    recipes: list[Recipe] = field(default_factory=list)
    originals: list[fx.GraphModule] = field(default_factory=list)

    def nodes(self, gm: fx.GraphModule) -> Json:
        place = {n: i for i, n in enumerate(gm.graph.nodes)}
        return [self._node(gm, n, place) for n in gm.graph.nodes]

    def _node(self, gm: fx.GraphModule, n: fx.Node, place: Mapping[fx.Node, int]) -> Json:
        if n.op == "get_attr":
            return [n.op, str(n.target), n.name, [], _constant(n, getattr(gm, str(n.target), None))]
        body: list[Json] = [n.op, self._target(n), n.name, _written(n.args, place), _written(n.kwargs, place)]
        return [*body, self._site(gm, n)] if SITE in n.meta else body

    def _target(self, n: fx.Node) -> Json:
        if n.op in ("placeholder", "output") or (n.op == "call_module" and SITE in n.meta):
            return str(n.target)
        if n.op != "call_function":
            raise Unfit(f"{n.name} is more than its node says")
        if SITE in n.meta:
            return ""
        if isinstance(n.target, torch_private.OpOverload):
            return _operator_name(n.target)
        name = f"{getattr(n.target, '__module__', '')}.{getattr(n.target, '__qualname__', '')}"
        if _FUNCTIONS.get(name) is not n.target:
            raise Unfit(f"{n.name} calls {name}, which has no name here")
        return name

    def _site(self, gm: fx.GraphModule, n: fx.Node) -> Json:
        """What stands here for an attention, and the sizes of what it is given, by which calls are timed."""
        recipe = n.meta.get(RECIPE)
        if not isinstance(recipe, Recipe) or not all(recipe.conditions):
            raise Unfit(f"{n.name} has no recipe")
        given = [x.meta.get("val") for x in n.all_input_nodes]
        sizes: Json = [_traced(v.shape) if isinstance(v, torch.Tensor) else None for v in given]
        said: dict[str, Json] = {"site": str(n.meta[SITE]), "recipe": _place(self.recipes, recipe), "sizes": sizes}
        if n.op == "call_module":
            guard = gm.get_submodule(str(n.target))
            if not isinstance(guard, Guarded):
                raise Unfit(f"{n.name} is a module of another kind")
            said |= {"name": guard.name, "once": guard.once, "known": guard.known,
                     "original": _place(self.originals, guard.original),
                     "written": _place(self.originals, guard.written), "watch": _watched(guard.watch)}
        return said


def written(gm: fx.GraphModule) -> Json:
    """The graph as plain data. Raises Unfit."""
    w = _Writer()
    aliases = Aliases(gm.graph)
    if any(n.op == "get_attr" and aliases.is_written(n) for n in gm.graph.nodes):
        raise Unfit("a constant is written in place")
    nodes = w.nodes(gm)
    originals: list[Json] = []
    for own in w.originals:
        if any(SITE in n.meta for n in own.graph.nodes):
            raise Unfit("own code holds a call of ours")
        originals.append(w.nodes(own))
    return {"nodes": nodes, "originals": originals, "recipes": [asdict(r) for r in w.recipes]}


def _constant(n: fx.Node, x: object) -> Json:
    """A few numbers, byte by byte."""
    if type(x) is not torch.Tensor or x.numel() > CONSTANT or x.device.type != "cpu" or x.requires_grad:
        raise Unfit(f"{n.name} is more than its node says")
    if x.layout is not torch.strided or not x.is_contiguous() or x.is_conj() or x.is_neg():
        raise Unfit(f"{n.name} does not lie as it was made")
    raw = x.reshape(-1).view(torch.uint8)
    return {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "bytes": bytes(raw.tolist()).hex()}


def _watched(watch: SiteWatch | None) -> Json:
    if watch is None:
        return None
    repeated: Json = [[i, *dims] for i, dims in watch.repeated.items()]
    return {"site": watch.site, "kernel": watch.kernel, "masks": sorted(watch.masks), "largest": repr(watch.largest),
            "repeated": repeated}


def _place(known: list[Any], x: object) -> int:
    """Where a value stands among the known ones, of which it is one from now on."""
    found = next((i for i, y in enumerate(known) if y is x or (not isinstance(x, nn.Module) and y == x)), None)
    if found is None:
        known.append(x)
    return len(known) - 1 if found is None else found


def _traced(shape: Sequence[int | torch.SymInt]) -> Json:
    """The sizes of the example that was traced."""
    known = [s if isinstance(s, int) else torch_private.traced_size(s) for s in shape]
    if None in known:
        raise Unfit("a size has no value in the trace")
    return known


def _operator_name(o: Any) -> str:
    if o.namespace not in _SPACES:
        raise Unfit(f"{o} is an operator of somebody else's")
    return str(o)


def _written(x: Any, place: Mapping[fx.Node, int]) -> Json:
    if isinstance(x, fx.Node):
        return ["node", place[x]]
    if isinstance(x, (tuple, list)):
        return ["tuple" if isinstance(x, tuple) else "list", *(_written(y, place) for y in x)]
    if isinstance(x, dict):
        return ["dict", *([str(k), _written(y, place)] for k, y in x.items())]
    if isinstance(x, slice):
        return ["slice", *(_written(y, place) for y in (x.start, x.stop, x.step))]
    if x is None or isinstance(x, (bool, str)) or type(x) is int:
        return x
    if type(x) is float:
        return ["float", repr(x)]
    if x is Ellipsis:
        return ["ellipsis"]
    for name, kind in _NAMED.items():
        if isinstance(x, kind):
            return [name, str(x).removeprefix("torch.")]
    raise Unfit(f"{type(x).__name__} is given")


# --- read ---------------------------------------------------------------------------------------------------------


def read(body: Read, device: Device, policy: Policy, record: list[Check]) -> fx.GraphModule:
    """The graph of what was written, its kernels made from their recipes, watched as `policy` says. Raises Damaged.

    `record` takes the checks.
    """
    try:
        recipes = [_recipe(r) for r in body["recipes"]]
        made, originals = [remade(r, device) for r in recipes], list[fx.GraphModule]()
        for nodes in body["originals"]:
            own, inside, _ = _graph(nodes, [], [])
            originals.append(fx.GraphModule(own, inside, "Original"))
        root, graph, guards = _graph(body["nodes"], made, recipes)
        for n, said in guards:
            call = made[said["recipe"]]
            watch = _watch(said["watch"], call, policy, record)
            guard = Guarded(
                said["name"], call.target, originals[said["original"]], call.conditions, bool(said["once"]), watch,
                written=originals[said["written"]],
            )
            guard.known = bool(said["known"])
            root.add_module(str(n.target), guard)
        graph.lint()
        return fx.GraphModule(root, graph)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _recipe(d: Read) -> Recipe:
    conditions = tuple(tuple(map(str, rule)) for rule in d["conditions"])
    return Recipe(str(d["kind"]), str(d["cascade"]), str(d["mapping"]), bool(d["keyed"]), conditions)


def _graph(
    nodes: Sequence[Any], made: Sequence[Remade], recipes: Sequence[Recipe]
) -> tuple[nn.Module, fx.Graph, list[tuple[fx.Node, Read]]]:
    """What holds the constants, the graph, and its guarded calls with what was said of them."""
    root, graph, out = nn.Module(), fx.Graph(), list[fx.Node]()
    guards: list[tuple[fx.Node, Read]] = []
    for op, target, name, args, kwargs, *site in nodes:
        if op == "get_attr" and str(target) not in dict(root.named_buffers()):
            root.register_buffer(str(target), _numbers(kwargs), persistent=False)
        given, named = (_read(args, out), _read(kwargs, out)) if op != "get_attr" else ((), {})
        function = target
        if site and op == "call_function":
            function = made[site[0]["recipe"]].target
        elif op == "call_function":
            function = _function(str(target))
        n = graph.create_node(op, function, given, named, name=name)
        if n.name != name:
            raise Damaged(f"a node is called {n.name} instead of {name}")
        out.append(n)
        if site:
            recipe = recipes[site[0]["recipe"]]
            n.meta |= {SITE: site[0]["site"], RECIPE: recipe, SPLICED: recipe.kind}
            for x, sizes in zip(n.all_input_nodes, site[0]["sizes"], strict=True):
                x.meta["val"] = torch.empty(sizes, device="meta") if sizes is not None else 0
        if op == "call_module":
            if not site:
                raise Damaged(f"{name} is a module of another kind")
            guards.append((n, site[0]))
    return root, graph, guards


def _numbers(said: Read) -> torch.Tensor:
    kind = getattr(torch, str(said["dtype"]))
    raw = torch.tensor(list(bytes.fromhex(said["bytes"])), dtype=torch.uint8)
    return raw.view(kind).reshape([int(n) for n in said["shape"]])


def _watch(said: Read | None, call: Remade, policy: Policy, record: list[Check]) -> SiteWatch | None:
    if said is None:
        return None
    return SiteWatch(
        said["site"], said["kernel"], call.source, every=policy.check if isinstance(policy.check, int) else 0,
        masks=frozenset(said["masks"]), largest=float(said["largest"]),
        repeated={i: tuple(dims) for i, *dims in said["repeated"]}, refuse=StrictError if policy.strict else None,
        record=record,
    )


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    space, operator_name, overload = name.split(".")
    if space not in _SPACES:
        raise Damaged(f"{name} is no operator of torch")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, space), operator_name), overload)
    return found


def _read(x: Any, nodes: Sequence[fx.Node]) -> Any:
    if not isinstance(x, list):
        return x
    kind, *rest = x
    if kind == "node":
        return nodes[rest[0]]
    if kind == "tuple":
        return tuple(_read(y, nodes) for y in rest)
    if kind == "list":
        return [_read(y, nodes) for y in rest]
    if kind == "dict":
        return {k: _read(y, nodes) for k, y in rest}
    if kind == "slice":
        return slice(*(_read(y, nodes) for y in rest))
    if kind == "float":
        return float(rest[0])
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(rest[0])
    if kind in _NAMED and isinstance(found := getattr(torch, str(rest[0])), _NAMED[kind]):
        return found
    raise Damaged(f"an argument is a {kind}")
