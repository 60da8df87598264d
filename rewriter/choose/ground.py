"""What a measured error rests on and no graph shows: the model's weights, its mode, and that the whole of it is called.

    measured     weights, evaluation mode, the model's own output
    a call       of the model itself, with the same weights in the same mode: methods run; any other: the model's own code
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..graph.torch_private import own_parts, versions
from ..splice.guards import Condition

CHANGED = (
    "the model's weights are others than those that its methods were measured with, so that it runs its own code: "
    "optimise it again to measure anew"
)


class _Model:
    """The parts and the parameters of a model, as they were."""

    def __init__(self, model: nn.Module) -> None:
        held = [x for m in model.modules() for x in own_parts(m)]
        self.counts = [(x, len(x)) for x in held]
        self.places = [(x, n, what) for x in held for n, what in x.items()]
        parameters = [what for _, _, what in self.places if isinstance(what, Tensor)]
        self.parameters = [p for p in parameters if not p.is_inference()]
        self.plain = [p for p in parameters if type(p) in (Tensor, nn.Parameter)]
        self.state = self._state()

    def _state(self) -> tuple[object, object]:
        """Changes with every write to a parameter, and with every other memory that one is given."""
        return versions(self.parameters), [p.data_ptr() for p in self.plain]

    def stands(self) -> bool:
        return (
            all(len(x) == n for x, n in self.counts) and all(x.get(n) is what for x, n, what in self.places)
            and self._state() == self.state
        )


class Ground:
    """The model as it was measured. Safe to use from several threads.

    `holds` says of the call that this thread is in whether it is one as was measured. What is written through `.data`, or
    into a buffer, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.measured, self.training = _Model(model), model.training
        self.thread = threading.local()
        self.warned = False

    def stands(self) -> bool:
        """Are the parts and the weights those that were there?"""
        return self.measured.stands()

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Around a call of the model. Warns once where its weights have changed."""
        stands, outer = self.stands(), self.holds()
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

    @property
    def said(self) -> tuple[str, ...]:
        """For the report."""
        return () if self.stands() else (CHANGED,)

    @property
    def condition(self) -> Condition:
        """Under which a method may run at an attention of the model. Dynamo keeps it: nothing in it holds the model."""
        thread = self.thread
        return Condition(
            "the model is called as it was measured: whole, in the same mode, with the same weights", (), (),
            lambda tensors, sizes: getattr(thread, "holds", False),
        )
