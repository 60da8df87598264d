"""The steps of a selection, as data: a program is one step that reads others; equal steps are made once.

    operand   x[b, h, i, e]    queries or keys, a row of which stands for `unit` tokens      Queries Keys Pooled Folded …
    scores    s[b, h, i, j]    a number a cell of `rows` queries × `keys` keys               Products RowSoftmax Summed …
    table     t[b, h, i, j]    is the cell kept? only cells in which the model keeps a pair  Largest Mass Above Forced …
    test      c[b, h]          which of two tables a head takes                              Alike

Whatever a step keeps, it keeps among cells with a pair that the model's own mask keeps; other cells score −∞. A full budget
(every count, the whole mass, a threshold of 0) keeps all of these, whatever rounding says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SelectionStep:
    """One step; what it reads are its fields that are steps."""

    @property
    def reads(self) -> tuple[SelectionStep, ...]:
        return tuple(x for f in fields(self) if isinstance(x := getattr(self, f.name), SelectionStep))


def walk(root: SelectionStep) -> Iterator[SelectionStep]:
    """Every step once, what is read before what reads it."""
    seen: dict[SelectionStep, None] = {}

    def visit(s: SelectionStep) -> None:
        if s not in seen:
            for x in s.reads:
                visit(x)
            seen[s] = None

    visit(root)
    yield from seen


# --- operands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRows(SelectionStep):
    """[b, h, i, e]; `unit`: tokens a row stands for."""

    @property
    def unit(self) -> int:
        return next((x.unit for x in self.reads if isinstance(x, TokenRows)), 1)


@dataclass(frozen=True)
class Queries(TokenRows):
    """The queries as the product reads them."""


@dataclass(frozen=True)
class Keys(TokenRows):
    """The keys as the product reads them, a head for each head of keys."""


@dataclass(frozen=True)
class Last(TokenRows):
    """The last `rows` tokens, or all where there are fewer."""

    of: TokenRows
    rows: int


@dataclass(frozen=True)
class Pooled(TokenRows):
    """One row for every `size` tokens: mean, max, min, side by side. The last one counts the tokens that are there (R7)."""

    of: TokenRows
    size: int
    how: tuple[str, ...] = ("mean",)

    @property
    def unit(self) -> int:
        return self.size


@dataclass(frozen=True)
class Folded(TokenRows):
    """`size` tokens side by side in one row, in reverse where `backwards`; tokens moved up by `shift`; 0 past the end.

    Backwards queries times forwards keys are the sums along the antidiagonals of cells of size × size.
    """

    of: TokenRows
    size: int
    backwards: bool = False
    shift: int = 0

    @property
    def unit(self) -> int:
        return self.size


@dataclass(frozen=True)
class Learned:
    """A learned array, compared by what it holds."""

    digest: str
    values: NDArray[np.float32] = field(compare=False, repr=False)

    @staticmethod
    def of(values: object, ranks: int = 3) -> Learned:
        """From an array, or a tensor in host memory: [heads, in, out], or of so many ranks. Raises ValueError for others."""
        array = np.ascontiguousarray(np.asarray(values), np.float32).copy()
        if array.ndim != ranks:
            raise ValueError(f"a learned map of heads is [heads, in, out][:{ranks}], not {list(array.shape)}")
        return Learned(f"{hashlib.sha256(array.data).hexdigest()} {array.shape}", array)


@dataclass(frozen=True)
class Mapped(TokenRows):
    """x[b, h, i, :] · W[h], of a learned W [h, e, g]."""

    of: TokenRows
    weight: Learned


@dataclass(frozen=True)
class Rotated(TokenRows):
    """Rotary positions: halves of a row turned by i · base^(−2k/E), i the row's number, not the token's."""

    of: TokenRows
    base: float = 10000.0


@dataclass(frozen=True)
class GroupMean(TokenRows):
    """Queries, as the mean over the heads that share keys."""

    of: TokenRows


# --- scores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellGrid(SelectionStep):
    """[b, h, i, j]: cells of `rows` queries × `keys` keys; `last`: of the last so many queries alone (0: of all)."""

    def _of(self) -> CellGrid:
        return next(x for x in self.reads if isinstance(x, CellGrid))

    @property
    def rows(self) -> int:
        return self._of().rows

    @property
    def keys(self) -> int:
        return self._of().keys

    @property
    def last(self) -> int:
        return self._of().last


@dataclass(frozen=True)
class Scores(CellGrid):
    """Numbers; −∞ in cells without a pair that the model keeps."""


@dataclass(frozen=True)
class CellTable(CellGrid):
    """Booleans."""


@dataclass(frozen=True)
class Products(Scores):
    """times · scale · Σ_e q·k; `scale` None: the model's own.

    `odd`: keys for the rows with an odd number, in place of `k`.
    """

    q: TokenRows
    k: TokenRows
    scale: float | None = None
    times: float = 1.0
    odd: TokenRows | None = None

    @property
    def rows(self) -> int:
        return self.q.unit

    @property
    def keys(self) -> int:
        return self.k.unit

    @property
    def last(self) -> int:
        return next((s.rows for s in walk(self.q) if isinstance(s, Last)), 0)


@dataclass(frozen=True)
class RowSoftmax(Scores):
    """Of every row over its keys, in float32; a row without a key is 0."""

    of: Scores


@dataclass(frozen=True)
class Unit(Scores):
    """Laid between 0, the least of those that may be kept, and 1, the largest: of each row, or of a head's cells together.

    Equal ones are all 1.
    """

    of: Scores
    scope: str = "row"


@dataclass(frozen=True)
class Summed(Scores):
    """Sums (or the largest) over coarser cells; `rows` 0: over all rows. A row's mean where `mean`."""

    of: Scores
    to_rows: int
    to_keys: int
    how: str = "sum"
    mean: bool = False

    @property
    def rows(self) -> int:
        return self.to_rows

    @property
    def keys(self) -> int:
        return self.to_keys


@dataclass(frozen=True)
class OverHeads(Scores):
    """The mean or the largest over the heads that share keys, or over all (`every`); heads stay as many as there were."""

    of: Scores
    how: str
    every: bool = False


@dataclass(frozen=True)
class Raised(Scores):
    """+∞ in each row's own cell, in the `first` cells, and in the `last_cells` up to its own."""

    of: Scores
    first: int = 0
    own: int = 1


@dataclass(frozen=True)
class Offsets(Scores):
    """[b, h, 1, o]: Σ over rows of what stands o keys before the row's own place; of cells of single tokens."""

    of: Scores


# --- tables -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Everything(CellTable):
    """All cells of a grid."""

    of: CellGrid


@dataclass(frozen=True)
class Largest(CellTable):
    """The `count` largest of a row; of equal ones the first."""

    of: Scores
    count: int


@dataclass(frozen=True)
class Mass(CellTable):
    """The fewest largest cells whose sum is at least `share` of all: of each row, or of a head's cells together.

    The cell that reaches the share is kept (R5); at least `least` cells.
    """

    of: Scores
    share: float
    scope: str = "row"
    least: int = 0


@dataclass(frozen=True)
class Above(CellTable):
    """Cells of at least `threshold`."""

    of: Scores
    threshold: float


@dataclass(frozen=True)
class Spread(CellTable):
    """Coarser cells with some cell that is kept; `rows` 0: of one row for all queries."""

    of: CellTable
    to_rows: int
    to_keys: int

    @property
    def rows(self) -> int:
        return self.to_rows

    @property
    def keys(self) -> int:
        return self.to_keys


@dataclass(frozen=True)
class Slashes(CellTable):
    """Cells of size × size that a kept offset [b, h, 1, o] crosses."""

    of: CellTable
    size: int

    @property
    def rows(self) -> int:
        return self.size

    @property
    def keys(self) -> int:
        return self.size

    @property
    def last(self) -> int:
        return 0


@dataclass(frozen=True)
class Columns(CellTable):
    """A row [b, h, 1, j] of cells, for every row of cells of `size` queries."""

    of: CellTable
    size: int

    @property
    def rows(self) -> int:
        return self.size

    @property
    def last(self) -> int:
        return 0


@dataclass(frozen=True)
class Either(CellTable):
    """Kept by one of two."""

    of: CellTable
    other: CellTable


@dataclass(frozen=True)
class Forced(CellTable):
    """The table, the `first` cells of each row and its `own` last ones: sink and diagonal (R4)."""

    of: CellTable
    first: int = 1
    own: int = 1


@dataclass(frozen=True)
class GroupUnion(CellTable):
    """Kept for one of the heads that share keys (R8)."""

    of: CellTable


@dataclass(frozen=True)
class Chosen(CellTable):
    """Of each head the one table or the other."""

    test: Alike
    of: CellTable
    other: CellTable


@dataclass(frozen=True)
class Alike(SelectionStep):
    """[b, h]: √JS(a, b) < `distance` of two distributions [b, h, 1, j]; 0 · log 0 is 0. At most √log 2 = 0.8326."""

    a: Scores
    b: Scores
    distance: float
