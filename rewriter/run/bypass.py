"""Calls of an optimised model that go round us: noticed where that is possible, counted by reason, said once.

An outer `torch.compile` inlines the model's own code and calls nothing of ours; what it meets on its way in is run while it
compiles, once a graph, and not at the calls of that graph.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import fx

from ..graph import torch_private

COMPILED = (
    "another torch.compile compiles the model's own code: "
    'compile with torch.compile(model, backend="reattend") instead, or leave the outer compilation out'
)
TRACED = (
    "a trace or a transform of functions (torch.export, torch.jit, torch.fx, torch.func, forward derivatives) sees the "
    "model's own code: optimise what comes out of it, where that is a module"
)
GIVEN_UP = "the capture of the model failed more than once"

_numbers = itertools.count()
_thread = threading.local()
_lock = threading.Lock()


class Entrance(Protocol):
    """What is gone round: a way into a model; `said` are the reasons that its model was warned of already."""

    path: str
    bypassed: Counter[str]
    said: set[str]


# What Dynamo can name while it compiles is a number.
_by_number: weakref.WeakValueDictionary[int, Entrance] = weakref.WeakValueDictionary()


def number_of(entry: Entrance) -> int:
    number = next(_numbers)
    _by_number[number] = entry
    return number


def went_round(entry: Entrance, why: str) -> None:
    """Count a call, and warn at the first of its kind in a model."""
    if getattr(_thread, "own", False):
        return
    with _lock:
        entry.bypassed[why] += 1
        fresh = why not in entry.said
        entry.said.add(why)
    if fresh:
        warnings.warn(f"reattend: {entry.path or 'the model'} runs as written: {why}", stacklevel=5)


def _compiled(number: int) -> bool:
    entry = _by_number.get(number)
    if entry is not None:
        went_round(entry, COMPILED)
    return True


# Called while an outer Dynamo compiles; its graph holds the answer only.
compiled = torch.compiler.assume_constant_result(_compiled)  # type: ignore[no-untyped-call]


def enter() -> bool:
    """What this thread traces from here on is traced by us; answers what `leave` is given."""
    before: bool = getattr(_thread, "own", False)
    _thread.own = True
    return before


def leave(before: bool) -> None:
    _thread.own = before


@contextmanager
def own() -> Iterator[None]:
    """The same for a stretch: what is traced here is traced by us, to plan it."""
    before = enter()
    try:
        yield
    finally:
        leave(before)


# --- inside somebody else's trace -----------------------------------------------------------------------------------

# Threads in which a graph is being captured by us: fx's "a trace is running" is one flag for all threads.
_capturing: set[int] = set()


@contextmanager
def capturing() -> Iterator[None]:
    """This thread is at a graph of ours. Dynamo runs one such thread at a time.

    Before PyTorch 2.13 a call in another thread takes fx's flag for a trace of its own and raises, unless it sees this flag,
    which Dynamo raises itself since.
    """
    with torch_private.said_to_compile():
        _capturing.add(threading.get_ident())
        try:
            yield
        finally:
            _capturing.discard(threading.get_ident())


def traced(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Is this call inside somebody else's tracing: export, fx, functorch, dispatch modes, forward derivatives?

    (`torch.compiler.is_compiling` is no test: it is true in all threads while one of them compiles.)
    """
    return bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or _fx_traced(args, kwargs)
        or torch_private.is_transformed()
    )


def _fx_traced(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Is this call part of a symbolic trace, and not only beside one that we make in another thread?"""
    if not torch_private.is_symbolic_trace():
        return False
    if not _capturing - {threading.get_ident()}:
        return True
    return any(isinstance(x, fx.Proxy) for x in torch_private.tree_leaves((args, dict(kwargs))))
