"""What a measured error rests on and no graph shows: the model's weights, its mode, and that the whole of it is called.

    measured     weights, evaluation mode, the model's own output
    a call       of the model itself, with the same weights in the same mode: methods run; any other: the model's own code
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor, nn

from ..graph.torch_private import own_tensors, writes
from ..splice.guards import Condition

CHANGED = (
    "the model's weights are others than those that its methods were measured with, so that it runs its own code: "
    "optimise it again to measure anew"
)


@dataclass(frozen=True)
class _Held:
    """A module with its parameters, as they were. Nothing is kept alive."""

    module: weakref.ref[nn.Module]
    parameters: Mapping[str, tuple[weakref.ref[Tensor], object]]

    @staticmethod
    def of(m: nn.Module) -> _Held:
        own = {n: p for n, p in own_tensors(m)[0].items() if p is not None}
        return _Held(weakref.ref(m), {n: (weakref.ref(p), _state(p)) for n, p in own.items()})

    def stands(self, m: nn.Module) -> bool:
        """Is this the module, with the same parameters?"""
        if self.module() is not m:
            return False
        held, count = self.parameters, 0
        for n, p in own_tensors(m)[0].items():
            if p is not None:
                count += 1
                was = held.get(n)
                if was is None or was[0]() is not p or was[1] != _state(p):
                    return False
        return count == len(held)


def _state(p: Tensor) -> object:
    """Changes with every write to a tensor, and with every other memory that it is given."""
    plain = type(p) in (Tensor, nn.Parameter)
    return p.dtype, p.device, writes(p), p.data_ptr() if plain else 0


class Ground:
    """The model as it was measured. Safe to use from several threads.

    `holds` says of the call that this thread is in whether it is one as was measured. What is written through `.data`, or
    into a buffer, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = tuple(map(_Held.of, model.modules()))
        self.training = model.training
        self.thread = threading.local()
        self.warned = False

    def stands(self, model: nn.Module) -> bool:
        """Are the parts and the weights those that were there?"""
        pairs = zip_longest(model.modules(), self.modules)
        return all(m is not None and held is not None and held.stands(m) for m, held in pairs)

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Around a call of the model. Warns once where its weights have changed."""
        stands, outer = self.stands(model), self.holds()
        self.thread.holds = stands and model.training == self.training
        if not stands and not self.warned:
            self.warned = True
            warnings.warn(f"reattend: {CHANGED}", stacklevel=5)
        try:
            yield
        finally:
            self.thread.holds = outer

    def holds(self) -> bool:
        return getattr(self.thread, "holds", False)

    def said(self, model: nn.Module) -> tuple[str, ...]:
        """For the report."""
        return () if self.stands(model) else (CHANGED,)

    @property
    def condition(self) -> Condition:
        """Under which a method may run at an attention of the model."""
        return Condition(
            "the model is called as it was measured: whole, in the same mode, with the same weights", (), (),
            lambda tensors, sizes: self.holds(),
        )
