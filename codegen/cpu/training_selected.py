"""Prints the CPU kernel for rows that name their keys that is trained: the gathered forward, and torch's tape through it.

Rows hand nothing over: their few scores are computed again. What is differentiated is the printed forward itself, so that
every float that it reads has a gradient, whatever the score and the row's end are; indices have none.
"""

from __future__ import annotations

from ...patterns.mapping import TileMapping
from ..files.torch_file import coordinates, file, indented, parts, prelude, relatives, signature, sizes
from ..forms.form import Form
from ..skeletons import cpu, cpu_product
from ..skeletons.backward import cpu_backward, cpu_selected_backward
from .product import BODY
from .selected import RESERVED, SelectedKernel
from .training import PrintedTraining
from .training_product import rows_of

LOCALS = (*RESERVED, *parts(cpu_backward), *parts(cpu_selected_backward), "grad", "saved", "wanted", "given", "flow")


def printed(f: Form, m: TileMapping, version: str) -> PrintedTraining:
    """The kernel's file. Raises PrintError where the body does not fit the attention."""
    k = _TrainedSelection(f)
    functions = [*relatives(k.p, k.near), *k.scores, k.chosen, k.step, k.end]
    walk = [f"Each row sees the keys that {k.choice.slots} names, gathered, and so do its gradients; {BODY}."]
    modules = (cpu, cpu_product, cpu_backward, cpu_selected_backward)
    text = file(k.p, m, [*(x.text for x in functions), k.whole_file(), k.backward()], modules, [], BODY, version, walk)
    return PrintedTraining(text, (), 0)


class _TrainedSelection(SelectedKernel):
    """The printed functions of the forward, which leave what the tape reads as it is."""

    reuse = False
    reserved = LOCALS
    answer = "out, saved"

    def allocated(self) -> list[str]:
        return ["saved = torch.empty((*rows.shape[:3], 0), dtype=torch.float32, device=out.device)"]

    def backward(self) -> str:
        """The text of `backward`."""
        p = self.p
        names = [p.names.tensors[t.name] for t in self.f.cascade.inputs]
        setup, pairs = self.setup()
        queries, keys = ([x.strip("()").split(", ")[i] for x in pairs] for i in (0, 1))
        lines = [
            *self.closures(), "", "asked = [given[i] for i in wanted]",
            f"flow = selected_backward([{', '.join(pairs)}], v, {rows_of(self.f, 'grad')}, asked, {self.told()})",
            f"made = [{', '.join([*queries, *keys, 'v'])}, *asked]",
            "return inputs_gradients(made, [g.to(x.dtype) for x, g in zip(made, flow)], given, wanted)",
        ]
        body = [
            *sizes(p), f"given = leaves([{', '.join(names)}], wanted)", f"{', '.join(names)}, = given",
            "with torch.enable_grad():", *indented([*prelude(p, str(self.choice.member.attr)), *setup]),
            *coordinates(p, "\n".join(lines)), *lines,
        ]
        own = signature(p).replace("*, ", "")
        doc = "The gradients of the inputs in the wanted places, from the output's gradient."
        return f'def backward(grad, out, saved, wanted, {own}):\n    """{doc}"""\n' + "\n".join(indented(body))
