"""What a call that was put in is made from again: plain data, kept in the metadata of its node."""

from __future__ import annotations

from dataclasses import dataclass

# In the metadata of the node of a call: its recipe, where it has one.
RECIPE = "reattend_recipe"


@dataclass(frozen=True)
class Recipe:
    """`kind`: our operator ("ours", "trained", "several", "numbers") or a vendor's function by name; `cascade` and `mapping`
    as canonical texts.

    `keyed`: the vendor's function takes it that every row keeps a key. `conditions`: the rules of the call's conditions.
    """

    kind: str
    cascade: str
    mapping: str = ""
    keyed: bool = False
    conditions: tuple[tuple[str, ...], ...] = ()
