"""What the backend of torch.compile did to a model's graphs, kept as long as the model lives."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from itertools import chain
from weakref import WeakKeyDictionary

from torch import nn

from ..graph import torch_private
from .report import Entered, GraphPiece, Report
from .session import Session

_kept: WeakKeyDictionary[nn.Module, list[tuple[str, GraphPiece]]] = WeakKeyDictionary()
_lock = threading.Lock()


def keep(session: Session) -> None:
    """Note the graphs of a session for the model that is called in this thread, else for the module that is compiled."""
    here = (x for x in torch_private.compiled_locals().values() if isinstance(x, nn.Module))
    module = next(chain(_wrappers(), here), None)
    if module is not None:
        with _lock:
            _kept.setdefault(module, []).extend((str(session.policy), p) for p in session.pieces)


def _wrappers() -> Iterator[nn.Module]:
    """What torch.compile returned and is running, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and torch_private.is_compiled(running):
            yield running
        frame = frame.f_back


def report_of(compiled: nn.Module) -> Report | None:
    """A report on a model that torch.compile wraps; None where our backend compiled none of its graphs."""
    found = list(_pieces(compiled))
    if not found:
        return None
    pieces = tuple(p for _, p in found)
    return Report(found[0][0], (Entered("", max(p.calls for p in pieces), 0),), pieces)


def _pieces(compiled: nn.Module) -> Iterator[tuple[str, GraphPiece]]:
    with _lock:
        for module in compiled.modules():
            yield from _kept.get(module, ())
