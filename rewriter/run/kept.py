"""Plans on disk: a later process neither captures, lifts nor plans a graph that an earlier one has.

    <cache>/reattend/plans/<key>.json     key: the graph of Dynamo's, guards, modes, policy, device, versions, our sources

Three lines: what the file is, with a sum over the rest; the rewritten graph, or null where nothing was replaced (then the
model's own code runs as it comes); the plan. What is damaged, or of another graph, is not read, and a warning says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...codegen.files import cache as files
from ...codegen.files import native
from ...cost_model.devices.device import Device, device_to_dict
from ...cost_model.json import Json
from ...cost_model.plan.plan import Plan
from ...cost_model.sites.site import ORIGINAL, PlanError
from ..capture.capture import frame_module, path_of
from ..capture.modes import modes
from ..capture.templates import OPEN, PLAIN, Unfit, metadata, term
from ..check.verdicts import Check, key
from ..choose.choose import running_device
from ..choose.policy import Policy
from ..choose.remake import remade
from ..find import defect
from ..graph import memory, torch_private
from ..graph.where import source_line
from ..splice.recipe import RECIPE
from ..splice.splice import SITE, is_changed
from . import graph_data

NOTE = "as an earlier process planned it"
_TITLE = "reattend plan 1"
_lock = threading.Lock()
# Keys of plans that this process made: it looks at every graph itself.
_own: set[str] = set()


@dataclass(frozen=True)
class KeptGraph:
    """A plan of an earlier process, with the graph that runs; None where that is the one that came."""

    plan: Plan
    graph: fx.GraphModule | None


def key_of(
    gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str], policy: Policy, target: Device | None
) -> str:
    """What a plan of this graph is kept by; empty where it is more than its nodes say (bodies, tensors)."""
    numbers = {n: i for i, n in enumerate(gm.graph.nodes)}
    try:
        said = [repr(_node(n, numbers, names)) for n in gm.graph.nodes]
        devices = [target] if target is not None else [running_device(kind) for kind in sorted(set(_kinds(gm)))]
        facts = torch_private.size_facts()
    except (Unfit, ValueError, torch_private.TorchChanged):
        return ""
    parameters = [isinstance(x, nn.Parameter) for x in inputs]
    described = json.dumps([device_to_dict(d) for d in devices], sort_keys=True)
    together = sorted(map(sorted, memory.shared(enumerate(inputs))))
    around = repr((modes(), _switches(), parameters, together, frame_module(names)))
    return key("plan", repr(policy), described, around, *facts, *said)


def recall(at: str, policy: Policy, record: list[Check]) -> KeptGraph | None:
    """What an earlier process made of the graph; None where there is nothing that can be read. `record` takes the checks."""
    with _lock:
        if at in _own:
            return None
    try:
        text = _path(at).read_text(encoding="utf-8")
    except OSError:
        return None
    except UnicodeDecodeError as error:
        _damaged(str(error))
        return None
    head, _, rest = text.partition("\n")
    if head != _head(at, rest):
        _damaged("it is not what was written for this graph")
        return None
    body, _, plan = rest.partition("\n")
    try:
        made, data = replace(Plan.from_json(plan), note=NOTE), json.loads(body)
        graph = graph_data.read(data, made.device, policy, record) if data is not None else None
    except (graph_data.Damaged, PlanError, ValueError) as error:
        _damaged(str(error))
        return None
    if graph is None and any(s.choice != ORIGINAL for s in made.sites):
        _damaged("it replaces something and has no graph")
        return None
    return KeptGraph(made, graph)


def described(at: str, plan: Plan, graph: fx.GraphModule, policy: Policy, facts: tuple[str, ...]) -> str | None:
    """What is kept of a graph after it was rewritten; None where that cannot be said.

    Of a graph in which something was replaced, all is held against what is read again: the graph, and the kernels' texts.
    Where the rewrite made new guards (`facts` before it), another process would not have them.
    """
    if any(defect.is_one(m.reason) for m in plan.misses):
        return None
    changed = is_changed(graph)
    if changed and torch_private.size_facts() != facts:
        return None
    if not changed and any(s.choice != ORIGINAL for s in plan.sites):
        return None
    try:
        body = _held(graph, plan, policy) if changed else None
        rest = json.dumps(body, separators=(",", ":")) + "\n" + plan.to_json()
    except (Unfit, ValueError):
        # not of a kind that can be written, or a size has no value
        return None
    return _head(at, rest) + "\n" + rest


def _held(graph: fx.GraphModule, plan: Plan, policy: Policy) -> Json:
    """The rewritten graph, held against what is read again. Raises Unfit, ValueError."""
    body = graph_data.written(graph)
    again = graph_data.written(graph_data.read(json.loads(json.dumps(body)), plan.device, policy, []))
    if again != body or not _same_kernels(graph, plan):
        raise Unfit("what is read again is not what was written")
    return body


def _same_kernels(graph: fx.GraphModule, plan: Plan) -> bool:
    """Do recipes give the texts of the kernels that were chosen?"""
    recipes = {n.meta[SITE]: n.meta[RECIPE] for n in graph.graph.nodes if SITE in n.meta}
    for s in plan.sites:
        recipe = recipes.pop(s.name, None)
        if (recipe is None) != (s.choice == ORIGINAL):
            return False
        if recipe is not None and remade(recipe, plan.device).source() != s.chosen.source():
            return False
    return not recipes


def keep(at: str, text: str | None) -> None:
    """Keep what was described for later processes; a folder that cannot be written keeps none."""
    with _lock:
        _own.add(at)
    if text is None:
        return
    try:
        _path(at).parent.mkdir(mode=0o700, exist_ok=True)
        files.replace_text(_path(at), text)
    except OSError:
        return


def _head(at: str, rest: str) -> str:
    return f"{_TITLE} {at} {hashlib.sha256(rest.encode()).hexdigest()}"


def _damaged(why: str) -> None:
    warnings.warn(f"reattend: a plan on disk is damaged and made anew: {why}", stacklevel=4)


def _path(at: str) -> Path:
    return files.directory() / "plans" / f"{at}.json"


# --- what a plan depends on ---------------------------------------------------------------------------------------


_SDPA = ("flash", "mem_efficient", "math", "cudnn")


def _switches() -> tuple[object, ...]:
    """What decides which kernels of torch's and of ours there are."""
    sdpa = tuple(bool(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()) for kind in _SDPA)
    try:
        compiler = native.compiler()
    except native.CompilerError:
        compiler = ()
    return (sdpa, torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision(), compiler)


def _kinds(gm: fx.GraphModule) -> Iterator[str]:
    for n in gm.graph.nodes:
        value = torch_private.noted(n)
        if isinstance(value, Tensor):
            yield value.device.type


def _node(n: fx.Node, numbers: Mapping[fx.Node, int], names: Mapping[int, str]) -> tuple[object, ...]:
    """All of a node that a capture reads, without identities."""
    if n.op in ("get_attr", "call_module") or torch_private.is_own_function(n.target) or torch_private.has_body(n.target):
        raise Unfit(f"{n.name} is more than its node says")
    stack = n.meta.get("nn_module_stack") or {}
    modules = [(path_of(names, str(k), str(p)), getattr(t, "__qualname__", str(t))) for k, (p, t) in stack.items()]
    value = torch_private.noted(n)
    opened = _opened(value) if n.op == "placeholder" else ()
    known = None if value is torch_private.NOTHING else _value(value)
    args = _argument(n.args, numbers), _argument(n.kwargs, numbers)
    return (n.op, _target(n), args, known, opened, source_line(n), modules)


def _target(n: fx.Node) -> object:
    t: Any = n.target
    if isinstance(t, (str, torch_private.OpOverload)):
        return str(t)
    name = getattr(t, "__qualname__", None)
    if name is None:
        raise Unfit(f"{n.name} calls what has no name")
    return (type(t).__name__, getattr(t, "__module__", None), name)


def _argument(x: Any, numbers: Mapping[fx.Node, int]) -> object:
    if isinstance(x, fx.Node):
        return ("node", numbers[x])
    if isinstance(x, (tuple, list)):
        return [_argument(y, numbers) for y in x]
    if isinstance(x, dict):
        return [(k, _argument(y, numbers)) for k, y in x.items()]
    if isinstance(x, slice):
        return ("slice", *(_argument(y, numbers) for y in (x.start, x.stop, x.step)))
    if isinstance(x, PLAIN):
        return (type(x).__name__, repr(x))
    raise Unfit(f"{type(x).__name__} is given")


def _value(x: Any) -> object:
    """The metadata of what Dynamo knows of a result."""
    if isinstance(x, torch_private.FakeTensor):
        return (metadata(x), torch_private.is_python_float(x))
    if isinstance(x, (tuple, list)):
        return [_value(y) for y in x]
    if isinstance(x, (*OPEN, *PLAIN)):
        return (type(x).__name__, str(term(x)))
    raise Unfit(f"a value is a {type(x).__name__}")


def _opened(x: object) -> list[object]:
    """The open sizes of an input: as terms, in the example, and within what bounds."""
    sizes = x.shape if isinstance(x, Tensor) else (x,)
    return [
        (str(torch_private.expression(s)), torch_private.traced_size(s), str(torch_private.bounds(s)))
        for s in sizes if isinstance(s, torch.SymInt)
    ]
