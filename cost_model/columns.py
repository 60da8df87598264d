"""Sizes at many points at once: a column of numbers for each size, in the plain arithmetic of one point.

    SizeColumns({"s": [1024, 4096]}, 2).of(2*s + 1)   →   [2049., 8193.]

Integers are computed exactly, however large they are, and become float64 at the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from ..patterns.cascade import Size
from .operations import bound_size, size_int

Numbers = NDArray[np.float64]
_FLOOR: Callable[[Any], Any] = np.frompyfunc(math.floor, 1, 1)
_WHOLE: Callable[[Any], Any] = np.frompyfunc(size_int, 1, 1)


class SizeColumns:
    """Values of symbols at `n` points, and what follows of sizes there."""

    def __init__(self, values: Mapping[str, Sequence[int]], n: int) -> None:
        self.n = n
        self._values = {name: np.array(list(v), object) for name, v in values.items()}
        self._made: dict[Size, NDArray[np.object_]] = {}

    def integers(self, size: Size) -> NDArray[np.object_]:
        """A size at each point, as Python's integers. Raises ValueError where a symbol has no value."""
        made = self._made.get(size)
        if made is None:
            made = self._made[size] = self._at(size)
        return made

    def of(self, size: Size) -> Numbers:
        """A size at each point. Raises ValueError where a symbol has no value."""
        return self.integers(size).astype(np.float64)

    def with_values(self, more: Mapping[str, Size | None], otherwise: Mapping[str, int]) -> SizeColumns:
        """The same points with further symbols that are sizes of these; of one that has no value there, another value."""
        out = SizeColumns({}, self.n)
        out._values = dict(self._values)
        for name, size in more.items():
            known = size is not None and (isinstance(size, int) or {s.name for s in size.free_symbols} <= set(self._values))
            if known and size is not None:
                out._values[name] = self.integers(size)
            elif name in otherwise:
                out._values[name] = np.full(self.n, otherwise[name], object)
        return out

    def _at(self, size: Size) -> NDArray[np.object_]:
        if isinstance(size, int):
            return np.full(self.n, size, object)
        made = self._computed(size)
        if made is None:
            every = [{name: v[i] for name, v in self._values.items()} for i in range(self.n)]
            made = np.array([bound_size(size, at) for at in every], object)
        return np.asarray(_WHOLE(made), object)

    def _computed(self, size: sympy.Expr) -> Any:
        """Python's arithmetic over the columns; None where a size is more than that, or a symbol has no value."""
        if isinstance(size, sympy.Symbol):
            return self._values.get(size.name)
        if size.is_Integer:
            return int(size)
        args = [self._computed(a) for a in size.args]
        if not args or any(a is None for a in args):
            return None
        if isinstance(size, sympy.Add):
            return reduce(operator.add, args)
        if isinstance(size, sympy.Mul):
            return reduce(operator.mul, args)
        if isinstance(size, sympy.Pow) and size.exp.is_Integer and size.exp > 0:
            return args[0] ** args[1]
        return None
