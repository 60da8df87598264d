"""transformers' door: `attn_implementation="reattend"`, its masks carried as functions of positions.

    mask        function of (batch, head, query, key)  →  PositionMask               nothing of N² elements
    attention   module, q [b,h,p,e], k, v [b,g,m,e]    →  the model's own eager function, traced with that mask

The model's own eager function says what is to be computed: scale, groups, caps, sinks, biases and the order of roundings are
what it writes. It is also what each rewritten attention is held against, and what runs where nothing can be rewritten.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, eager_mask, padding_mask_function, prepare_padding_mask
from transformers.utils import TransformersKwargs

from ..capture.call import SizeAt
from ..graph.torch_private import check_calls, tree_leaves
from ..run.bypass import traced
from .bindings import Bindings, read_by
from .book import layer_of
from .callables import OpenNumber, standing_for
from .mask import PositionMask, Positions, added
from .reads import Reads, Seen, tensors_of
from .site import BehindDoor, Door, DoorCall

NAME = "reattend"
Function = Callable[..., Any]
_PLAIN = (type(None), bool, int, float, str)


def register(door: Door) -> None:
    """Make the name known to transformers, for attentions and for masks."""
    check_calls()
    AttentionInterface.register(NAME, partial(attention, door))
    AttentionMaskInterface.register(NAME, mask)


# --- masks --------------------------------------------------------------------------------------------------------


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0, *, mask_function: Function,
    attention_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, device: Any = "cpu", use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """What transformers asks for in the place of a mask: one by positions, or None where every key is kept.

    Inside somebody's tracing it is the dense one.
    """
    padding, whole_function = prepare_padding_mask(attention_mask, kv_length, kv_offset), mask_function

    def dense(first: Any, first_key: Any, **more: Any) -> Any:
        return eager_mask(
            batch_size, q_length, kv_length, first, first_key, whole_function, attention_mask, use_vmap=use_vmap,
            device=device, dtype=dtype, **more,
        )

    skips = bool(options.get("allow_is_bidirectional_skip"))
    if _traced(attention_mask, q_offset) or torch.device(device).type == "meta":
        made: Tensor | None = dense(q_offset, kv_offset, allow_is_bidirectional_skip=skips)
        return made
    # A static cache counts in the very tensor that it gives here, before its mask is read.
    offset, key_offset = int(q_offset), int(kv_offset)
    if attention_mask is not None and padding is not None:
        whole = bool(attention_mask.all())
        if whole and skips and _covers(attention_mask, kv_length, kv_offset) and options.get("local_size") is None:
            return None
        if not whole:
            mask_function = and_masks(mask_function, padding_mask_function(padding))
        elif not _covers(attention_mask, kv_length, kv_offset):
            mask_function = and_masks(mask_function, shorter_than(OpenNumber(attention_mask.shape[-1])))
    elif skips and options.get("local_size") is None:
        return None
    return PositionMask.of(Positions(
        batch_size, q_length, kv_length, offset, key_offset, mask_function, dtype, torch.device(device),
        not use_vmap, partial(dense, offset, key_offset),
    ))


def _covers(attention_mask: Tensor, keys: int, offset: int) -> bool:
    return attention_mask.shape[-1] >= keys + offset


def shorter_than(length: int) -> Function:
    """Keys before `length`: what padding with zeros up to a cache's size keeps of a mask of ones."""

    def keep(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < length

    return keep


def _traced(*values: object) -> bool:
    return torch.compiler.is_dynamo_compiling() or traced(values, {})


# --- attention ----------------------------------------------------------------------------------------------------


def attention(
    door: Door, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention of a module, called as transformers calls what is registered with it.

    Raises ValueError where the module leaves something to its implementations that its eager function does not do.
    """
    if _traced(query, key, value):
        refuse_foreign(module, options)
        return as_written(module, query, key, value, attention_mask, options)
    page = layer_of(module)
    if not isinstance(page.recipe, Written) or not page.recipe.takes_all_of(options):
        refuse_foreign(module, options)
    call = _call(page, module, query, key, value, attention_mask, options)
    if isinstance(call, str):
        page.calls += 1
        page.leave(call)
        return as_written(module, query, key, value, attention_mask, options)
    out = page.run(call, door)
    return (out, None) if out is not None else as_written(module, query, key, value, attention_mask, options)


def as_written(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager function with a dense mask; transformers' SDPA where the model has none."""
    if isinstance(attention_mask, PositionMask):
        attention_mask = attention_mask.positions.dense
    function = eager_of(module)
    if function is None:
        made: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return made
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = added(attention_mask, query.dtype)
    elif attention_mask is None and _is_causal(query, options):
        attention_mask = added(upper_left(query, key), query.dtype)
    out: tuple[Tensor, Tensor | None] = function(module, query, key, value, attention_mask, **options)
    return out


def _is_causal(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Without a mask, whoever says that it is causal means it, although eager functions do not look at that."""
    return query.shape[2] > 1 and bool(options.get("is_causal"))


def upper_left(query: Tensor, key: Tensor) -> Tensor:
    q, k = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    return (k[None, :] <= q[:, None])[None, None]


@dataclass(frozen=True, eq=False)
class Written:
    """How a layer's calls become functions of tensors and open numbers: all of a call but its values.

    `named` are options that are tensors, `held` the module's own tensors, `leaves` what the mask reads beside them; `unread`
    are options that the class names and its function does not read; `read` is what the function finds by name.
    """

    function: types.FunctionType
    read: Bindings
    given: frozenset[str]
    plain: Mapping[str, Any]
    named: tuple[str, ...]
    held: tuple[str, ...]
    mask: Hashable
    reading: Callable[..., Tensor | None]
    leaves: int
    key: Hashable
    unread: str

    def takes_all_of(self, options: Mapping[str, Any]) -> bool:
        """Are these the options of the recipe's call, all of which its function may leave unread?"""
        return not self.unread and options.keys() == self.given

    def serves(self, module: nn.Module, options: Mapping[str, Any], mask: Hashable) -> bool:
        """Is this the recipe of a call with these options, and is its function what the module's code names now?"""
        return (
            self.mask == mask and options.keys() == self.given and eager_of(module) is self.function and self.read.hold()
            and all(options[n] is x or (type(options[n]) is type(x) and options[n] == x) for n, x in self.plain.items())
            and all(isinstance(options[n], Tensor) for n in self.named)
        )

    def code(self, module: nn.Module, reads: Reads) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            left = iter(rest)
            made = self.reading(q, k, [next(left) for _ in range(self.leaves)])
            seen = Seen(module, {n: next(left) for n in self.held}, reads)
            out: Tensor = self.function(seen, q, k, v, made, **self.plain, **dict(zip(self.named, left)))[0]
            return out

        return run

    def where(self) -> str:
        return f"{self.function.__code__.co_filename}:{self.function.__code__.co_firstlineno}"


def _recipe(
    module: nn.Module, options: Mapping[str, Any], mask: Hashable, reading: Callable[..., Tensor | None], leaves: int
) -> Written | str:
    function = eager_of(module)
    if function is None:
        return f"{type(module).__name__} names no eager function that says what it computes"
    given = taken(function, options)
    if isinstance(given, str):
        return given
    named = tuple(n for n, x in given.items() if isinstance(x, Tensor))
    plain = {n: x for n, x in given.items() if n not in named}
    held = tuple(tensors_of(module))
    read = read_by(function)
    key = standing_for((NAME, function, read, mask, tuple((n, type(x), x) for n, x in plain.items()), held, named, leaves))
    return Written(
        function, read, frozenset(options), plain, named, held, mask, reading, leaves, key, unread_of(module, options)
    )


def _call(
    page: BehindDoor, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    options: Mapping[str, Any],
) -> DoorCall | str:
    """The call as a function of tensors and open numbers, or why it is left to transformers."""
    if why := _left(module, query, key, value, options):
        return why
    kind, reading, leaves, notes = _mask_of(query, key, attention_mask, options)
    held = tensors_of(module)
    recipe = page.recipe
    if not isinstance(recipe, Written) or tuple(held) != recipe.held or not recipe.serves(module, options, kind):
        recipe = _recipe(module, options, kind, reading, len(leaves))
        if isinstance(recipe, str):
            return recipe
        page.recipe = recipe
    more = (*held.values(), *(options[n] for n in recipe.named))
    if more and any(map(_is_of_its_own, more)):
        return "a tensor of a kind of its own is read"
    growing = _GROWING if query.shape[2] == 1 and key.shape[2] > 1 else frozenset[SizeAt]()
    values = (query, key, value, *leaves, *more)
    return DoorCall(module, recipe.where, recipe.key, values, recipe.code, growing, notes)


# The keys and values of one query grow in every step.
_GROWING: frozenset[SizeAt] = frozenset(((1, 2), (2, 2)))


def _left(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> str:
    """Why a call is left to transformers, whatever its function computes; empty where it is not."""
    if not type(query) is type(key) is type(value) is Tensor and any(map(_is_of_its_own, (query, key, value))):
        return "queries, keys or values are tensors of a kind of their own"
    device = query.device
    if device.type not in ("cpu", "cuda"):
        return f"no kernel runs on {device.type}"
    if key.device != device or value.device != device:
        return "queries, keys and values are on two devices"
    if options.get("output_attentions"):
        return "the weights are asked for"
    if module.training and options.get("dropout"):
        return "live dropout (model.eval() turns it off): its random numbers cannot be kept"
    return ""


def _is_of_its_own(x: Tensor) -> bool:
    return type(x) not in (Tensor, nn.Parameter)


def _mask_of(
    query: Tensor, key: Tensor, given: Tensor | None, options: Mapping[str, Any]
) -> tuple[Hashable, Callable[..., Tensor | None], list[Any], tuple[str, ...]]:
    """A mask's part of the key, what makes it of its leaves, the leaves, and what the report should say."""
    if given is None:
        causal = _is_causal(query, options)
        return ("none", causal), (lambda q, k, _: added(upper_left(q, k), q.dtype) if causal else None), [], ()
    notes: tuple[str, ...] = ()
    if isinstance(given, PositionMask):
        at = given.positions
        fits = (at.batch, at.queries, at.keys) == (query.shape[0], query.shape[2], key.shape[2])
        if not isinstance(at.lifted, str) and fits:
            return ("positions", at.key), at.reading, at.leaves, ()
        why = at.lifted if isinstance(at.lifted, str) else "it was made for other sizes"
        given, notes = at.dense, (f"a mask's function could not be lifted, the mask is dense: {why}",)
    if given.dtype == torch.bool:
        return ("boolean", given.dim()), (lambda q, k, rest: added(rest[0], q.dtype)), [given], notes
    return ("additive", given.dim()), (lambda q, k, rest: rest[0]), [given], notes


# --- the model's own function ---------------------------------------------------------------------------------------

_FIRST = ("module", "query", "key", "value", "attention_mask")


def eager_of(module: nn.Module) -> types.FunctionType | None:
    """The function that a module's code names for eager attention; None where it names none, or several.

    People patch functions, methods and the `forward` of one module: what counts is what is named now.
    """
    forward = vars(module).get("forward")
    if forward is not None and (own := dict.fromkeys(_named_by(forward))):
        return next(iter(own)) if len(own) == 1 else None
    return _eager_of(type(module))


# What classes name for eager attention, and where that was found; of so many classes.
_known: dict[type, tuple[types.FunctionType | None, Bindings]] = {}
_CLASSES = 512


def _eager_of(kind: type) -> types.FunctionType | None:
    known = _known.get(kind)
    if known is None or not known[1].hold():
        found, read = _look(kind)
        if len(_known) >= _CLASSES:
            _known.clear()
        known = _known[kind] = found, Bindings(read)
    return known[0]


def _look(kind: type) -> tuple[types.FunctionType | None, list[tuple[Mapping[str, Any], str]]]:
    """The one function of the shape of an attention that a class names, and all that this was decided by."""
    read = list[tuple[Mapping[str, Any], str]]()
    for base in kind.__mro__:
        methods = vars(base)
        read += [(methods, n) for n, m in methods.items() if callable(m)]
        for m in filter(None, map(_function, methods.values())):
            space = m.__globals__
            read += [(space, n) for n in m.__code__.co_names if isinstance(space.get(n), types.FunctionType)]
        found = dict.fromkeys(f for m in methods.values() for f in _named_by(m))
        if found:
            return next(iter(found)) if len(found) == 1 else None, read
    return None, read


def _function(member: object) -> types.FunctionType | None:
    """The function below a method, or below what wraps one."""
    method = inspect.unwrap(member) if callable(member) else None
    method = getattr(method, "__func__", method)
    return method if isinstance(method, types.FunctionType) else None


def _named_by(member: object) -> list[types.FunctionType]:
    """The functions of the shape of an attention that a method names."""
    method = _function(member)
    if method is None:
        return []
    read = (method.__globals__.get(n) for n in method.__code__.co_names)
    return [f for f in read if isinstance(f, types.FunctionType) and _is_attention(f)]


def _is_attention(f: types.FunctionType) -> bool:
    return tuple(inspect.signature(f).parameters)[:5] == _FIRST


@lru_cache(maxsize=512)
def _parameters(function: types.FunctionType) -> tuple[frozenset[str], bool]:
    """The options that a function names, and whether it looks at the others."""
    parameters = inspect.signature(function).parameters.values()
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    looks = any(i.argval == rest and i.opname.startswith("LOAD") for i in dis.get_instructions(function))
    return frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD), rest is not None and looks


def taken(function: types.FunctionType, options: Mapping[str, Any]) -> dict[str, Any] | str:
    """The options that a function can read, or why they cannot be traced."""
    names, looks = _parameters(function)
    given = {n: x for n, x in options.items() if looks or n in names}
    for n, x in given.items():
        if isinstance(x, Tensor):
            continue
        if type(x) not in _PLAIN:
            return f"the option {n} is a {type(x).__name__}" + (" of tensors" if tree_leaves(x) else "")
    return given


# Options that transformers passes through its models, whatever the implementation.
_PASSED = frozenset(TransformersKwargs.__annotations__)


def refuse_foreign(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a module hands a tensor by name to its implementations that its eager function does not read.

    An index of selected keys is one: such a module masks the others itself where the implementation is named eager or SDPA.
    """
    unread = unread_of(module, options)
    found = [n for n in unread.split() if isinstance(options[n], Tensor)]
    if found and (foreign := [n for n in found if not any(options[n] is x for x in tensors_of(module).values())]):
        raise ValueError(
            f"reattend: {type(module).__name__} hands over {', '.join(foreign)}, which its eager attention does not read: "
            'this model needs an implementation that does; attn_implementation="sdpa" or "eager" runs it'
        )


def unread_of(module: nn.Module, options: Mapping[str, Any]) -> str:
    """The names of options that a module's class writes and its eager function does not read."""
    found: str = _unread(type(module).__module__, type(module).__qualname__, " ".join(options))
    return found


# Dynamo takes the answer as it is: how it is found is none of the model's code.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unread(file: str, name: str, options: str) -> str:
    return _found_unread(file, name, options)


@lru_cache(maxsize=512)
def _found_unread(file: str, name: str, options: str) -> str:
    """Those of some options that the code of a class writes by name and its eager function does not read."""
    kind = reduce(lambda x, part: getattr(x, part, None), name.split("."), sys.modules.get(file))
    function = _eager_of(kind) if isinstance(kind, type) else None
    if function is None:
        return ""
    names, looks = _parameters(function)
    unread = frozenset() if looks else _texts(kind) - names - _PASSED
    return " ".join(n for n in options.split() if n in unread)


def _texts(kind: Any) -> frozenset[str]:
    methods = (inspect.unwrap(m) for base in kind.__mro__ for m in vars(base).values() if callable(m))
    held = (c for m in methods if isinstance(m, types.FunctionType) for c in m.__code__.co_consts)
    return frozenset(x for c in held for x in (c if isinstance(c, tuple) else (c,)) if isinstance(x, str))
