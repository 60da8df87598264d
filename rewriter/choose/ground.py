"""What a measured error rests on and no graph shows: the model's weights, its mode, and that the whole of it is called.

    measured     weights, hooks, numbers on modules, evaluation mode, the model's own output
    a call       of the model itself, with the same in the same mode: methods run; any other: the model's own code
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
    "its methods were measured with {what} than the model has now, so that it runs its own code: "
    "optimise it again to measure anew"
)
WEIGHTS, CALLS = "other weights", "other hooks, forwards or numbers on its modules"
# What a module may hold of itself that its results go by.
NUMBERS = (bool, int, float, str, type(None))


class _Model:
    """The parts and the parameters of a model, its hooks, and the numbers that stand on its modules, as they were."""

    def __init__(self, model: nn.Module) -> None:
        held = [x for m in model.modules() for x in own_parts(m)]
        self.counts = [(x, len(x)) for x in held]
        self.places = [(x, n, what) for x in held for n, what in x.items()]
        parameters = [what for _, _, what in self.places if isinstance(what, Tensor)]
        self.parameters = [p for p in parameters if not p.is_inference()]
        self.plain = [p for p in parameters if type(p) in (Tensor, nn.Parameter)]
        self.state = self._state()
        self.own = [x for m in model.modules() for x in _own(vars(m))]

    def _state(self) -> tuple[object, object]:
        """Changes with every write to a parameter, and with every other memory that one is given."""
        return versions(self.parameters), [p.data_ptr() for p in self.plain]

    def changed(self) -> str:
        """What is not as it was; nothing where all is."""
        weighed = (
            all(len(x) == n for x, n in self.counts) and all(x.get(n) is what for x, n, what in self.places)
            and self._state() == self.state
        )
        if not weighed:
            return WEIGHTS
        return "" if all(map(_stands, self.own)) else CALLS

    def settle(self) -> None:
        """What has changed since, while nobody changed the model, counts its calls: it is no part of what was measured."""
        self.own = [x for x in self.own if _stands(x)]


def _own(held: dict[str, object]) -> list[tuple[dict[str, object], str, object]]:
    """Hooks around the forward, a forward of the module's own, and its numbers: where they stand, and what stands there."""
    hooks = [(held, n, x.copy()) for n, x in held.items() if "forward" in n and isinstance(x, dict)]
    numbers = [(held, n, x) for n, x in held.items() if type(x) in NUMBERS and n != "training"]
    return [*hooks, (held, "forward", held.get("forward")), *numbers]


def _stands(place: tuple[dict[str, object], str, object]) -> bool:
    held, name, what = place
    now = held.get(name)
    return now is what or (isinstance(now, (*NUMBERS, dict)) and type(now) is type(what) and now == what)


class Ground:
    """The model as it was measured. Safe to use from several threads.

    `holds` says of the call that this thread is in whether it is one as was measured. What is written through `.data`, or
    into a buffer, is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.measured, self.training = _Model(model), model.training
        self.thread = threading.local()
        self.warned: set[str] = set()

    def settle(self) -> None:
        """All has been measured."""
        self.measured.settle()

    def stands(self) -> bool:
        """Are the parts, the weights and the hooks those that were there?"""
        return not self.measured.changed()

    @contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """Around a call of the model. Warns once where it has changed."""
        what, outer = self.measured.changed(), self.holds()
        self.thread.holds = not what and model.training == self.training
        if what and what not in self.warned:
            self.warned.add(what)
            warnings.warn(f"reattend: {CHANGED.format(what=what)}", stacklevel=5)
        try:
            yield
        finally:
            self.thread.holds = outer

    def holds(self) -> bool:
        return getattr(self.thread, "holds", False)

    @property
    def said(self) -> tuple[str, ...]:
        """For the report."""
        what = self.measured.changed()
        return (CHANGED.format(what=what),) if what else ()

    @property
    def condition(self) -> Condition:
        """Under which a method may run at an attention of the model. Dynamo keeps it: nothing in it holds the model."""
        thread = self.thread
        return Condition(
            "the model is called as it was measured: whole, in the same mode, with the same weights and hooks", (), (),
            lambda tensors, sizes: getattr(thread, "holds", False),
        )
