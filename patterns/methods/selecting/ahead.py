"""Whose rows depend on tokens that come after them: read off the steps of a selection.

Such rows are others in a prompt of one piece than over a cached prefix, although no mask lets them see what comes after.
"""

from __future__ import annotations

from .steps import CellTable, Last, Mass, Products, Raised, Spread, Summed, Unit, walk


def ahead(root: CellTable) -> str:
    """Why what a row keeps depends on tokens that come after it, or nothing."""
    steps = tuple(walk(root))
    if any(isinstance(s, Last) for s in steps):
        return "the last rows choose for all"
    if any(isinstance(s, Mass | Unit) and s.scope == "head" for s in steps):
        return "the rows of a head choose together"
    if any(isinstance(s, Summed | Spread) and not s.to_rows for s in steps):
        return "all rows choose together"
    if root.rows != 1:
        return f"{root.rows} rows choose together"
    raised = {s.of for s in steps if isinstance(s, Raised) and s.own}
    whole = [s for s in steps if isinstance(s, Products) and s.keys > 1 and s not in raised]
    return "a row looks at the whole of its own block of keys" if whole else ""
