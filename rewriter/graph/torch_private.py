"""Every private or undocumented part of PyTorch that is used: what for, since when, and what fails without it.

Nothing else in the package touches such a part. One that a later PyTorch drops is found missing where it is first needed,
and said in a sentence. docs/compatibility.md has these entries as a table.
"""

from __future__ import annotations

import logging
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

if TYPE_CHECKING:
    import sympy
    from torch._ops import OpOverload as OpOverload
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


class TorchChanged(ImportError):
    """This PyTorch lacks a part that is used here; the sentence says which, and what cannot be done."""


@dataclass(frozen=True)
class Private:
    """A part of PyTorch that promises nothing. `path`: module:name, or words where it is no name of a module.

    `since`: the oldest PyTorch of 2.2, 2.5, 2.8, 2.11 and 2.13 that has it as it is used here. `without`: what fails.
    """

    path: str
    use: str
    since: str
    without: str

    @property
    def shown(self) -> str:
        return self.path.replace(":", ".")

    def found(self) -> Any:
        """The part itself, as it is now. Raises TorchChanged."""
        try:
            owner, name = _owner(self.path)
            return getattr(owner, name)
        except (ImportError, AttributeError):
            raise self.gone() from None

    def gone(self) -> TorchChanged:
        return TorchChanged(
            f"PyTorch {torch.__version__} lacks {self.shown} ({self.use}): {self.without}. "
            "docs/compatibility.md names the versions that have it"
        )


@cache
def _owner(path: str) -> tuple[object, str]:
    """What holds a part, looked up once: some parts are asked for at every call of a model."""
    module, _, names = path.partition(":")
    within, _, name = names.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{within}" if within else module), name


# --- operators and values -----------------------------------------------------------------------------------------

OVERLOAD = Private("torch._ops:OpOverload", "the operators of a graph", "2.2", "no graph can be read")
SCHEMA = Private("OpOverload._schema", "an operator's schema", "2.2", "no graph can be read")
FAKE_TENSOR = Private("torch._subclasses.fake_tensor:FakeTensor", "values without data", "2.2", "no graph can be read")
FAKE_MODE = Private(
    "torch._subclasses.fake_tensor:FakeTensorMode", "what makes such values", "2.2", "no graph can be read"
)
DISPATCH_MODE = Private(
    "torch.utils._python_dispatch:TorchDispatchMode", "seeing the casts of autocast", "2.2", "no graph can be read"
)
ITEM = Private(
    "FakeTensor.item_memo", "floats that change from call to call", "2.8", "Inductor compiles again for each of their values"
)
DETECT = Private(
    "torch._guards:detect_fake_mode", "the fake mode of a graph's values", "2.2", "no graph can be rewritten"
)
LEAVES = Private(
    "torch.utils._pytree:tree_leaves", "the values in nested containers", "2.2", "no model can be run or planned"
)
MAP = Private(
    "torch.utils._pytree:tree_map", "nested containers of other values", "2.2", "a factory's inputs cannot be cast"
)
FLATTEN = Private("torch.utils._pytree:tree_flatten", "values beside their containers", "2.2", "no second derivatives")
UNFLATTEN = Private("torch.utils._pytree:tree_unflatten", "containers of such values", "2.2", "no second derivatives")
SIZE = Private(
    "torch.SymInt.node", "the term, hint and range of an open size", "2.2", "no graph with open sizes can be read"
)

if not TYPE_CHECKING:
    OpOverload = OVERLOAD.found()
    FakeTensor, FakeTensorMode = FAKE_TENSOR.found(), FAKE_MODE.found()
    TorchDispatchMode = DISPATCH_MODE.found()


def schema(operator: OpOverload) -> torch.FunctionSchema:
    """An operator's schema: its name, arguments, results, and what aliases or is written."""
    try:
        return operator._schema
    except AttributeError:
        raise SCHEMA.gone() from None


def detect_fake_mode(values: Sequence[object]) -> FakeTensorMode | None:
    """The fake mode that the values were made under."""
    mode: FakeTensorMode | None = DETECT.found()(values)
    return mode


def is_python_float(value: object) -> bool:
    """Is this a tensor of one number that Dynamo made of a float that changes from call to call?"""
    if not isinstance(value, Tensor) or value.dim() or value.dtype is not torch.float64:
        return False
    return isinstance(getattr(value, "item_memo", None), torch.SymFloat)


def tree_leaves(tree: object) -> list[Any]:
    """The values in nested tuples, lists and mappings."""
    leaves: list[Any] = LEAVES.found()(tree)
    return leaves


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Nested tuples, lists and mappings with each value replaced, given those in the same places of others."""
    return MAP.found()(function, tree, *others)


def tree_flatten(tree: object) -> tuple[list[Any], Any]:
    """The values in nested containers, and the containers without them."""
    flat: tuple[list[Any], Any] = FLATTEN.found()(tree)
    return flat


def tree_unflatten(values: Sequence[object], form: Any) -> Any:
    """The containers with these values in them."""
    return UNFLATTEN.found()(values, form)


def expression(size: torch.SymInt) -> sympy.Expr:
    """An open size as a term over its graph's symbols."""
    return _node(size).expr


def known_size(size: torch.SymInt) -> int | None:
    """The number where the size is open in name only."""
    number: int | None = _node(size).maybe_as_int()
    return number


def traced_size(size: torch.SymInt) -> int | None:
    """The size in the example that was traced; None where it has none."""
    number = _node(size).hint
    return None if number is None else int(number)


def bounds(size: torch.SymInt) -> tuple[Any, Any] | None:
    """The least and the greatest value that the trace allows; None where nothing is known."""
    known = _node(size).shape_env.var_to_range.get(expression(size))
    return None if known is None else (known.lower, known.upper)


def least(size: torch.SymInt) -> float:
    """The least value that a symbol of an open number may have, as far as the trace is guarded; −∞ where none is known."""
    node = _node(size)
    ranges = [node.shape_env.var_to_range.get(s) for s in node.expr.free_symbols]
    return min((-math.inf if r is None else float(r.lower) for r in ranges), default=math.inf)


def _node(size: torch.SymInt) -> Any:
    try:
        return size.node
    except AttributeError:
        raise SIZE.gone() from None


# --- operators that graphs hold -----------------------------------------------------------------------------------

ENTER = Private(
    "torch.amp.autocast_mode:_enter_autocast", "where a graph enters autocast", "2.2", "no graph can be captured"
)
EXIT = Private(
    "torch.amp.autocast_mode:_exit_autocast", "where a graph leaves autocast", "2.2", "no graph can be captured"
)
GRAD = Private("torch._C:_set_grad_enabled", "where a graph sets grad mode", "2.2", "no graph can be captured")
TAG = Private(
    "torch.ops:higher_order.tag_activation_checkpoint", "checkpointed regions", "2.2", "no graph can be captured"
)
WRAP_GRAD = Private(
    "torch.ops:higher_order.wrap_with_set_grad_enabled", "export's regions of a grad mode", "2.5",
    "no graph can be captured",
)
WRAP_AUTOCAST = Private(
    "torch.ops:higher_order.wrap_with_autocast", "export's regions of autocast", "2.5", "no graph can be captured"
)
COPY = Private("torch.ops:aten._to_copy.default", "the cast that autocast makes", "2.2", "no graph can be captured")
METADATA = Private(
    "torch.ops:aten._assert_tensor_metadata.default", "export's assertions on types", "2.2", "no graph can be captured"
)
UNSAFE_VIEW = Private(
    "torch.ops:aten._unsafe_view.default", "a result in another shape that is no view for autograd", "2.2",
    "writes into such a result where gradients are wanted raise",
)

LOGS_USE = Private(
    "torch._C:_log_api_usage_once", "a call of Dynamo's graphs that does nothing to them", "2.2",
    "a graph that holds one is traced as a whole",
)

ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD = ENTER.found(), EXIT.found(), GRAD.found()
SWITCHES = (ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD)
CHECKPOINT, GRAD_REGION, AUTOCAST_REGION = TAG.found(), WRAP_GRAD.found(), WRAP_AUTOCAST.found()
TO_COPY, ASSERT_METADATA = COPY.found(), METADATA.found()


# --- capture ------------------------------------------------------------------------------------------------------

MAKE_FX = Private(
    "torch.fx.experimental.proxy_tensor:make_fx", "a graph of operators from Dynamo's", "2.2", "no graph can be captured"
)
CONTEXT = Private(
    "torch._guards:TracingContext", "Dynamo's fake values, under its symbols", "2.5", "no graph can be captured"
)
FACTS = Private(
    "guards, replacements, divisible and var_to_range of ShapeEnv", "what a trace is guarded on", "2.2",
    "no plan is kept on disk",
)
FRAME = Private(
    "torch._dynamo.symbolic_convert:tls.current_tx", "the module whose code is compiled", "2.2",
    "operators of a method's own code have no module path",
)
CHECKPOINT_KEY = Private(
    "GraphModule.meta['_checkpoint_context_fn']", "tracing a checkpointed region", "2.2",
    "a graph with such a region is not captured",
)
NOTED = Private(
    "Node.meta['example_value'] of Dynamo's graphs", "what Dynamo knows of the result of a call", "2.2",
    "each call of a graph is traced, those of equal layers among them",
)
WRITES = Private(
    "Tensor._version", "whether a call writes to what it is given", "2.2", "no graph can be captured"
)
NESTING = Private(
    "functions of torch._functorch that end in _increment_nesting", "where a graph transforms a function", "2.5",
    "such a graph is told by the values that its capture leaves only",
)
WRAPPED = Private(
    "torch._C._functorch:is_functorch_wrapped_tensor", "values inside a transform of functions", "2.5",
    "no graph can be captured",
)
HIGHER_ORDER = Private(
    "torch._ops:HigherOrderOperator", "operators whose bodies are graphs", "2.2", "no graph can be captured"
)
FLEX = Private(
    "torch.ops:higher_order.flex_attention", "a FlexAttention that a model calls", "2.5", "it is left alone, and not named"
)
SAFE_SOFTMAX = Private(
    "torch.ops:aten._safe_softmax.default", "the rows of a FlexAttention", "2.5", "it is left alone"
)
LEAVE_MAP = Private(
    "torch._C._functorch:_vmap_decrement_nesting", "leaving a mapped function whose trace failed", "2.2",
    "no graph with a mapped function is captured",
)
GETITEM = Private(
    "torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex", "indexing by coordinates in a FlexAttention",
    "2.5", "it is left alone",
)
OWN_BACKWARD = Private(
    "operators torch.ops.higher_order.autograd_function_apply and torch.ops.higher_order.register_hook",
    "a backward of its own in a checkpointed region or a branch", "2.13",
    "nothing is lost: before register_hook such a hook breaks the graph",
)
TENSOR_HOOKS = Private(
    "Tensor._backward_hooks, Tensor._post_accumulate_grad_hooks", "hooks that change gradients", "2.2",
    "no graph can be captured",
)
BUFFER_HOOKS = Private(
    "torch.nn.modules.module:_global_buffer_registration_hooks", "a hook that a failed export leaves", "2.2",
    "no whole graph can be exported",
)
LOGGERS = Private(
    "loggers torch._subclasses.fake_tensor, torch._export.non_strict_utils, torch.fx.experimental.symbolic_shapes",
    "tracebacks that the error says as well", "2.5", "they are printed",
)
PARTIAL = Private("partial_fx_graph of export's errors", "the graph so far, beside an error", "2.8", "it is printed")
_SIZES, _SYMBOLIC = "no attention behind a door is rewritten", "torch.fx.experimental.symbolic_shapes:"
SHAPES = Private(f"{_SYMBOLIC}ShapeEnv", "open sizes of a call, and the guards on them", "2.11", _SIZES)
SHAPE_NAMES = Private(f"{_SYMBOLIC}SYMPY_INTERP", "what such guards read", "2.11", _SIZES)
OPEN_SIZES = Private(f"{_SYMBOLIC}StatelessSymbolicContext", "which sizes of a tensor are open", "2.11", _SIZES)
OPEN_KIND = Private(f"{_SYMBOLIC}DimDynamic", "which sizes are open", "2.11", _SIZES)
SOURCE = Private("torch._dynamo.source:ConstantSource", "names of what a call is given", "2.11", _SIZES)
WRAPPER_TENSOR = Private(
    "torch:Tensor._make_wrapper_subclass", "masks that are made only where somebody reads them", "2.11",
    "no door can be registered"
)

_ENTERS, _MAPS, _LEAVES = "_increment_nesting", "_vmap_increment_nesting", "_vmap_decrement_nesting"
_OWN_BACKWARD = ("autograd_function_apply", "register_hook")
LOGS = ("torch._subclasses.fake_tensor", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


def pre_dispatch_graph(run: Callable[..., object], values: Sequence[object]) -> fx.GraphModule:
    """What a function does to these values, as a graph of ATen operators as they were called."""
    make = MAKE_FX.found()(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)
    graph: fx.GraphModule = make(*values)
    return graph


def dispatched_graph(run: Callable[..., object], values: Sequence[object]) -> fx.GraphModule:
    """What a function does to these values, below transforms of functions: a graph of ATen operators on whole tensors."""
    with leaving_maps():
        graph: fx.GraphModule = MAKE_FX.found()(run, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    return graph


@contextmanager
def leaving_maps() -> Iterator[None]:
    """Where running a graph fails inside a mapped function, that is left."""
    try:
        yield
    except BaseException:
        while FUNCTORCH.found()() is not None:
            LEAVE_MAP.found()()
        raise


def nesting(target: object) -> int:
    """1 where a function that is mapped over a dimension is entered, −1 where it is left, else 0."""
    name = str(getattr(target, "__name__", ""))
    return int(name == _MAPS) - int(name == _LEAVES)


def is_flex(target: object) -> bool:
    """Is this the operator that a call of FlexAttention is in a graph?"""
    try:
        return target is FLEX.found()
    except TorchChanged:
        return False


def safe_softmax(scores: Tensor) -> Tensor:
    """The softmax of the last dimension, with 0 where a row has no key."""
    out: Tensor = SAFE_SOFTMAX.found()(scores, -1)
    return out


def has_body(target: object) -> bool:
    """Is this an operator with graphs as its bodies?"""
    return isinstance(target, HIGHER_ORDER.found())


def indexing_by_tensors() -> AbstractContextManager[object]:
    """Where a tensor is indexed by coordinates that are tensors, it is gathered from, and not cut."""
    mode: AbstractContextManager[object] = GETITEM.found()()
    return mode


def dynamo_fakes() -> tuple[FakeTensorMode, Callable[[object], object]] | None:
    """Dynamo's own fake mode, and what makes a fake value under it and its symbols; None outside its backend."""
    context = CONTEXT.found().try_get()
    if context is None or context.fake_mode is None:
        return None
    mode = context.fake_mode

    def fake(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        known = context.tensor_to_context.get(x)
        source = known.tensor_source if known is not None else None
        return mode.from_tensor(x, static_shapes=False, symbolic_context=known, source=source, trace=False)

    return mode, fake


def size_facts() -> tuple[str, ...]:
    """What the trace at hand is guarded on, and knows of its open sizes; nothing where it has none."""
    context = CONTEXT.found().try_get()
    env = getattr(context.fake_mode, "shape_env", None) if context is not None else None
    if env is None:
        return ()
    try:
        known = (
            [str(g.expr) for g in env.guards], sorted(map(str, env.replacements.items())), sorted(map(str, env.divisible)),
            sorted((str(k), str(r.lower), str(r.upper)) for k, r in env.var_to_range.items()),
        )
    except AttributeError:
        raise FACTS.gone() from None
    return tuple(map(repr, known))


class CallFakes:
    """What a call is given as values without data: the sizes that are said to be open have symbols, all others numbers."""

    def __init__(self, symbolic: bool) -> None:
        self.env = SHAPES.found()() if symbolic else None
        self.mode: FakeTensorMode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.env)
        self.given: list[Any] = []

    def tensor(self, x: Tensor, open_dims: Sequence[int]) -> Tensor:
        """Sizes that are equal share a symbol, and a guard says so."""
        if self.env is None:
            return self.mode.from_tensor(x, static_shapes=True)
        kind, source = OPEN_KIND.found(), SOURCE.found()(f"given_{len(self.given)}")
        dims = [kind.DUCK if d in open_dims else kind.STATIC for d in range(x.dim())]
        context = OPEN_SIZES.found()(dynamic_sizes=dims)
        made: Tensor = self.mode.from_tensor(x, static_shapes=False, symbolic_context=context, source=source)
        self.given.append(made)
        return made

    def number(self, n: int) -> torch.SymInt:
        """An open number that is no size: 0 and 1 are not special."""
        assert self.env is not None
        source, kind = SOURCE.found()(f"given_{len(self.given)}"), OPEN_KIND.found().DYNAMIC
        symbol = self.env.create_symbol(n, source, dynamic_dim=kind, do_not_specialize_zero_one=True)
        made: torch.SymInt = self.env.create_symintnode(symbol, hint=n, source=source)
        self.given.append(made)
        return made

    def guards(self) -> Callable[[Sequence[Any]], bool]:
        """Whether other values of the same kinds may stand in these places, sizes that are numbers left out."""
        text = self.env.produce_guards_expression(self.given) if self.env is not None else None
        if text is None:
            return lambda given: True
        holds = eval(compile(f"lambda L: {text}", "<guards of a call>", "eval"), dict(SHAPE_NAMES.found()))
        places = [f"t{i}" for i in range(len(self.given))]
        return lambda given: bool(holds(dict(zip(places, given))))


def wrapper_tensor(kind: type[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of this kind that has a shape, a type and a device, and no memory."""
    return WRAPPER_TENSOR.found()(kind, tuple(shape), dtype=dtype, device=device)


def writes(x: object) -> int:
    """How often a tensor has been written to; -1 where nobody counts."""
    if not isinstance(x, Tensor) or x.is_inference():
        return -1
    try:
        return x._version
    except AttributeError:
        raise WRITES.gone() from None


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each of some tensors, whose writes are counted, has been written to."""
    try:
        return [x._version for x in tensors]
    except AttributeError:
        raise WRITES.gone() from None


# There may be a result that is nothing.
NOTHING = object()


def noted(n: fx.Node) -> object:
    """What Dynamo knows of the result of a call; `NOTHING` where it does not say."""
    return n.meta.get("example_value", NOTHING)


def transform(gm: fx.GraphModule) -> str:
    """The transform of functions (vmap, grad, jvp) that a graph of Dynamo's enters; empty where it enters none."""
    entered = (str(getattr(n.target, "__name__", "")) for n in gm.graph.nodes if n.op == "call_function")
    return next((name.strip("_").removesuffix(_ENTERS) for name in entered if name.endswith(_ENTERS)), "")


def is_own_function(target: object) -> bool:
    """Is this a function of the user's that Dynamo leaves whole, or Dynamo's own around one?"""
    if not isinstance(target, FunctionType):
        return False
    return target.__module__.partition(".")[0] != "torch" or target.__module__.startswith("torch._dynamo.")


def has_backward(target: object) -> bool:
    """Is this an operator of Dynamo's whose backward is written in Python, or that hooks one?"""
    return isinstance(target, HIGHER_ORDER.found()) and target.name() in _OWN_BACKWARD


def traces_nothing(target: object) -> bool:
    """Is this a function that no trace has a node of?"""
    try:
        return target is LOGS_USE.found()
    except TorchChanged:
        return False


def has_hooks(x: Tensor) -> bool:
    """Does something happen to the gradient of this tensor?"""
    try:
        return bool(x._backward_hooks) or bool(x._post_accumulate_grad_hooks)
    except AttributeError:
        raise TENSOR_HOOKS.gone() from None


def packet(target: object) -> object:
    """An operator without the overload, as graphs of torch functions may call it; anything else as it is."""
    return target.overloadpacket if isinstance(target, OpOverload) else target


def has_no_value(x: object) -> bool:
    """Is this a tensor that stands for data only while something is traced or transformed?"""
    return isinstance(x, Tensor) and (isinstance(x, FakeTensor) or WRAPPED.found()(x))


def compiled_locals() -> Mapping[str, object]:
    """The local values of the function that Dynamo compiles in this thread; none where it does not say."""
    try:
        found: Mapping[str, object] = FRAME.found().output.root_tx.f_locals
    except (TorchChanged, AttributeError):
        return {}
    return found


def trace_checkpoint_with(body: nn.Module, contexts: Callable[[], Any]) -> None:
    """Give a checkpointed region the contexts that tracing it reads; Dynamo writes them for selective checkpoints only."""
    body.meta.setdefault("_checkpoint_context_fn", contexts)  # type: ignore[union-attr, operator]


def buffer_hooks() -> dict[int, Any]:
    """The hooks on all buffers of the process, by number."""
    hooks: dict[int, Any] = BUFFER_HOOKS.found()
    return hooks


def graph_so_far(error: BaseException) -> str:
    """The graph that export prints beside an error."""
    return str(getattr(error, "partial_fx_graph", ""))


# --- calls of a model ---------------------------------------------------------------------------------------------

OWN_TENSORS = Private(
    "Module._parameters, Module._buffers and Module._modules", "what stands on a module that calls a door, or was measured",
    "2.2", "no door can be used, and no method",
)
CALL_HOOK = Private(
    "torch.nn:Module._compiled_call_impl", "catching the calls of a model", "2.2", "no model can be optimised"
)
OWN_CALL = Private("torch.nn:Module._call_impl", "a module's own call", "2.2", "no model can be optimised")
FX_TRACING = Private(
    "torch.fx._symbolic_trace:is_fx_symbolic_tracing", "leaving a symbolic trace alone", "2.11", "no model can be optimised"
)
FUNCTORCH = Private(
    "torch._C._functorch:peek_interpreter_stack", "leaving vmap and grad alone", "2.2", "no model can be optimised"
)
DISPATCH = Private(
    "torch._C:_len_torch_dispatch_stack", "leaving dispatch modes alone", "2.2", "no model can be optimised"
)
FORWARD = Private(
    "torch.autograd.forward_ad:_current_level", "leaving forward derivatives alone", "2.2", "no model can be optimised"
)
CHECKPOINT_ENDS = Private(
    "torch.utils.checkpoint:_StopRecomputationError", "how a checkpoint ends inside a call", "2.2",
    "a checkpoint ends outside of calls",
)
GRAPH_TASK = Private(
    "torch._C:_current_graph_task_id", "telling passes through one graph apart", "2.2", "no second derivatives"
)
WILL_RUN = Private(
    "torch._C:_will_engine_execute_node", "second derivatives of what is asked for alone", "2.2", "no second derivatives"
)
MAP_ENTER = Private(
    "torch._C:_vmapmode_increment_nesting", "gradients of several flows at once (is_grads_batched)", "2.2",
    "is_grads_batched raises",
)
MAP_LEAVE = Private("torch._C:_vmapmode_decrement_nesting", "the same", "2.2", "is_grads_batched raises")
MAP_ADD = Private("torch:_add_batch_dim", "the same", "2.2", "is_grads_batched raises")
MAP_REMOVE = Private("torch:_remove_batch_dim", "the same", "2.2", "is_grads_batched raises")
KEYS = Private("torch._C:_dispatch_keys", "which tensors stand for several flows", "2.2", "is_grads_batched raises")
COMPILING = Private(
    "torch.compiler:_is_compiling_flag", "calls in other threads during a capture", "2.5",
    "nothing is written: since 2.13 Dynamo raises the flag itself",
)
DYNAMO_ERROR = Private(
    "torch._dynamo.exc:TorchDynamoException", "Dynamo's errors", "2.2", "where Dynamo fails, the call fails"
)
BACKEND_ERROR = Private(
    "torch._dynamo.exc:BackendCompilerFailed", "what a backend raised", "2.2", "where a backend fails, the call fails"
)
RESTART = Private(
    "torch._dynamo.exc:RestartAnalysis", "Dynamo's requests to begin again", "2.11",
    "a graph that Dynamo would begin again with runs as written",
)
HOOK_GUARDS = Private(
    "torch._dynamo.config:skip_nnmodule_hook_guards", "noticing module hooks that are registered later", "2.2",
    "no model can be optimised",
)
SAVED_HOOKS = Private(
    "torch._C._autograd:_saved_tensors_hooks_is_enabled", "keeping a capture from the caller's saved tensor hooks", "2.2",
    "no model can be optimised",
)
TOP_HOOKS = Private(
    "torch._C._autograd:_top_saved_tensors_default_hooks", "telling a checkpoint around a call", "2.4",
    "no kernel is timed beside its own code where gradients are wanted",
)
METRICS = Private(
    "torch._dynamo.utils:get_compilation_metrics", "functions that Dynamo gives up", "2.5", "the report does not name them"
)
BREAK = Private(
    "GraphModule.compile_subgraph_reason", "where and why Dynamo ended a graph", "2.2", "the report does not say it"
)
COMPILE_ID = Private(
    "torch._guards:CompileContext", "telling a recompilation", "2.2", "the report does not count recompilations"
)
WRAPPER = Private(
    "torch._dynamo:OptimizedModule", "refusing what torch.compile returned", "2.2", "it is optimised like a model"
)
_EACH_CALL = (CALL_HOOK, OWN_CALL, FX_TRACING, FUNCTORCH, DISPATCH, FORWARD, HOOK_GUARDS, SAVED_HOOKS)


def check_calls() -> None:
    """Raises TorchChanged where calls of a model cannot be caught, or not be told from somebody's trace."""
    for part in _EACH_CALL:
        part.found()


def own_parts(module: nn.Module) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """The parameters and the parts that stand on a module itself, as the module has them: what is put there shows."""
    try:
        return module._parameters, module._modules
    except AttributeError:
        raise OWN_TENSORS.gone() from None


def own_tensors(module: nn.Module) -> tuple[Mapping[str, Tensor | None], Mapping[str, Tensor | None]]:
    """The parameters and the buffers that stand on a module itself."""
    try:
        return module._parameters, module._buffers
    except AttributeError:
        raise OWN_TENSORS.gone() from None


def call_hook(module: nn.Module) -> Callable[..., Any] | None:
    """What runs in the place of a module's own call, hooks included; None for the module itself."""
    return module._compiled_call_impl


def set_call_hook(module: nn.Module, hook: Callable[..., Any] | None) -> None:
    """Let the calls of a module go to `hook`, as `Module.compile` does it; None: to the module itself, as at first."""
    if hook is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module._compiled_call_impl = hook


def own_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own call, its hooks included."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def is_symbolic_trace() -> bool:
    """Does fx trace symbolically, in whatever thread?"""
    return torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def is_transformed() -> bool:
    """Is this call inside a functorch transform, a dispatch mode or forward derivatives?"""
    return _kept(FUNCTORCH)() is not None or _kept(DISPATCH)() > 0 or forward_ad._current_level >= 0


@cache
def _kept(part: Private) -> Any:
    return part.found()


def checkpoint_ends() -> tuple[type[BaseException], ...]:
    """What a checkpoint raises inside a call when it has all that its backward needs."""
    try:
        return (CHECKPOINT_ENDS.found(),)
    except TorchChanged:
        return ()


def graph_task() -> int:
    """The number of the backward pass that runs in this thread."""
    return int(_kept(GRAPH_TASK)())


def will_run(node: Any) -> bool:
    """Will the backward pass at hand come to this node?"""
    return bool(_kept(WILL_RUN)(node))


# The dispatch key of tensors that stand for several flows.
FLOWS = "Batched"


def maps_gradients() -> bool:
    """Has this PyTorch what `is_grads_batched` is taken apart with?"""
    try:
        return all(x.found() for x in (MAP_ENTER, MAP_LEAVE, MAP_ADD, MAP_REMOVE, KEYS))
    except TorchChanged:
        return False


def flows_level() -> int:
    """How many such maps are around this call."""
    level = int(_kept(MAP_ENTER)())
    _kept(MAP_LEAVE)()
    return level - 1


def stands_for_flows(x: Tensor) -> bool:
    # printed as DispatchKeySet(A, B, …): the key has no name in Python
    return FLOWS in str(_kept(KEYS)(x)).partition("(")[2].rstrip(")").split(", ")


def apart(x: Tensor, level: int) -> Tensor:
    """The flows of a tensor that stands for several, along a first dimension."""
    out: Tensor = _kept(MAP_REMOVE)(x, level, 0, 0)
    return out


def together(x: Tensor, level: int) -> Tensor:
    """A tensor that stands for the flows along the first dimension of another."""
    out: Tensor = _kept(MAP_ADD)(x, 0, level)
    return out


@contextmanager
def said_to_compile() -> Iterator[None]:
    """`torch.compiler.is_compiling` answers yes, where a flag decides that."""
    if not hasattr(torch.compiler, "_is_compiling_flag"):
        yield
        return
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def dynamo_errors() -> type[Exception]:
    """What Dynamo's own errors are."""
    errors: type[Exception] = DYNAMO_ERROR.found()
    return errors


def raised_by_dynamo(error: Exception) -> bool:
    """Is an error Dynamo's own, or one of no class of its own that its code raised while it captured?"""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = str(last.tb_frame.f_globals.get("__name__", "")) if last is not None else ""
    return isinstance(error, dynamo_errors()) or where.startswith(DYNAMO_ERROR.path.partition(".exc")[0])


def raised_by_backend(error: Exception) -> Exception | None:
    """What a backend raised, where Dynamo wraps it."""
    return error.inner_exception if isinstance(error, BACKEND_ERROR.found()) else None


def restarts() -> tuple[type[BaseException], ...]:
    """What is raised where Dynamo wants to compile a function again from its beginning."""
    try:
        return (RESTART.found(),)
    except TorchChanged:
        return ()


def skip_hook_guards(skip: bool) -> bool:
    """Let Dynamo compile without guards on module hooks, or with them; answers what it did before."""
    before: bool = HOOK_GUARDS.found()
    config: Any = pkgutil.resolve_name(HOOK_GUARDS.path.partition(":")[0])
    config.skip_nnmodule_hook_guards = skip
    return before


def reshape_to_own() -> Any:
    """The operator that gives a result another shape and leaves no view for autograd; `reshape` where there is none."""
    try:
        return UNSAFE_VIEW.found()
    except TorchChanged:
        return torch.ops.aten.reshape.default


@contextmanager
def quietly() -> Iterator[None]:
    """Torch logs whole tracebacks of what it then raises: the error says it. Levels that a user set are kept."""
    mine = [log for log in map(logging.getLogger, LOGS) if log.level == logging.NOTSET]
    for log in mine:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log in mine:
            log.setLevel(logging.NOTSET)


def may_hook_saved_tensors() -> bool:
    """May hooks on saved tensors be set here?"""
    return bool(SAVED_HOOKS.found()())


def saved_tensors_are_hooked() -> bool:
    """Does someone take what is saved for a backward here (a checkpoint)? Also where that cannot be told."""
    try:
        return TOP_HOOKS.found()(False) is not None
    except TorchChanged:
        return True


def attempts() -> list[Any]:
    """What Dynamo noted of its last attempts to compile a function; none where it does not note it."""
    try:
        noted: list[Any] = METRICS.found()()
    except TorchChanged:
        return []
    return noted


def failure(attempt: Any) -> tuple[str, str] | None:
    """Which function Dynamo gave up in an attempt, and why; None where it did not."""
    if not attempt.fail_reason:
        return None
    return f"{attempt.co_filename}:{attempt.co_firstlineno} {attempt.co_name}", attempt.fail_reason


def graph_break(gm: fx.GraphModule) -> tuple[str, str] | None:
    """Where and why Dynamo ended this graph before the end of the function; None when it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    own = [f for f in reason.user_stack if "/torch/" not in f.filename]
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else "", reason.reason


def is_recompilation() -> bool:
    """Does Dynamo compile a function that it has compiled before?"""
    try:
        compiling = COMPILE_ID.found().current_compile_id()
    except TorchChanged:
        return False
    return compiling is not None and bool(compiling.frame_compile_id)


def is_compiled(model: object) -> bool:
    """Is this the wrapper that `torch.compile` returns? No where nothing tells it from a model."""
    try:
        return isinstance(model, WRAPPER.found())
    except TorchChanged:
        return False


# --- Inductor -----------------------------------------------------------------------------------------------------

INDUCTOR = Private(
    "torch._inductor.compile_fx:compile_fx", "the rest of a graph by Inductor", "2.2", "`rest: inductor` cannot run"
)
MODES = Private(
    "torch._inductor:list_mode_options", "what `mode=` of torch.compile asks of Inductor", "2.2", "`mode=` cannot be taken"
)
CPP_COMPILER = Private(
    "torch._inductor.cpp_builder:get_cpp_compiler", "looking for a C++ compiler", "2.5", "the backend cannot start"
)
NO_COMPILER = Private(
    "torch._inductor.exc:InvalidCxxCompiler", "the answer that there is none", "2.2", "the backend cannot start"
)


def inductor(graph: fx.GraphModule, inputs: Sequence[object], options: Mapping[str, object]) -> Callable[..., Any]:
    """A graph compiled by Inductor under options of its own."""
    run: Callable[..., Any] = INDUCTOR.found()(graph, list(inputs), config_patches=dict(options))
    return run


def inductor_modes() -> Mapping[str, Mapping[str, object]]:
    """What each mode of torch.compile asks of Inductor."""
    modes: Mapping[str, Mapping[str, object]] = MODES.found()()
    return modes


def has_cpp_compiler() -> bool:
    """Does Inductor find a C++ compiler?"""
    find, missing = CPP_COMPILER.found(), NO_COMPILER.found()
    try:
        find()
    except missing:
        return False
    return True


PARTS: tuple[Private, ...] = tuple(x for x in list(globals().values()) if isinstance(x, Private))
