"""Two plans compared, under its public name: `reattend.cost_model.diff.diff(a, b)`."""

from __future__ import annotations

from .plan.diff import Diff, Row, diff

__all__ = ["Diff", "Row", "diff"]
