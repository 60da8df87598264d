"""Prints the CPU kernel of a recurrence that is trained: torch code that autograd follows from chunk to chunk.

    forward     chunks of steps as in codegen/cpu/scan.py; each keeps what its gradients are made of
    backward    chunks from behind, each by the adjoint of its loop (codegen/skeletons/backward/); all else by autograd

Inputs are split into chunks once and outputs are joined once: a piece that is cut by itself has a gradient of the whole.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from ...patterns import expr as ex
from ...patterns.backward.rules import RULES
from ...patterns.cascade import Einsum
from ...patterns.recurrence.low_rank import LowRank
from ...patterns.recurrence.recurrence import Recurrence
from ...patterns.verdict import Refusal
from ..skeletons.backward import carried_backward, scan_backward
from ..text.print_torch import TYPES
from ..text.printer import PrintError
from .scan import NAME, ScanFile, ScanKernel, printed


@lru_cache(maxsize=256)
def build_trained(r: Recurrence) -> ScanKernel | Refusal:
    """The kernel of a recurrence with gradients of all its inputs, or why there is none."""
    no = _without_derivative(r)
    return Refusal(NAME, no) if no else printed(r, TrainedScanFile)


def _without_derivative(r: Recurrence) -> str:
    """What of a step has no derivative that is the model's own, whatever its numbers are."""
    steps = {id(s.step) for s in r.states if s.law != "matrix"}
    bodies = [e.body for e in r.cascade.einsums if id(e) not in steps]
    bodies += [x for s in r.states if s.law != "matrix" for x in (s.factor, s.added)]
    for e in ex.walk(*bodies):
        if not e.is_float or e.op in ("load", "const", "index", "symbol"):
            continue
        if e.op not in RULES:
            return f"{e.op} has no derivative"
        if e.op in ("max", "min") and any(x.is_const for x in e.args):
            return f"{e.op} of a number has another derivative at a tie than a clamp"
    other = next((e.op for e in r.cascade.einsums if e.op not in (None, "add")), None)
    return f"a step reduces by {other}, which ties have several derivatives of" if other else ""


class TrainedScanFile(ScanFile):
    """The text of a kernel that autograd follows."""

    imports = ScanFile.imports.replace("\n\nimport torch", "\nfrom typing import Any\n\nimport torch")
    modules: tuple[ModuleType, ...] = (*ScanFile.modules, carried_backward, scan_backward)
    suffix = "_trained"

    def _pieces(self, all_steps: str) -> str:
        return f"{all_steps}.split({self.chunk})"

    def _piece(self, name: str) -> str:
        return f"{name}[t0 // {self.chunk}]"

    def _empty(self, name: str) -> str:
        return f"{name} = []"

    def _given(self, e: Einsum, value: str, at: int) -> str:
        return f"{e.out.tensor}.append({value})"

    def _whole(self, e: Einsum) -> list[str]:
        name = e.out.tensor
        at = next(d for d, i in enumerate(e.out.index) if i is ex.index(self.r.rank))
        sizes = self.c.tensor[name].shape
        if any(i.op != "index" and n != 1 for i, n in zip(e.out.index, sizes)):
            raise PrintError("a step gives a part of a whole")
        before = sum(i.op == "index" for i in e.out.index[:at])
        kind = TYPES[self.c.tensor[name].dtype]
        return [f"{name} = torch.cat({name}, {before}).reshape({self._shape(name)}).to({kind})"]

    def _sums(self, m: LowRank) -> bool:
        # a decay of each channel has a gradient where it has a logarithm
        return m.factor.op == "exp" and (m.key in m.factor.ranks or self.real == "f32")
