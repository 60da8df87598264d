"""All rules of lifting, by the operator's name."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    operators_contract,
    operators_edit,
    operators_point,
    operators_product,
    operators_reduce,
    operators_select,
    operators_view,
)
from .lift import Rule

RULES: Mapping[str, Rule] = {
    **operators_view.RULES, **operators_point.RULES, **operators_reduce.RULES, **operators_contract.RULES,
    **operators_edit.RULES, **operators_product.RULES, **operators_select.RULES,
}
