"""One optimised model: where its calls are caught, what was captured from them, and what ran.

A call of the model (or of a sub-module that callers enter directly) goes through `nn.Module._compiled_call_impl`, the hook
that `Module.compile` uses, to an `Entry`. The entry hands it to Dynamo, whose graphs come back to `Session.compile`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._dynamo.utils import get_compilation_metrics

from ...cost_model.devices.device import Device
from ..capture import capture
from ..choose import choose
from ..choose.policy import Policy, StrictError
from ..splice import sampling
from ..splice.guards import Guarded
from .report import Piece

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MARK = "_reattend"
# Compilations that one entry may ask for before Dynamo gives its frame up; a model meets many sizes, modes and types.
_RECOMPILE_LIMIT = 64
_FAILURES_ALLOWED = 2

_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
_running = threading.local()
# Threads in which a graph is being captured by us: fx's "a trace is running" is one flag for all threads.
_capturing: set[int] = set()


class Mark:
    """Stands in an optimised model's attributes. A deep copy of the model carries a copy of the mark, and no entries."""

    def __init__(self, copied: bool = False) -> None:
        self.copied = copied

    def __deepcopy__(self, memo: object) -> Mark:
        return Mark(copied=True)

    def __reduce__(self) -> tuple[object, ...]:
        return (Mark, (True,))


class Entry:
    """The way into one module: every call of the module comes here."""

    def __init__(self, session: Session, path: str, module: nn.Module) -> None:
        self.session, self.path, self.module = session, path, module
        self.before: Callable[..., Any] | None = None
        self.calls = 0
        self.missed = 0
        self.failures: list[str] = []
        self.hook = _hook(module, torch._dynamo.disable(self.call))  # type: ignore[no-untyped-call]
        self.compiled = _compile(path, lambda gm, inputs: session.compile(self, gm, inputs), session.dynamic)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if _transparent(args, kwargs) or len(self.failures) > _FAILURES_ALLOWED:
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        before, seen = getattr(_running, "pieces", 0), get_compilation_metrics()[-1:]
        try:
            out = self.compiled(self.module, *args, **kwargs)
        except TorchDynamoException as error:
            if isinstance(error, BackendCompilerFailed) and isinstance(error.inner_exception, StrictError):
                self.session.detach()
                raise error.inner_exception from None
            if getattr(_running, "pieces", 0) != before:
                raise
            return self._as_written(error, args, kwargs)
        ran = getattr(_running, "pieces", 0) != before
        given_up = _frames_given_up(seen)
        if given_up:
            with self.session.lock:
                self.session.frames_given_up += [f for f in given_up if f not in self.session.frames_given_up]
        if not ran and self.missed == 0:
            self.failures.append(given_up[-1] if given_up else "Dynamo captured no graph of it")
        self._count(ran)
        return out

    def _as_written(self, error: TorchDynamoException, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own code: it raises its own error, or it shows that only the capture failed."""
        try:
            out = self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Exception as own:
            raise own from None
        self.failures.append(f"{type(error).__name__}: {_sentence(error)}")
        self._count(False)
        warnings.warn(f"reattend: {self.path or 'the model'} runs as written: {self.failures[-1]}", stacklevel=4)
        return out

    def _count(self, ran: bool) -> None:
        with self.session.lock:
            self.calls += 1
            self.missed += not ran


def _hook(module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in `_compiled_call_impl`: Dynamo, where it traces a caller, sees the module's own call in it."""

    def hook(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return call(*args, **kwargs)

    return hook


def _transparent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Inside somebody else's tracing the model is what it was: export, fx, functorch and dispatch modes.

    (`torch.compiler.is_compiling` is no test: it is true in all threads while one of them compiles.)
    """
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or _fx_traced(args, kwargs)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _fx_traced(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Is this call part of a symbolic trace, and not only beside one that we make in another thread?"""
    if not torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return False
    if not _capturing - {threading.get_ident()}:
        return True
    return any(isinstance(x, fx.Proxy) for x in torch.utils._pytree.tree_leaves((args, dict(kwargs))))


def _frames_given_up(seen: Sequence[object]) -> list[str]:
    """The functions that Dynamo tried to capture after `seen`, its last attempt then, and runs as written: where and why."""
    attempts = get_compilation_metrics()
    if not attempts or attempts[-1:] == seen:
        return []
    after = next((i + 1 for i in reversed(range(len(attempts))) if seen and attempts[i] is seen[0]), 0)
    return [
        f"{m.co_filename}:{m.co_firstlineno} {m.co_name}: {_sentence(m.fail_reason)}"
        for m in attempts[after:]
        if m.fail_reason
    ]


def _compile(path: str, backend: capture.Backend, dynamic: bool | None) -> Callable[..., Any]:
    """A compiled `forward` with a code object of its own: Dynamo keeps graphs, and counts them, per code object."""
    code = _forward.__code__.replace(co_name=f"reattend {path or 'model'}")
    function = types.FunctionType(code, globals(), "forward")
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILE_LIMIT
    return torch.compile(function, backend=backend, dynamic=dynamic, **options)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class Session:
    """What `optimize` keeps about a model. Safe to use from several threads.

    `backend` stands in for planning and rewriting: verification checks each graph instead.
    """

    policy: Policy
    target: Device | None
    inductor: bool = False
    dynamic: bool | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    backend: Callable[[fx.GraphModule, Sequence[object], Mapping[int, str]], Callable[..., Any]] | None = None
    entries: list[Entry] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    frames_given_up: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def install(self, model: nn.Module) -> None:
        self.entries = [Entry(self, path, module) for path, module in entry_points(model)]
        self.attach()

    def attach(self) -> None:
        """Catch the calls of the model."""
        for entry in self.entries:
            entry.before = entry.module._compiled_call_impl
            entry.module._compiled_call_impl = entry.hook
        root = self.entries[0].module
        root.__dict__[_MARK] = Mark()
        _sessions[root] = self

    def detach(self) -> None:
        """Let the calls of the model go as they went before; what was captured is kept for `attach`."""
        for entry in self.entries:
            if entry.module._compiled_call_impl is entry.hook:
                entry.module._compiled_call_impl = entry.before
            entry.module.__dict__.pop(_MARK, None)
            _sessions.pop(entry.module, None)

    def names(self) -> Mapping[int, str]:
        """The paths of the model's modules, by identity."""
        return {id(m): path for path, m in self.entries[0].module.named_modules()} if self.entries else {}

    def compile(self, entry: Entry | None, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        """The backend: one graph of Dynamo's, captured, planned and rewritten. A failure runs the graph as it came."""
        if self.backend is not None:
            return self.backend(gm, inputs, self.names())
        piece = Piece(
            entry=entry.path if entry is not None else "",
            number=len(self.pieces),
            recompiled=_is_recompilation(),
            broke=break_of(gm),
        )
        start = time.perf_counter()
        run: Callable[..., Any] = gm.forward
        captured: capture.Captured | None = None
        try:
            with _marked():
                captured = capture.from_dynamo(gm, inputs, self.names())
            piece.capture_seconds = captured.seconds
            request = choose.Request(self.policy, self.target, choices=self.choices, traced=self.inductor)
            piece.plan = choose.rewrite(captured, request, piece.checks)
            for module in captured.graph.modules():
                if isinstance(module, Guarded):
                    module.fallbacks = piece.fallbacks
            run = _runnable(captured.graph, inputs, self.inductor)
        except capture.CaptureError as no:
            piece.error = f"the graph could not be captured: {no}"
        except StrictError:
            raise
        except Exception as error:
            # A defect here must not reach the user's model: the graph runs as it came, and the report says so.
            piece.error = f"the rewrite failed, the graph runs as written: {type(error).__name__}: {_sentence(error)}"
            warnings.warn(f"reattend: {piece.error}", stacklevel=2)
        piece.plan_seconds = time.perf_counter() - start - piece.capture_seconds
        if self.policy.strict:
            piece.check()
        with self.lock:
            self.pieces.append(piece)
        # Inductor's code has no nodes that could be run one by one.
        sampled = captured.graph if captured is not None and not self.inductor and not piece.error else None
        return self._counted(piece, run, sampled)

    def _counted(self, piece: Piece, run: Callable[..., Any], sampled: fx.GraphModule | None) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self.lock:
                piece.calls += 1
                number = piece.calls
            _running.pieces = getattr(_running, "pieces", 0) + 1
            if sampled is not None and sampling.due(number):
                return sampling.timed(sampled, piece.samples, *args)
            return run(*args)

        return call


@contextmanager
def _marked() -> Iterator[None]:
    """This thread is at a graph of ours. Dynamo runs one such thread at a time.

    Before PyTorch 2.13 a call in another thread takes fx's flag for a trace of its own and raises, unless it sees this flag,
    which Dynamo raises itself since.
    """
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    _capturing.add(threading.get_ident())
    try:
        yield
    finally:
        _capturing.discard(threading.get_ident())
        torch.compiler._is_compiling_flag = before


def _runnable(graph: fx.GraphModule, inputs: Sequence[object], inductor: bool) -> Callable[..., Any]:
    if inductor:
        from torch._inductor.compile_fx import compile_fx

        # Named, the threads are part of the key in Inductor's cache on disk: before PyTorch 2.13 FlexAttention compiled for
        # one thread came back in a process of two, and wrote past its buffers. Dynamo compiles again when they change.
        threads = {"cpp.threads": torch.get_num_threads()}
        return compile_fx(graph, list(inputs), config_patches=threads)  # type: ignore[return-value, arg-type]
    for body in list(capture.regions(graph)):
        for n in body.graph.nodes:
            if n.op == "call_function" and n.target is capture.CHECKPOINT:
                n.target = capture.checkpointed
        body.recompile()
    return graph.forward


def _is_recompilation() -> bool:
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id is not None and bool(compile_id.frame_compile_id)


def break_of(gm: fx.GraphModule) -> str:
    """Where and why Dynamo ended this graph before the end of the function; empty when it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    own = [f for f in reason.user_stack if "/torch/" not in f.filename]
    where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    text = _sentence(reason.reason)
    return where + next((said for start, said in _BREAKS.items() if text.startswith(start)), text)


# Dynamo's own short names for reasons, in words.
_BREAKS = {
    "generic_jump": "the code branches on the value of a tensor",
    "step_unsupported": "Dynamo cannot trace a step of this line",
}


def _sentence(error: object) -> str:
    """The line that explains, where Dynamo marks one, else the first."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return (explained or lines or [type(error).__name__])[0]


# --- which modules callers enter ----------------------------------------------------------------------------------


def entry_points(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and the sub-modules with parts of their own that are reached without passing a list of layers.

    Layers in a list are called by their owner; a sub-module that stands by its name (an encoder, a tower) may be called
    by anyone: `generate` calls the encoder, users call `model.model`.
    """
    seen: set[int] = set()
    queue = [("", model)]
    for i in itertools.count():
        if i == len(queue):
            return
        path, module = queue[i]
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        for name, child in module.named_children():
            if not isinstance(child, _CONTAINERS) and any(True for _ in child.children()):
                queue.append((f"{path}.{name}" if path else name, child))


def session_of(model: nn.Module) -> Session | None:
    return _sessions.get(model)


def is_copy(model: nn.Module) -> bool:
    """Whether the model was copied from an optimised one: copies are not optimised."""
    mark = model.__dict__.get(_MARK)
    return isinstance(mark, Mark) and mark.copied and _sessions.get(model) is None


def twin(model: nn.Module) -> nn.Module:
    """A deep copy of the model as it was before it was optimised."""
    other = copy.deepcopy(model)
    for m in other.modules():
        m.__dict__.pop(_MARK, None)
    return other
