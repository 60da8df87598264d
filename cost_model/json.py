"""The shape of plain data: what is written as JSON, and what was read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
# Fields by name: whoever reads them takes them apart, and raises KeyError or TypeError where they are not as expected.
Read: TypeAlias = Mapping[str, Any]
