"""One optimised model: where its calls are caught, what was captured from them, and what ran.

A call of the model (or of a sub-module that callers enter directly) goes through the hook that `Module.compile` uses to an
`Entry`. The entry hands it to Dynamo, whose graphs come back to `Session.compile`.
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...cost_model.devices.device import Device
from ...cost_model.sites.site import ORIGINAL, Site
from ..capture import capture
from ..choose import choose
from ..choose.approximations import Installed
from ..choose.policy import Policy, StrictError
from ..graph import memory, torch_private
from ..graph.aliases import Aliases
from ..splice import floats, sampling, splice
from ..splice.calls import call_plainly
from ..splice.guards import Guarded
from ..splice.race import TIMED_BYTES, Race, undecided
from . import bypass, kept
from .contest import Contests, now
from .report import GraphPiece

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_MARK = "_reattend"
# Compilations that one entry may ask for before Dynamo gives its frame up; a model meets many sizes, modes and types.
_RECOMPILE_LIMIT = 64
_FAILURES_ALLOWED = 2

_numbers = itertools.count(1)
_running = threading.local()


class Mark:
    """Stands in an optimised model's attributes, and holds its session: both live as long as the model does.

    A deep copy of the model carries a mark without a session, and no entries.
    """

    def __init__(self, session: Session | None = None) -> None:
        self.session = session

    def __deepcopy__(self, memo: object) -> Mark:
        return Mark()

    def __reduce__(self) -> tuple[object, ...]:
        return (Mark, ())


class _HookGuards:
    """While our graphs are guarded, Dynamo guards on module hooks as well: one that is registered later is noticed.

    Asked for while Dynamo compiles, and undone by the same thread when its call is over.
    """

    def __init__(self) -> None:
        self.lock, self.asked, self.before = threading.Lock(), 0, True

    def ask(self) -> None:
        with self.lock:
            if self.asked == 0:
                self.before = torch_private.skip_hook_guards(False)
            self.asked += 1
        _running.asked = getattr(_running, "asked", 0) + 1

    def done(self) -> None:
        own, _running.asked = getattr(_running, "asked", 0), 0
        with self.lock:
            self.asked -= own
            if own and self.asked == 0:
                torch_private.skip_hook_guards(self.before)


_hook_guards = _HookGuards()


class Entry:
    """The way into one module: every call of the module comes here."""

    def __init__(self, session: Session, path: str, module: nn.Module) -> None:
        self.session, self.path, self.module = session, path, module
        self.before: Callable[..., Any] | None = None
        self.calls = 0
        self.missed = 0
        self.as_written = 0
        self.failures: list[str] = []
        self.bypassed, self.said = Counter[str](), session.said
        self.contests = Contests(module) if session.may_run_as_written else None
        self.hook = _hook(self, torch.compiler.disable(self.call))  # type: ignore[no-untyped-call]
        self.compiled = _compile(path, _backend(self), session.dynamic)

    def unhook(self) -> None:
        """Take this entry out of the ways into its module, of which there may be several, one before the other."""
        at = torch_private.call_hook(self.module)
        if at is self.hook:
            torch_private.set_call_hook(self.module, self.before)
        while (other := getattr(at, "entry", None)) is not None:
            if other.before is self.hook:
                other.before = self.before
            at = other.before

    def call(self, *args: Any, **kwargs: Any) -> Any:
        installed = self.session.installed
        if installed is None or installed.ground is None or not installed.chosen or self.path:
            return self._called(args, kwargs)
        with installed.ground.entered(self.module):
            return self._called(args, kwargs)

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given_up = len(self.failures) > _FAILURES_ALLOWED
        if given_up or bypass.traced(args, kwargs):
            bypass.went_round(self, bypass.GIVEN_UP if given_up else bypass.TRACED)
            return torch_private.own_call(self.module, *args, **kwargs)
        close = self.contests is not None and all(p.close for p in self.session.pieces)
        contest = self.contests.of(args, kwargs) if close and self.contests is not None else None
        turn = contest.turn() if contest is not None else None
        if self.contests is None or contest is None or turn is None:
            return self._rewritten(args, kwargs)
        start = now()
        out = self.written(args, kwargs) if turn is contest.written else self._rewritten(args, kwargs)
        self.contests.note(turn, now() - start)
        return out

    def is_faster_as_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Did calls like this one take longer as rewritten? Inside a call that runs as written, all others do."""
        if getattr(_running, "written", None) is self.session:
            return True
        return self.contests is not None and self.contests.lost(args, kwargs)

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own code, sub-modules that are entered on the way included."""
        outer, _running.written = getattr(_running, "written", None), self.session
        try:
            return torch_private.own_call(self.module, *args, **kwargs)
        finally:
            _running.written = outer
            if outer is not self.session:
                self._count(True, as_written=True)

    def _rewritten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, seen = getattr(_running, "pieces", 0), torch_private.attempts()[-1:]
        outer = bypass.enter()
        try:
            out = self.compiled(self.module, *args, **kwargs)
        except Exception as error:
            if not torch_private.raised_by_dynamo(error):
                raise
            raised = torch_private.raised_by_backend(error)
            if isinstance(raised, StrictError):
                self.session.detach()
                raise raised from None
            if getattr(_running, "pieces", 0) != before:
                raise
            return self._as_written(error, args, kwargs)
        finally:
            bypass.leave(outer)
            if getattr(_running, "asked", 0):
                _hook_guards.done()
        ran = getattr(_running, "pieces", 0) != before
        frames = _frames_given_up(seen)
        if frames:
            with self.session.lock:
                self.session.frames_given_up += [f for f in frames if f not in self.session.frames_given_up]
        if not ran and self.missed == 0:
            self.failures.append(frames[-1] if frames else "Dynamo captured no graph of it")
        self._count(ran)
        return out

    def _as_written(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own code: it raises its own error, or it shows that only the capture failed."""
        try:
            out = torch_private.own_call(self.module, *args, **kwargs)
        except Exception as own:
            raise own from None
        self.failures.append(f"{type(error).__name__}: {_sentence(error)}")
        self._count(False)
        warnings.warn(f"reattend: {self.path or 'the model'} runs as written: {self.failures[-1]}", stacklevel=4)
        return out

    def _count(self, ran: bool, as_written: bool = False) -> None:
        with self.session.lock:
            self.calls += 1
            self.missed += not ran
            self.as_written += as_written


def _backend(entry: Entry) -> capture.Backend:
    """The entry's session as Dynamo's backend. Dynamo keeps backends, and what they answer, beyond the model's life."""
    there = weakref.ref(entry)

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        own = there()
        if own is None:
            return gm.forward
        _hook_guards.ask()
        return own.session.compile(own, gm, inputs)

    return backend


def _hook(entry: Entry, call: Callable[..., Any]) -> Callable[..., Any]:
    """What the calls go to: Dynamo, where it traces a caller, sees the module's own call in it."""
    module, number = entry.module, bypass.number_of(entry)

    def hook(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            bypass.compiled(number)
            return torch_private.own_call(module, *args, **kwargs)
        if entry.is_faster_as_written(args, kwargs):
            return entry.written(args, kwargs)
        return call(*args, **kwargs)

    hook.entry = entry  # type: ignore[attr-defined]
    return hook


def _frames_given_up(seen: Sequence[object]) -> list[str]:
    """The functions that Dynamo tried to capture after `seen`, its last attempt then, and runs as written: where and why."""
    made = torch_private.attempts()
    if not made or made[-1:] == seen:
        return []
    after = next((i + 1 for i in reversed(range(len(made))) if seen and made[i] is seen[0]), 0)
    failures = filter(None, map(torch_private.failure, made[after:]))
    return [f"{where}: {_sentence(why)}" for where, why in failures]


def _compile(path: str, backend: capture.Backend, dynamic: bool | None) -> Callable[..., Any]:
    """A compiled `forward` with a code object of its own: Dynamo keeps graphs, and counts them, per code object.

    Its name is its own as well: which sizes have changed Dynamo keeps by name, and another model's sizes say nothing here.
    """
    code = _forward.__code__.replace(co_name=f"reattend {path or 'model'} {next(_numbers)}")
    function = types.FunctionType(code, globals(), "forward")
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = _RECOMPILE_LIMIT
    return torch.compile(function, backend=backend, dynamic=dynamic, **options)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return torch_private.own_call(self, *args, **kwargs)


@dataclass(eq=False)
class Session:
    """What `optimize` keeps about a model. Safe to use from several threads.

    `backend` stands in for planning and rewriting: verification checks each graph instead. `outer`: the model's session
    before this one was attached, which it is again when this one is detached. `installed`: the methods that a calibration of
    this model found.
    """

    policy: Policy
    target: Device | None
    inductor: bool = False
    inductor_options: Mapping[str, object] = field(default_factory=dict)
    dynamic: bool | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    backend: Callable[[fx.GraphModule, Sequence[object], Mapping[int, str]], Callable[..., Any]] | None = None
    entries: list[Entry] = field(default_factory=list)
    pieces: list[GraphPiece] = field(default_factory=list)
    frames_given_up: list[str] = field(default_factory=list)
    said: set[str] = field(default_factory=set)
    outer: Session | None = None
    installed: Installed | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def may_run_as_written(self) -> bool:
        """May the clock decide against what was rewritten?"""
        chosen = self.choices or self.backend is not None or self.inductor
        return self.policy.tune and not chosen and ORIGINAL not in self.policy.deny

    def install(self, model: nn.Module) -> None:
        self.entries = [Entry(self, path, module) for path, module in entry_points(model)]
        self.attach()

    def attach(self) -> None:
        """Catch the calls of the model."""
        torch_private.check_calls()
        for entry in self.entries:
            entry.before = torch_private.call_hook(entry.module)
            torch_private.set_call_hook(entry.module, entry.hook)
        root = self.entries[0].module
        self.outer = session_of(root)
        root.__dict__[_MARK] = Mark(self)

    def detach(self) -> None:
        """Let the calls of the model go as they went before; what was captured is kept for `attach`."""
        for entry in self.entries:
            entry.unhook()
            if session_of(entry.module) is self:
                del entry.module.__dict__[_MARK]
                if self.outer is not None:
                    entry.module.__dict__[_MARK] = Mark(self.outer)

    def names(self) -> Mapping[int, str]:
        """The paths of the model's modules, by identity."""
        return {id(m): path for path, m in self.entries[0].module.named_modules()} if self.entries else {}

    def compile(self, entry: Entry | None, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        """The backend: one graph of Dynamo's, captured, planned and rewritten. A failure runs the graph as it came."""
        if self.backend is not None:
            return self.backend(gm, inputs, self.names())
        piece = GraphPiece(
            entry=entry.path if entry is not None else "",
            number=len(self.pieces),
            recompiled=torch_private.is_recompilation(),
            broke=break_of(gm),
        )
        start = time.perf_counter()
        run: Callable[..., Any] = gm.forward
        graph: fx.GraphModule | None = None
        try:
            asked = self.inductor or self.choices or self.installed is not None
            at = "" if asked else kept.key_of(gm, inputs, self.names(), self.policy, self.target)
            found = kept.recall(at, self.policy, piece.checks) if at else None
            if found is not None:
                run, graph = self._as_kept(piece, gm, inputs, found)
            else:
                run, graph = self._rewritten(piece, gm, inputs, at)
        except capture.CaptureError as no:
            piece.error = f"the graph could not be captured: {no}"
        except StrictError:
            raise
        except torch_private.restarts():
            # Dynamo's own way to begin again
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
        sampled = graph if graph is not None and splice.is_changed(graph) and not self.inductor and not piece.error else None
        changed = graph is not None and splice.is_changed(graph) and not piece.error
        inputs_held = memory.layout(written_inputs(graph), inputs) if changed and graph is not None else None
        return self._counted(piece, run, sampled, gm.forward, inputs_held)

    def _as_kept(
        self, piece: GraphPiece, gm: fx.GraphModule, inputs: Sequence[object], found: kept.KeptGraph
    ) -> tuple[Callable[..., Any], fx.GraphModule | None]:
        """What runs of a graph by what an earlier process made of it, and the rewritten graph, if it is one."""
        piece.plan = found.plan
        if found.graph is None:
            piece.close = self.may_run_as_written and not has_open_sizes(gm)
            return gm.forward, None
        self._enter(piece, found.graph, has_open_sizes(gm))
        return _runnable(found.graph, gm, inputs, None), found.graph

    def _enter(self, piece: GraphPiece, graph: fx.GraphModule, has_open: bool) -> None:
        """Count the calls that were put in, and let those be timed whose predictions do not tell."""
        for module in graph.modules():
            if isinstance(module, Guarded):
                module.fallbacks = piece.fallbacks
        if self.may_run_as_written and not has_open:
            _enter_races(graph, piece)

    def _rewritten(
        self, piece: GraphPiece, gm: fx.GraphModule, inputs: Sequence[object], at: str
    ) -> tuple[Callable[..., Any], fx.GraphModule]:
        """What runs of a graph that is captured, planned and rewritten, and the graph that it was made of. Kept by `at`."""
        facts = torch_private.size_facts() if at else ()
        with bypass.capturing(), own_saved_tensors():
            captured = capture.from_dynamo(gm, inputs, self.names(), inductor=self.inductor, runs=False)
        piece.capture_seconds = captured.seconds
        request = choose.Request(
            self.policy, self.target, choices=self.choices, traced=self.inductor, installed=self.installed
        )
        piece.plan = choose.rewrite(captured, request, piece.checks)
        if at and not piece.checks:
            kept.keep(at, kept.described(at, piece.plan, captured.graph, self.policy, facts))
        self._enter(piece, captured.graph, has_open_sizes(captured.graph))
        return _runnable(captured.graph, gm, inputs, self.inductor_options if self.inductor else None), captured.graph

    def _counted(
        self, piece: GraphPiece, run: Callable[..., Any], sampled: fx.GraphModule | None, came: Callable[..., Any],
        layout: memory.Layout | None,
    ) -> Callable[..., Any]:
        """`came`: the graph as Dynamo gave it, which runs where every call that was put in has lost its race.

        It runs as well where the inputs of a call share memory otherwise than those that the graph was rewritten for.
        """
        lock = self.lock
        sites = [s.name for s in piece.sites]
        lost = False

        # Dynamo keeps this function: nothing in it holds the session, or the model.
        def call(*args: Any) -> Any:
            with lock:
                piece.calls += 1
                number = piece.calls
            _running.pieces = getattr(_running, "pieces", 0) + 1
            nonlocal lost
            if lost or (layout is not None and not layout.holds(args)):
                piece.fallbacks.update(sites)
                return came(*args)
            if sampled is not None and sampling.due(number):
                out = sampling.timed(sampled, piece.samples, *args)
                lost = _all_lost(sampled)
                return out
            return run(*args)

        return call


def written_inputs(graph: fx.GraphModule) -> set[int]:
    """The inputs that a graph writes to, by number."""
    aliases = Aliases(graph.graph)
    return {i for i, n in enumerate(n for n in graph.graph.nodes if n.op == "placeholder") if aliases.is_written(n)}


def _enter_races(graph: fx.GraphModule, piece: GraphPiece) -> None:
    """Let calls whose predictions do not tell be timed beside their own code."""
    sites = {s.name: s for s in piece.sites}
    piece.close = all(map(_is_close, sites.values()))
    for module in graph.modules():
        if not isinstance(module, Guarded) or (site := sites.get(module.name)) is None:
            continue
        # what a kernel is held against may be dearer than what the model would run
        if _is_close(site) or (module.written is not module.original and _affordable(site)):
            module.race = Race(site.name or site.where, piece.slower)


def has_open_sizes(gm: fx.GraphModule) -> bool:
    """Is a size among the inputs of a graph, of Dynamo's or captured?"""
    inputs = [n.meta for n in gm.graph.nodes if n.op == "placeholder"]
    return any(isinstance(meta.get("val", meta.get("example_value")), torch.SymInt) for meta in inputs)


def _is_close(site: Site) -> bool:
    """May either be the faster one, and can the own code be afforded? Who shortens memory by us may not have it."""
    if site.chosen.is_original:
        return True
    own = site.original.cost if site.original is not None else None
    return _affordable(site) and undecided(site.chosen.cost, own)


def _affordable(site: Site) -> bool:
    return site.memory is not None and site.memory.eager_bytes <= TIMED_BYTES


def _all_lost(graph: fx.GraphModule) -> bool:
    """Has every call that was put into the graph lost its race? Then the graph as it came does the same in fewer steps."""
    spliced = [n for body in capture.regions(graph) for n in body.graph.nodes if splice.SITE in n.meta]
    modules = [body.get_submodule(str(n.target)) for body in capture.regions(graph) for n in body.graph.nodes
               if splice.SITE in n.meta and n.op == "call_module"]
    return len(modules) == len(spliced) and all(isinstance(m, Guarded) and m.slower for m in modules)


@contextmanager
def own_saved_tensors() -> Iterator[None]:
    """What tracing saves for a backward pass is not shown to the caller's hooks: checkpoints count what they are shown."""
    if not torch_private.may_hook_saved_tensors():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def _runnable(
    graph: fx.GraphModule, came: fx.GraphModule, inputs: Sequence[object], inductor: Mapping[str, object] | None
) -> Callable[..., Any]:
    """What is run of a rewritten graph: itself, or the one that `came` from Dynamo where nothing was put in.

    By Inductor where there are options for it, none among them.
    """
    if inductor is not None:
        # Named, the threads are part of the key in Inductor's cache on disk: before PyTorch 2.13 FlexAttention compiled for
        # one thread came back in a process of two, and wrote past its buffers. Dynamo compiles again when they change.
        options = {**inductor, "cpp.threads": torch.get_num_threads()}
        floats.computed_with(graph)
        return torch_private.inductor(graph, inputs, options)
    bodies = list(capture.regions(graph))
    # a checkpointed region was changed for its capture
    if len(bodies) == 1 and not splice.is_changed(graph):
        return came.forward
    for body in bodies:
        for n in body.graph.nodes:
            if n.op == "call_function" and n.target is torch_private.CHECKPOINT:
                n.target = capture.checkpointed
        call_plainly(body)
        body.recompile()
    return graph.forward


def break_of(gm: fx.GraphModule) -> str:
    """Where and why Dynamo ended this graph before the end of the function; empty when it did not."""
    found = torch_private.graph_break(gm)
    if found is None:
        return ""
    where, text = found[0], _sentence(found[1])
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
    mark = model.__dict__.get(_MARK)
    return mark.session if isinstance(mark, Mark) else None


def is_copy(model: nn.Module) -> bool:
    """Whether the model was copied from an optimised one: copies are not optimised."""
    mark = model.__dict__.get(_MARK)
    return isinstance(mark, Mark) and mark.session is None


def twin(model: nn.Module) -> nn.Module:
    """A deep copy of the model as it was before it was optimised."""
    other = copy.deepcopy(model)
    for m in other.modules():
        m.__dict__.pop(_MARK, None)
    return other
