"""How a model calls SDPA where nothing traces it: some models pass a mask to a trace that they leave out when they run.

    captured   sdpa(Q, K, V, mask)                 as it runs   sdpa(Q, K, V, is_causal=True)

The model's own Python runs once on tensors without data. What is made of sizes alone (positions, and tests of them) has its
data beside it, so that branches on it are taken as they would be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..capture.export import held_tensors
from ..find.place import BARE
from ..graph import torch_private
from ..graph.node import arguments, op_name
from ..graph.torch_private import tree_leaves, tree_map

_SDPA = torch.nn.functional.scaled_dot_product_attention
# How a number is read out of a tensor.
READ = "aten._local_scalar_dense.default"
# Positions of a million tokens have data; masks of all pairs do not.
LARGEST = 1 << 21


def mark_bare(gm: fx.GraphModule, model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """Mark the calls of SDPA in a captured graph whose mask is there for the trace alone; what a plan says of it.

    Nothing where no call passes a mask.
    """
    calls = [n for n in gm.graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    masked = [isinstance(arguments(n)["attn_mask"], fx.Node) for n in calls]
    if not any(masked):
        return ""
    passed = masks_passed(model, args, kwargs)
    if passed is None or len(passed) != len(calls):
        return "; whether the model passes its masks where nothing traces it is not known: compared with the captured calls"
    bare = [n for n, captured, runs in zip(calls, masked, passed) if captured and not runs]
    for n in bare:
        n.meta[BARE] = True
    many = f"{len(bare)} of its {len(calls)} calls of SDPA" if len(bare) < len(calls) else "its calls of SDPA"
    return f"; where nothing traces it the model passes no mask to {many}, and is compared as it runs" if bare else ""


def masks_passed(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[bool, ...] | None:
    """For each call of SDPA, in order: does it get a mask? None where the model asks for data that is not there.

    A copy of the model runs, whose weights have no data: what a model keeps on itself stays as it was.
    """
    calls = _Calls()
    tensors, make = held_tensors((args, dict(kwargs)))
    state = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    bare = [t.detach().to("meta") for t in tensors]
    pairs = [*zip(bare, tensors), *((state[name], t) for name, t in model.named_buffers())]
    known = ((b, t) for b, t in pairs if t.device.type == "cpu" and type(t) is Tensor)
    given: Any = make(bare)
    own = dict((*model.named_parameters(), *model.named_buffers()))
    memo: dict[int, Any] = {id(t): state[name] for name, t in own.items()}
    try:
        with calls, _Beside(known), torch.no_grad():
            functional_call(copy.deepcopy(model, memo), state, *given)
    except Exception:
        # a branch on data, a tensor that the code makes on another device: nothing is known, and nothing is said
        return None
    return tuple(calls.masked)


class _Calls(TorchFunctionMode):
    """Notes the calls of SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _SDPA:
            given = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
            self.masked.append(isinstance(given, Tensor))
        return func(*args, **(kwargs or {}))


class _Beside(torch_private.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Small tensors on the meta device with their data beside them, where it follows from what is known."""

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.data: Any = WeakTensorKeyDictionary()
        for bare, t in known:
            if t.numel() <= LARGEST:
                self.data[bare] = t.detach().clone()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        followed = all(self._known(x) for x in tensors) and torch.Tag.nondeterministic_seeded not in func.tags
        if followed and str(func) == READ:
            return func(self._of(tensors[0]))
        out = func(*args, **given[1])
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if torch_private.schema(func).is_mutable and not followed:
            self._forget(tensors)
        elif followed and made and all(x.numel() <= LARGEST for x in made):
            values = func(*tree_map(self._of, args), **_there(tree_map(self._of, given[1])))
            for x, value in zip(made, (v for v in tree_leaves(values) if isinstance(v, Tensor))):
                if x.device.type == "meta":
                    self.data[x] = value
        return out

    def _known(self, x: Tensor) -> bool:
        return x.device.type == "cpu" or x in self.data

    def _of(self, x: Any) -> Any:
        return self.data[x] if isinstance(x, Tensor) and x in self.data else x

    def _forget(self, tensors: Sequence[Tensor]) -> None:
        """What shares memory with these is no longer known."""
        lost = {_memory(self.data[x]) for x in tensors if x in self.data}
        for x in [x for x, value in self.data.items() if _memory(value) in lost]:
            del self.data[x]


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _there(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a factory, on the CPU."""
    return {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
