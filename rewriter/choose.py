"""Choice: the candidates of every attention, what each would cost, which one runs, and why; then the rewrite itself.

    graph ─ detect → attentions ─ candidates → Site (plain data) + Call (what is spliced) ─ splice → graph

Candidates are the original code, SDPA, FlexAttention and our kernel. Cheapest first, of those that may run here: the policy
permits them, the device has them, gradients flow through them where they are wanted. Identical attentions are decided once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..cost_model.device import Device, targets, with_threads
from ..cost_model.device import device as device_named
from ..cost_model.plan import ORIGINAL, Miss, Plan, Site
from ..cost_model.predict import VendorUse
from ..patterns import expr as ex
from ..patterns.cascade import Cascade
from ..patterns.evaluate import DTYPE_NAME, infer_sizes
from ..patterns.recognise import Attention, attention
from . import capture, splice
from .candidates import Question, answer, guard_sentences
from .detect import Found, NearMiss, find
from .guards import original_subgraph
from .lift import arguments, op_name
from .liveness import erase_dead, survivors
from .operators_contract import PRODUCTS
from .policy import Policy


@dataclass(frozen=True)
class Request:
    """What a graph is planned for. `executable`: the plan will run in this process, on the tensors' own device.

    `choices` names the candidate of some sites, by module path, instead of the cheapest. `traced`: the rewritten graph goes
    to Inductor, where nothing can branch on data.
    """

    policy: Policy
    target: Device | None = None
    executable: bool = True
    choices: Mapping[str, str] = field(default_factory=dict)
    traced: bool = False


@dataclass(frozen=True)
class Decision:
    """An attention of a graph with what was decided, and what each candidate that can run would be spliced as."""

    found: Found
    site: Site
    calls: Mapping[str, splice.Call]

    @property
    def call(self) -> splice.Call | None:
        """What the choice is spliced as; None where the original code stays."""
        return self.calls.get(self.site.choice)


# --- devices ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def running_device(kind: str) -> Device:
    """The device that tensors of a torch device type are on. Raises ValueError for one that no data file describes."""
    if kind == "cuda":
        return _gpu(torch.cuda.get_device_name(), _architecture())
    if kind == "cpu":
        return _cpu(torch.get_num_threads())
    raise ValueError(
        f"no device file describes {kind!r} tensors: name a target; one of {', '.join(d.name for d in targets())}"
    )


@lru_cache(maxsize=16)
def _cpu(threads: int) -> Device:
    return with_threads(device_named("cpu"), threads)


def _architecture() -> str:
    properties = torch.cuda.get_device_properties()
    hip = getattr(properties, "gcnArchName", "")
    return hip.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _gpu(name: str, architecture: str) -> Device:
    """The device file with this name, else one of the same architecture."""
    gpus = [d for d in targets() if d.is_gpu]
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *(a + b for a, b in pairwise(words))}
    for d in gpus:
        if d.name in known:
            return d
    for d in gpus:
        if d.arch == architecture:
            return d
    raise ValueError(
        f"no device file describes {name} ({architecture}): name a target; one of {', '.join(d.name for d in gpus)}"
    )


# --- a graph ------------------------------------------------------------------------------------------------------


def rewrite(captured: capture.Captured, request: Request) -> Plan:
    """Plan every attention of a captured graph and splice the chosen calls in. The graph is changed in place."""
    sites: list[Site] = []
    misses: list[Miss] = []
    where = request.target
    for region in capture.regions(captured.graph):
        decisions, missed = decide(region, request)
        for d in decisions:
            if d.call is not None:
                f = d.found
                original = original_subgraph(region, f.output, interior(f)) if d.call.guarded else None
                splice.replace(region, f.output, f.tensors, f.scalars, d.call, name=d.site.name, original=original)
        splice.finish(region)
        sites += [d.site for d in decisions]
        misses += missed
        where = where or _device_of(region)
    return Plan(tuple(sites), tuple(misses), where or running_device("cpu"))


def decide(gm: fx.GraphModule, request: Request) -> tuple[list[Decision], list[Miss]]:
    """Every attention of a graph with its decision, and what was left alone."""
    erase_dead(gm)
    found, missed = find(gm)
    hints = size_hints(gm)
    decisions = [_decide(f, hints, request) for f in found]
    return decisions, [_miss(m) for m in missed]


def _miss(m: NearMiss) -> Miss:
    what = f"{m.what} in {m.module}" if m.module else m.what
    return Miss(m.where, what, m.reason, m.hint)


def _device_of(gm: fx.GraphModule) -> Device | None:
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type in ("cpu", "cuda"):
            return running_device(value.device.type)
    return None


def size_hints(gm: fx.GraphModule) -> Mapping[str, int]:
    """The size that each symbol of the graph has in the example that it was traced with."""
    out: dict[str, int] = {}
    for n in gm.graph.nodes:
        value = n.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for s in sizes:
            if isinstance(s, torch.SymInt) and s.node.hint is not None:
                expression = s.node.expr
                if expression.is_Symbol:
                    out.setdefault(str(expression), int(s.node.hint))
    return out


# --- one attention ------------------------------------------------------------------------------------------------


def _decide(f: Found, hints: Mapping[str, int], request: Request) -> Decision:
    value = f.output.meta["val"]
    device = request.target or running_device(value.device.type)
    sizes = known_sizes(f, hints)
    bound = _bound_to_original(f)
    question = Question(
        f.cascade, tuple(sorted(sizes.items())), device, request.policy, request.executable, wants_gradient(f), bound,
        str(value.dtype).removeprefix("torch."), _written(f), request.traced,
    )  # fmt: skip
    site, calls = answer(question)
    wished = request.choices.get(f.module, site.choice)
    choice = wished if wished == ORIGINAL or wished in calls else site.choice
    site = replace(
        site, name=f.module, where=f.where, choice=choice, guards=guard_sentences(calls.get(choice)),
        notes=(*site.notes, *f.notes),
    )  # fmt: skip
    return Decision(f, site, calls)


def known_sizes(f: Found, hints: Mapping[str, int]) -> dict[str, int]:
    """The symbols of an attention's cascade with the sizes of the example that it was traced with."""
    sizes = {s: hints[s] for s in f.cascade.free_symbols if s in hints}
    for name, node in f.scalars.items():
        known = getattr(getattr(node.meta.get("val"), "node", None), "hint", None)
        if known is not None:
            sizes[name] = int(known)
    return sizes


def _bound_to_original(f: Found) -> str:
    """Why this attention cannot be replaced where it stands, whatever its cascade says; empty when it can."""
    inside = interior(f)
    scores = _scores(f, inside)
    escaped = survivors(frozenset(scores), f.output)
    if escaped:
        reader = next(u for n in escaped for u in n.users if u not in inside and u is not f.output)
        return f"the scores or weights are read elsewhere ({reader.name}): they would be computed twice"
    if wants_gradient(f) and (cut := _gradient_cut(inside)):
        return f"a gradient is cut inside the attention (at {cut.name})"
    return ""


def wants_gradient(f: Found) -> bool:
    """Whether a gradient flows back through the output; under no_grad it does not, whatever the parameters want."""
    return bool(f.output.meta["val"].requires_grad)


def interior(f: Found) -> frozenset[fx.Node]:
    """The nodes between the inputs of an attention and its output."""
    stop = {*f.tensors.values(), *f.scalars.values()}
    seen: set[fx.Node] = set()
    stack = [f.output]
    while stack:
        n = stack.pop()
        if n in seen or n in stop or n.op != "call_function":
            continue
        seen.add(n)
        stack.extend(n.all_input_nodes)
    return frozenset(seen - {f.output})


_CONTRACTIONS = frozenset((*PRODUCTS, "baddbmm", "addmm")) - {"sum", "linear"}


def _scores(f: Found, inside: frozenset[fx.Node]) -> set[fx.Node]:
    """The interior nodes from the products of queries and keys on: scores, weights and what is between."""
    order = {n: i for i, n in enumerate(f.output.graph.nodes)}
    reached = {n for n in inside if op_name(n) in _CONTRACTIONS} or _meeting(f, inside, order)
    for n in sorted(inside, key=lambda x: order[x]):
        if any(i in reached for i in n.all_input_nodes):
            reached.add(n)
    return reached


def _meeting(f: Found, inside: frozenset[fx.Node], order: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Where a product is spelled by hand: the nodes that depend on the query's and on the key's operand."""
    view = attention(f.cascade)
    assert isinstance(view, Attention), view
    sides: list[set[fx.Node]] = [set(), set()]
    for e in view.products:
        for load in ex.loads(e.body):
            if str(load.attr) in f.tensors:
                sides[view.key in load.ranks].add(f.tensors[str(load.attr)])
    for n in sorted(inside, key=lambda x: order[x]):
        for reached in sides:
            if any(i in reached for i in n.all_input_nodes):
                reached.add(n)
    return {n for n in inside if n in sides[0] and n in sides[1]}


def _gradient_cut(inside: frozenset[fx.Node]) -> fx.Node | None:
    """A node inside whose inputs want a gradient and whose floating value does not."""
    for n in inside:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
            for i in n.all_input_nodes:
                given = i.meta.get("val")
                if isinstance(given, torch.Tensor) and given.requires_grad:
                    return n
    return None


def _written(f: Found) -> VendorUse | None:
    """How the model itself calls SDPA, if that is what it does; the mask that it passes is made once for many layers."""
    if op_name(f.final) != "scaled_dot_product_attention":
        return None
    given = arguments(f.final)
    mask = given["attn_mask"]
    if not isinstance(mask, fx.Node):
        return VendorUse("", skips=bool(given["is_causal"]))
    value = mask.meta["val"]
    return VendorUse("", False, math.prod(splice.hint(s) for s in value.shape), DTYPE_NAME[value.dtype])


def bind_sizes(c: Cascade, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, int]:
    """Every symbol of a cascade from its inputs' shapes and the graph's scalars."""
    return infer_sizes(c, tensors, {name: int(v) for name, v in scalars.items() if name in c.free_symbols})
