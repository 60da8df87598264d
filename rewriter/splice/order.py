"""Another order of a value's memory: where it is gone a few operators on, and whether all that must lie apart still does.

    before   out [b,h,p,f] as it lies; transpose(1, 2); contiguous()        the copy that the model makes anyway
    after    out as [b,p,h,f] in memory; the copy is none any more, and what it gave lies where `out` lies

Whoever runs a graph may write to what it gives, and a kernel keeps its result for a backward: such copies stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...patterns.cascade import Size
from ..graph import torch_private
from ..graph.aliases import SPLICED, shared_by
from ..graph.liveness import is_pure
from ..graph.node import op_name, written_arguments
from ..graph.sizes import same, shape_of, size_of

# Whether the value of a node shares storage with a tensor that it is given; where nothing is said, its fake values say so.
Shared = Mapping[fx.Node, bool]

# How far a changed order of memory is followed, and operators that read strides without failing on others.
_FOLLOWED = 16
_EXACT_STRIDES = ("as_strided", "as_strided_scatter", "set", "resize")


def absorbed(output: fx.Node, value: torch.Tensor) -> tuple[dict[fx.Node, torch.Tensor], Shared] | None:
    """New fake values of the readers of `output`, when its other order of memory is gone a few operators on.

    With them, which readers share storage with what they read. None where a reader needs the old order (a view that would
    fail, a write, a custom operator, the end of the graph), or where a dropped copy would be missed.
    """
    new: dict[fx.Node, torch.Tensor] = {output: value}
    shared: dict[fx.Node, bool] = {}
    queue = list(output.users)
    while queue:
        n = queue.pop(0)
        old = n.meta.get("val")
        plain = n.op == "call_function" and isinstance(n.target, torch_private.OpOverload) and is_pure(n)
        if not plain or len(new) > _FOLLOWED or not isinstance(old, torch.Tensor) or op_name(n) in _EXACT_STRIDES:
            return None
        try:
            made, shared[n] = _run(n, new)
        except (RuntimeError, ValueError):
            return None
        if made.dtype != old.dtype or not equal(shape_of(made), shape_of(old)):
            return None
        if same_strides(made, old):
            continue
        new[n] = made.requires_grad_(old.requires_grad)
        queue.extend(n.users)
    if not _apart_as_before(output, shared):
        return None
    del new[output]
    return new, shared


def is_known_outside(output: fx.Node, shared: Shared) -> bool:
    """Whether the memory of `output` is written in the graph, or given to someone who may write to it."""
    storages = _storages(output, shared)
    return storages is None or any(s is output and (_is_given_away(n) or _is_written(n)) for n, s in storages.items())


def _apart_as_before(output: fx.Node, shared: Shared) -> bool:
    """Whether nobody can tell the storages of what is made of `output` from those of the model's code."""
    if all(_shares(n) == s for n, s in shared.items()):
        return True
    before, after = _storages(output, {}), _storages(output, shared)
    if before is None or after is None or any(_is_written(n) for n in before):
        return False
    given = [n for n in before if _is_given_away(n)]
    if any((before[a] is before[b]) != (after[a] is after[b]) for a in given for b in given):
        return False
    # what a backward keeps must lie apart from what is given away: the kernel's result, and what others read
    kept = [n for n in before if output.meta["val"].requires_grad]
    return not any(after[a] is after[b] and before[a] is not before[b] for a in given for b in kept)


def _storages(output: fx.Node, shared: Shared) -> dict[fx.Node, fx.Node] | None:
    """For `output` and all that may lie in its memory, the node that made the storage. None where that is not known."""
    near, queue = {output}, [output]
    while queue:
        n = queue.pop()
        found = [u for u in n.users if u not in near and n in shared_by(u)]
        near.update(found)
        queue += found
    storages = {output: output}
    for n in sorted(near - {output}):
        made = list(dict.fromkeys(storages[i] for i in shared_by(n) if i in storages))
        if len(made) != 1:
            return None
        storages[n] = made[0] if (shared[n] if n in shared else _shares(n)) else n
    return storages


def _shares(n: fx.Node) -> bool:
    """Whether the value of `n` shares storage with a tensor that it is given, in the model's code."""
    if not isinstance(n.target, torch_private.OpOverload) or not is_pure(n):
        return True
    return _run(n, {})[1]


def _run(n: fx.Node, new: Mapping[fx.Node, torch.Tensor]) -> tuple[Any, bool]:
    """The value of an operator on fake values, some of them new, and whether it shares storage with a tensor given."""
    args, kwargs = fx.map_arg((n.args, n.kwargs), lambda x: new[x] if x in new else x.meta["val"])
    given = _tensors((args, kwargs))
    mode = torch_private.detect_fake_mode(given)
    target: Callable[..., Any] = n.target  # type: ignore[assignment]
    with mode if mode is not None else contextlib.nullcontext(), torch.no_grad():
        made = target(*args, **kwargs)
    places = [x.untyped_storage() for x in given]
    return made, any(x.untyped_storage() is p for x in _tensors(made) for p in places)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in torch_private.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _is_written(n: fx.Node) -> bool:
    return any(n in written_arguments(u) for u in n.users)


def _is_given_away(n: fx.Node) -> bool:
    """Whether someone gets the value of whom the graph does not say what is done with it."""
    return any(
        not (u.op == "call_function" and (isinstance(u.target, torch_private.OpOverload) or is_pure(u)))
        and SPLICED not in u.meta
        for u in n.users
    )


def equal(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are the same, whatever their symbols stand for."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values of one shape lie alike in memory."""
    return all(same(size_of(x), size_of(y)) for x, y, s in zip(a.stride(), b.stride(), b.shape) if size_of(s) != 1)
