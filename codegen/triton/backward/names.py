"""Names of a trained kernel's functions, tensors and scalars."""

from __future__ import annotations

from ....patterns.expr import Expr
from ...text.print_triton import TritonOperand, identifier
from ..device_function import RESERVED, KernelNames
from .form import StreamingBackward

HOLES = ("keys", "dots", "flow", "adjoint", "keyed", "start_q", "add_q", "store_q", "start_k", "add_k", "store_k")


# More names that the emitted functions use for themselves.
LOCALS = (
    *HOLES, "seen", "pair", "of_keys", "of_rows", "rows_backward", "keys_backward", "backward", "wanted", "grad", "grads",
    "dout", "saved", "sums", "p_saved", "p_sums", "scalars", "own", "exists", "g", "k", "v", "o", "dw", "dx", "dq", "dk",
    "dv", "FIRST", "LEAVES", "leaves", "leaf_bits", "dl", "parts", "part", "start_l", "add_l", "store_l", "start_keyed",
    "add_keyed", "store_keyed", "i_batch", "room", "looked_up",
)


class BackwardNames(KernelNames):
    """Names of the forward's tensors, of the gradient that flows in, and of a row's scalars."""

    reserved = (*RESERVED, *LOCALS)

    def __init__(self, b: StreamingBackward) -> None:
        super().__init__(b.s)
        self.b = b
        taken = {*self.reserved, *self.symbols.values(), *self.ranks.values(), *self.products.values()}
        taken |= {x for o in self.operands.values() for x in (o.name, *o.strides)}
        out = self.operands[b.s.cascade.outputs[0]]
        name, *strides = (identifier(f"d{x}", taken) for x in (out.name, *out.strides))
        self.dout = TritonOperand(name, tuple(strides), out.shape, out.dtype)
        taken |= {name, *strides}
        self.operands[str(b.dout.attr)] = self.dout
        self.scalars: dict[Expr, str] = {}
        for x in b.scalars:
            self.scalars[x] = identifier(str(x.attr).lower(), taken)
            taken.add(self.scalars[x])
