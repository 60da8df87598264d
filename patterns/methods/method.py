"""What a method is: a law from an attention to another that costs less and is not equal to it.

    static     keep(p, m)                       a predicate of positions, nothing to compute beforehand
    selected   keep[b, h, p // rows, m // keys] a table, an input of the new cascade, which a program makes of q and k first
    state      linear row states                not built yet: a law may already give any cascade with the same output

To add one: a frozen dataclass in a file of its own in a room of `patterns/methods/` (static/, selected/, …), a subclass of
`Method` (of `StaticMethod` where it is a predicate). Its fields are its parameters, with the paper's defaults; `name`,
`source` and `needs` are facts of the class; `replace` is its law. Nothing else is edited: `registry.methods()` lists the
rooms. Its known answers are its tests, in `tests/methods/`.

What every law keeps (`masked` does it for all who use it): the model's own mask wins, keep = model's ∧ method's (R1);
positions are those of the model's own causal bound, so that rows over a cache lie where they belong (R2); no row that has a
key loses all of them, which is proved or guarded where it is installed (R3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, ClassVar, Protocol

from .. import expr as ex
from ..attention.attention import Attention
from ..cascade import Cascade, Size, size_term
from ..expr import Expr
from ..verdict import Refusal
from .masked import masked, position


class SelectionProgram(Protocol):
    """What makes a table before the kernel runs: plain data that compares by value (a frozen dataclass).

    `reads` names the inputs of the replacement's cascade that it is made of. `run(torch, tensors, sizes)` makes the table
    from them, a b1 tensor in the shape that the cascade declares; it gets the module because nothing here imports torch. It
    draws from no generator of others, and gives the same table for the same tensors. `work(sizes)` counts it. `keyed`:
    has every row that keeps a key in the model one under the table (R3), by how the table is made? Else every table is
    looked at before the kernel runs, and one that leaves a row empty ends the method there. `share(table, sizes)`: the share
    of its cells that a table keeps, of those in which the model keeps a pair.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def keyed(self) -> bool: ...

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any: ...

    def work(self, sizes: Mapping[str, int]) -> SelectionWork: ...

    def share(self, table: Any, sizes: Mapping[str, int]) -> float: ...


class Supply(Protocol):
    """What gives a replacement's cascade inputs of its own, but for a table: plain data that compares by value.

    `names`: these inputs; `reads`: the attention's inputs that they are made of, none where they were learned beforehand.
    `run` makes them, in the shapes that the cascade declares; the rest is as in `SelectionProgram`.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Mapping[str, Any]: ...

    def work(self, sizes: Mapping[str, int]) -> SelectionWork: ...


class DirectProgram(Protocol):
    """Computes the output of a replacement's cascade from all its inputs, where its law knows a way that no kernel has.

    `run` gives it in the shape and the type that the cascade declares; `work` counts it.
    """

    def run(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> Any: ...

    def work(self, sizes: Mapping[str, int]) -> SelectionWork: ...


@dataclass(frozen=True)
class SelectionWork:
    """What a selection costs at sizes: a candidate's time is its kernel's and this.

    `flops` of matrix products (a multiply-add is two), `bytes` read and written, `exps`, `sorted`: elements that are sorted
    or looked through for the largest, `kernels`: operators that are launched one after another.
    """

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    sorted: float = 0.0
    kernels: int = 0


@dataclass(frozen=True)
class Replacement:
    """What a method makes of an attention: a cascade with its inputs and its output, computed by any kernel that can.

    With a `program`, the cascade has one input more, `table` (b1), read as `table[b, h, p // rows, m // keys]` in its mask
    (`masked.block_table` makes both, `masked.masked` puts them in);
    `density` is then the share of its cells that the method expects to be kept, for the predictions: None where unknown,
    which counts as all until a calibration has seen it.

    `supply` gives other inputs of its own, `direct` computes it in the place of a kernel. `masks`: its rows are the model's
    own over fewer keys, so that a row keeps a share of its weight; not so where keys are weighed anew (linear methods).

    `ahead`: why what a row keeps depends on tokens behind it that it cannot see, or nothing; such rows are others in a
    prompt of one piece than over a cached prefix.
    """

    cascade: Cascade
    table: str = ""
    program: SelectionProgram | None = None
    density: float | None = None
    masks: bool = True
    supply: Supply | None = None
    direct: DirectProgram | None = None
    ahead: str = ""

    @property
    def own(self) -> tuple[str, ...]:
        """Inputs of the cascade that are made in front of its kernel."""
        return (*((self.table,) if self.table else ()), *(self.supply.names if self.supply is not None else ()))

    @property
    def reads(self) -> tuple[str, ...]:
        """Inputs of the attention that these are made of."""
        makers = (self.program, self.supply)
        return tuple(dict.fromkeys(n for x in makers if x is not None for n in x.reads))

    def make(self, torch: ModuleType, tensors: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """These inputs, by name."""
        made = {} if self.program is None else {self.table: self.program.run(torch, tensors, sizes)}
        return made if self.supply is None else {**made, **self.supply.run(torch, tensors, sizes)}

    def work(self, sizes: Mapping[str, int]) -> SelectionWork:
        """What making them costs."""
        parts = [x.work(sizes) for x in (self.program, self.supply) if x is not None]
        total = {f.name: sum(getattr(w, f.name) for w in parts) for f in fields(SelectionWork)}
        return SelectionWork(**total)


@dataclass(frozen=True)
class Method(ABC):
    """A method with its parameters, which are the fields of the subclass.

    `name`: how it is allowed and denied; `source`: paper and section; `needs`: what must be given for it, one phrase each.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def replace(self, a: Attention) -> Replacement | Refusal:
        """The attention in which this one is replaced by the method, or why it is none for the method."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        given = ", ".join(f"{n}={_said(v)}" for n, v in self.parameters.items() if v is not None)
        return f"{self.name}({given})" if given else self.name

    def refuse(self, reason: str) -> Refusal:
        """A refusal by this method."""
        return Refusal(str(self), reason)


def _said(value: object) -> str:
    said = f"({','.join(map(str, value))}{',' * (len(value) == 1)})" if isinstance(value, tuple) else str(value)
    return said.replace(" ", "")


@dataclass(frozen=True)
class TokenPositions:
    """The coordinates that a static predicate speaks of, as integer terms over the ranks of an attention.

    `row`: the position of the query among the keys (that of the last key it may see where the attention is causal); `key`:
    the position of the key; `head`: the query head, None where there is none; `keys`: how many keys there are.
    """

    row: Expr
    key: Expr
    head: Expr | None
    keys: Expr
    causal: bool


@dataclass(frozen=True)
class StaticMethod(Method):
    """A method that keeps keys by positions alone."""

    @abstractmethod
    def keep(self, at: TokenPositions, a: Attention) -> Expr | Refusal:
        """Does the method keep the key of a row? A b1 term; the model's own mask need not stand in it."""

    def replace(self, a: Attention) -> Replacement | Refusal:
        """The attention under its own mask and the method's."""
        at = positions(a)
        if isinstance(at, Refusal):
            return self.refuse(at.reason)
        keep = self.keep(at, a)
        if isinstance(keep, Refusal):
            return keep
        made = masked(a, keep, str(self))
        return made if isinstance(made, Refusal) else Replacement(made)


def positions(a: Attention) -> TokenPositions | Refusal:
    """Where queries and keys lie. Refused where queries and keys are two sets: nothing says which key a row is at."""
    found = position(a)
    rows, keys = (a.cascade.rank[r].size for r in (a.query, a.key))
    if found is None and rows != keys:
        return Refusal("", f"its {rows} queries and {keys} keys are two sets: no key is at the place of a query")
    head = head_rank(a)
    return TokenPositions(
        ex.index(a.query) if found is None else found, ex.index(a.key), ex.index(head) if head is not None else None,
        size_term(keys), found is not None,
    )


def head_rank(a: Attention) -> str | None:
    """The rank of the query heads: the innermost batch rank that the queries' operand varies over; None where unknown.

    Of a single one it is known by a batch of one sequence in front of it, or by heads of keys that share it.
    """
    own = [r for r in a.batch if r in frozenset().union(*(e.ranks for e in a.products))]
    if len(own) != 1:
        return own[-1] if own else None
    (only,) = own
    return only if any(_is_of_heads(x, only) for e in a.products for x in ex.loads(e.body)) else None


def _is_of_heads(x: Expr, rank: str) -> bool:
    """Is the rank read behind a dimension of which one place is read, or divided into groups?"""
    at = next((d for d, i in enumerate(x.args) if rank in i.ranks), None)
    return at is not None and (x.args[at].op == "floordiv" or any(i.is_const for i in x.args[:at]))


def heads(a: Attention) -> Size:
    """How many query heads there are."""
    head = head_rank(a)
    return 1 if head is None else a.cascade.rank[head].size


def key_group(a: Attention) -> int:
    """How many query heads share a key head, by the index that reads the keys."""
    head = head_rank(a)
    reads = [x for e in a.products for x in ex.loads(e.body) if a.key in x.ranks] if head is not None else []
    for i in (i for x in reads for i in x.args):
        if i.op == "floordiv" and i.args[0] is ex.index(str(head)) and i.args[1].is_const:
            return int(i.args[1].value)
    return 1
