"""What one graph node says of itself: its operator's name, its arguments, the tensor it makes, what it writes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ...patterns.evaluate import DTYPE_NAME
from .torch_private import OpOverload, schema

# In the metadata of a node that belongs to a loop: what is lifted elsewhere reads its value as it is.
FOLDED = "reattend_loop"


class CannotLift(Exception):
    """Raised inside lifting only, and caught there: the node (or the whole attempt) has no form as a term."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def op_name(n: fx.Node) -> str:
    """`aten::softmax.int` → `softmax`; in-place variants lose their underscore (aliases are checked elsewhere)."""
    if n.op != "call_function":
        return n.op
    if n.target is operator.getitem:
        return "getitem"
    if isinstance(n.target, OpOverload):
        whole = schema(n.target).name
        namespace, _, name = whole.partition("::")
        if namespace != "aten":
            return whole
        return name.removesuffix("_") if not name.startswith("__") else name
    return str(getattr(n.target, "__name__", n.target))


def arguments(n: fx.Node) -> dict[str, object]:
    """Arguments by the schema's names, defaults filled in."""
    if not isinstance(n.target, OpOverload):
        return {str(i): a for i, a in enumerate(n.args)}
    out: dict[str, object] = {}
    for i, a in enumerate(schema(n.target).arguments):
        if i < len(n.args):
            out[a.name] = n.args[i]
        elif a.name in n.kwargs:
            out[a.name] = n.kwargs[a.name]
        else:
            out[a.name] = a.default_value
    return out


def tensor_of(n: fx.Node) -> torch.Tensor:
    value = n.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise CannotLift(f"{n.name} is no tensor", n)
    return value


def dtype_of(n: fx.Node) -> str:
    name = DTYPE_NAME.get(tensor_of(n).dtype)
    if name is None:
        raise CannotLift(f"{n.name} has the type {tensor_of(n).dtype}, which has no term", n)
    return name


def constant_of(n: fx.Node) -> torch.Tensor | None:
    """The tensor that a graph holds as a constant; parameters and buffers may change, and fake tensors have no value."""
    held: object = n.graph.owning_module if n.op == "get_attr" else None
    for part in str(n.target).split(".") if held is not None else ():
        held = getattr(held, part, None)
    return held if type(held) is torch.Tensor and held.device.type != "meta" and not held.requires_grad else None


def written_arguments(n: fx.Node) -> list[fx.Node]:
    """The nodes that an operator writes in place, by its schema."""
    if not isinstance(n.target, OpOverload):
        return []
    out: list[fx.Node] = []
    for i, a in enumerate(schema(n.target).arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = n.args[i] if i < len(n.args) else n.kwargs.get(a.name)
            out.extend(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node))
    return out
