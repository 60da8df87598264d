"""The watch over one rewritten site: when its result is held against the model's own code, and what follows from it.

    first call of a class      compared; a class: sizes by power of two, types, gradients wanted or not, what masks hold
    others                     one look into a set
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.autocast import no_autocast
from ..graph.torch_private import tree_leaves
from . import verdicts
from .compare import CANCELLED, DRAWS, Errors, beside, change, drawn, errors, moved, redrawn
from .cut import CutProgram
from .demand import everything, pick
from .gradient import wrong_gradient
from .own import Uncheckable, one_output, read
from .rows import MASKED, fitting, said
from .verdicts import Check, Verdict

# What masks hold is looked at in tensors up to this size, on the CPU alone: a look at a GPU's would wait for it.
LOOKED_AT = 1 << 16
SEED = 0x5EED
REPORT = "please report it with the model's attention code and the lines of reattend.report(model)"


@dataclass
class SiteWatch:
    """Holds a site's results against the model's own code. `every`: each n-th call too, 0 for none but the first.

    `kernel` is what was spliced in, `source` gives its text; `masks` are the inputs that its score reads beside the product;
    `largest` is the largest finite number in that score, a fill perhaps. `repeated`: the dimensions along which the kernel
    takes an input's first values for all. `record` takes the checks. `refuse`, where given,
    makes the error that is raised instead of stepping aside. `advice`: what the warning asks the user for.
    """

    site: str
    kernel: str
    source: Callable[[], str]
    every: int = 0
    masks: frozenset[int] = frozenset()
    largest: float = 0.0
    repeated: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    refuse: Callable[[str], Exception] | None = None
    record: list[Check] = field(default_factory=list)
    advice: str = REPORT
    calls: int = 0
    seen: set[object] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Any
    ) -> str:
        """Why the site must go back to the model's own code, or nothing."""
        kind = self._class(given)
        with self.lock:
            self.calls += 1
            again = self._again(self.calls)
            if kind in self.seen and not again:
                return ""
            self.seen.add(kind)
        if _captured():
            self._note(Check(self.site, self.kernel, "unchecked", why="a graph of the device is being captured"))
            return ""
        return self._looked(code, target, arguments, given, out, "" if again else str(kind))

    def due(self, given: Sequence[Any]) -> bool:
        """Will the next call be looked at, if it is of these tensors?"""
        if _captured():
            return False
        kind = self._class(given)
        with self.lock:
            return kind not in self.seen or self._again(self.calls + 1)

    def _again(self, call: int) -> bool:
        return bool(self.every) and call > 1 and call % self.every == 1 % self.every

    def raised(self, why: str) -> None:
        """Record a kernel that raised."""
        self._note(Check(self.site, self.kernel, "raised", why=why))

    def _looked(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Any,
        kind: str,
    ) -> str:
        start = time.perf_counter()
        try:
            at = self._key(code, arguments, given, kind)
            known = verdicts.recall(at) if at else None
            check = known and replace(known, site=self.site, how=verdicts.DISK)
            check = check or self._compared(code, target, arguments, given, out)
            if at and known is None:
                verdicts.keep(at, check)
        except Exception as error:
            # Whatever keeps a check from being made, memory or a defect here: the model's own code is right.
            lines = str(error).strip().splitlines()
            why = lines[0] if isinstance(error, Uncheckable) else f"{type(error).__name__}: {lines[0] if lines else ''}"
            check = Check(self.site, self.kernel, "unchecked", why=why)
        self._note(replace(check, seconds=time.perf_counter() - start))
        return check.why

    def _compared(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Any
    ) -> Check:
        """The check of the first of several outputs that differs, else of that whose error is largest beside the own one."""
        if isinstance(out, Tensor):
            return self._one(code, target, arguments, given, out)
        checks = []
        for i, x in enumerate(out):
            checks.append(self._one(one_output(code, i), partial(_picked, target, i), arguments, given, x))
            if checks[-1].why:
                return checks[-1]
        return max(checks, key=lambda c: (c.error or 0.0) / (c.own_error or 1.0))

    def _one(
        self, code: fx.GraphModule, target: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], out: Tensor
    ) -> Check:
        generator = torch.Generator().manual_seed(SEED + self.calls)
        trained = torch.is_grad_enabled() and out.requires_grad and _flow_alike(arguments, given)
        with torch.no_grad(), no_autocast():
            values = [x.detach() if isinstance(x, Tensor) else x for x in given]
            own = read(code, values)
            program = fitting(own, values, generator)
            e, same = _forward(program, values, out, beside(self.largest, out.dtype))
            why = "" if same else f"{self.kernel} is {e}"
            if trained and not why:
                smaller = replace(fitting(own, values, generator, gradients=True), repeated=self.repeated)
                wrong = wrong_gradient(smaller, target, arguments, given, generator)
                why, e = (f"{self.kernel}: its gradient is {wrong}", wrong) if wrong is not None else ("", e)
        verdict: Verdict = "differs" if why else "same"
        return Check(self.site, self.kernel, verdict, said(program), e.rms, e.own_rms, gradients=trained, why=why)

    def _key(self, code: fx.GraphModule, arguments: Sequence[Any], given: Sequence[Any], kind: str) -> str:
        """Under what the verdict is kept; nothing where the kernel reads what the own code does not."""
        place = {id(x): i for i, x in enumerate(given)}
        bound = [place.get(id(x)) if isinstance(x, Tensor) else str(x) for x in tree_leaves(tuple(arguments))]
        return "" if not kind or None in bound else verdicts.key(code.code, str(bound), kind, self.kernel, self.source())

    def _class(self, given: Sequence[Any]) -> object:
        grad = torch.is_grad_enabled()
        tensors = [x for x in given if isinstance(x, Tensor)]
        held = tuple([_held(given[i]) for i in self.masks if i < len(given)])
        kinds = tuple([(_sizes(x.shape), x.dtype, grad and x.requires_grad) for x in tensors])
        return kinds, held, tensors[0].device

    def _note(self, check: Check) -> None:
        with self.lock:
            self.record.append(check)


def _picked(target: Callable[..., Any], i: int, *arguments: Any) -> Any:
    return target(*arguments)[i]


def _forward(p: CutProgram, given: Sequence[Any], out: Tensor, unseen: float) -> tuple[Errors, bool]:
    """The errors of a result, and whether it is right; `unseen` is the own error that nothing shows."""
    own, exact = p.run(given)
    shown = pick(out.detach().reshape(p.own.shape).to(own.dtype), everything(p.own.shape), p.wanted)
    e = errors(shown, own, exact)
    right = e.within((unseen, unseen))
    if right or e.odd:
        return e, right
    _, other = p.run(given, moved(given))
    return e, e.within(change(exact, other)) or e.within(drawn(list(_again(p, given))))


def _again(p: CutProgram, given: Sequence[Any]) -> Iterator[Errors]:
    """The own errors on moved inputs, also of rows that are rounded beside something large: how large they are is luck."""
    for seed in range(DRAWS):
        own, exact = p.run(redrawn(given, seed))
        yield errors(own, own, exact, CANCELLED)


@lru_cache(maxsize=1024)
def _sizes(shape: torch.Size) -> tuple[tuple[int, bool], ...]:
    return tuple((n.bit_length(), n % 64 == 0) if n > 16 else (n, False) for n in shape)


def _held(x: Any) -> tuple[bool, ...]:
    """What a mask holds: does it keep everything, anything, and something in every row."""
    if not isinstance(x, Tensor) or x.numel() > LOOKED_AT or x.device.type != "cpu" or not x.numel():
        return ()
    keep = x > MASKED if x.is_floating_point() else x != 0
    return bool(keep.all()), bool(keep.any()), bool(keep.any(-1).all()) if x.dim() else True


def _flow_alike(arguments: Sequence[Any], given: Sequence[Any]) -> bool:
    """Is all that gradients reach through the kernel's arguments given to the own code as well?

    Where a value was written in place, the kernel may read what it was made of and the own code the value.
    """
    known = {id(x) for x in given}
    leaves = tree_leaves(tuple(arguments))
    return all(id(x) in known for x in leaves if isinstance(x, Tensor) and x.requires_grad)


def _captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

