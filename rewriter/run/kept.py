"""Plans on disk: a graph in which nothing was replaced runs as it comes in a later process, and is not captured again.

    <cache>/reattend/plans/<key>.json     key: the graph as Dynamo gave it, modes, policy, device, versions, our own sources

What is kept says that the model's own code is to run: an answer that does not fit could cost speed, and no result.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...codegen.files import cache as files
from ...codegen.files import native
from ...cost_model.devices.device import Device, device_to_dict
from ...cost_model.plan.plan import Plan
from ...cost_model.sites.site import ORIGINAL, PlanError
from ..capture.capture import frame_module, path_of
from ..capture.modes import modes
from ..capture.templates import OPEN, PLAIN, Unfit, metadata, term
from ..check.verdicts import key
from ..choose.choose import running_device
from ..choose.policy import Policy
from ..find import defect
from ..graph import torch_private
from ..graph.where import source_line

NOTE = "as an earlier process planned it"
_lock = threading.Lock()
# Keys of plans that this process made: it looks at every graph itself.
_own: set[str] = set()


def key_of(
    gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str], policy: Policy, target: Device | None
) -> str:
    """What a plan of this graph is kept by; empty where it is more than its nodes say (bodies, tensors)."""
    numbers = {n: i for i, n in enumerate(gm.graph.nodes)}
    try:
        said = [repr(_node(n, numbers, names)) for n in gm.graph.nodes]
        devices = [target] if target is not None else [running_device(kind) for kind in sorted(set(_kinds(gm)))]
    except (Unfit, ValueError):
        return ""
    parameters = [isinstance(x, nn.Parameter) for x in inputs]
    described = json.dumps([device_to_dict(d) for d in devices], sort_keys=True)
    return key("plan", repr(policy), described, repr((modes(), _switches(), parameters, frame_module(names))), *said)


def recall(at: str) -> Plan | None:
    """What an earlier process found: every attention keeps the original code. None where that cannot be read."""
    with _lock:
        if at in _own:
            return None
    try:
        plan = Plan.from_json(_path(at).read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError):
        return None
    return replace(plan, note=NOTE) if all(s.choice == ORIGINAL for s in plan.sites) else None


def keep(at: str, plan: Plan) -> None:
    """Keep a plan that replaces nothing for later processes; a folder that cannot be written keeps none."""
    with _lock:
        _own.add(at)
    if any(s.choice != ORIGINAL for s in plan.sites) or any(defect.is_one(m.reason) for m in plan.misses):
        return
    try:
        _path(at).parent.mkdir(mode=0o700, exist_ok=True)
        files.replace_text(_path(at), plan.to_json())
    except OSError:
        return


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
