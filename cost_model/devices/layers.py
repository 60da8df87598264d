"""What products outside of attention take on a GPU: a few rates a device and type, read from layers.toml.

    bf16, fp8                    one product: activations times weights
    experts_bf16, experts_fp8    both products of experts, each over the rows that were dealt to it, and the dealing

A device without rows of its own has those of its `like`, which are shares of its data sheet, in a wider band.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("layers.toml")
KINDS = ("bf16", "fp8", "experts_bf16", "experts_fp8")


@dataclass(frozen=True)
class ProductRates:
    """Rates of the products of one kind.

    A call takes `call_seconds`; a program `program_seconds` beside its tile, which runs at `matrix_share` of a unit's peak
    or is drawn at `draw_bytes_per_s` a unit; bytes move at `memory_share` of the memory's rate; parts of a sum that is split
    over programs take `merge_seconds` more. A long call takes up to `power_share` longer. A row that is converted or dealt
    takes `row_seconds`, and its bytes `cast_share` of what they take from memory. `band`: a measured time from
    seconds / (1 + band) to seconds · (1 + band) is as predicted. `basis`: where the numbers come from.
    """

    call_seconds: float
    program_seconds: float
    matrix_share: float
    draw_bytes_per_s: float
    memory_share: float
    merge_seconds: float
    power_share: float
    row_seconds: float
    cast_share: float
    band: float
    basis: str = ""


RATES = tuple(f.name for f in fields(ProductRates) if f.name not in ("band", "basis"))


@cache
def layer_rates() -> Mapping[str, Mapping[str, ProductRates]]:
    """Device → kind → rates. Raises ValueError on a field that is missing or unknown, and on an unknown `like`."""
    body = tomllib.loads(FILE.read_text("utf-8"))
    own = {name: _own(name, table, body["source"]) for name, table in body.items() if _is_measured(table)}
    out = dict(own)
    for name, table in body.items():
        if isinstance(table, dict) and "like" in table:
            like, why = table["like"]
            if like not in own:
                raise ValueError(f"layers of {name}: like {like!r} has no rates of its own")
            band = float(table["band"][0])
            kinds = table.get("kinds", list(KINDS))
            out[name] = {
                k: replace(r, band=max(r.band, band), basis=f"as {like}: {why}") for k, r in own[like].items() if k in kinds
            }
    return out


def _is_measured(table: object) -> bool:
    return isinstance(table, dict) and "like" not in table


def _own(name: str, table: Mapping[str, Any], source: str) -> Mapping[str, ProductRates]:
    out = {}
    for kind, row in table.items():
        if strange := sorted(set(row) ^ {*RATES, "band"} | {kind} - {*KINDS}):
            raise ValueError(f"layers of {name}: {kind}: {', '.join(strange)} missing or unknown")
        out[kind] = ProductRates(**{k: float(v) for k, v in row.items()}, basis=source)
    return out
