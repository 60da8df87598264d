"""What a device's times rest on: each number of its file with its source, and whether it was calibrated or is assumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ..devices.device import Device, device_to_dict, shipped
from ..json import Json

CALIBRATED, PUBLISHED, ASSUMED, MEASURED = "calibrated", "published", "assumed", "measured"
# Words with which the source of a number begins that is nobody's measurement.
_ASSUMED = ("assumed", "stated", "as ", "not ")


def basis_rows(d: Device) -> list[dict[str, str]]:
    """One row a number, in the order of the file: name, value, kind and source. Nothing for a device without a file."""
    try:
        file = shipped(d.name)
    except KeyError:
        return []
    now, then = (_flat(device_to_dict(x)) for x in (d, file))
    rows = []
    for name, source in file.sources.items():
        if name not in now:
            continue
        own = d.basis == CALIBRATED and now[name] != then.get(name)
        kind = CALIBRATED if own else _kind(source, d.host is not None)
        rows.append({"name": name, "value": _shown(now[name]), "kind": kind, "source": "this machine" if own else source})
    return rows


def basis_text(d: Device) -> str:
    """The basis and the band of all times in a sentence."""
    counts = Counter(r["kind"] for r in basis_rows(d))
    of = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    how = "as measured on shapes that nothing was fitted to" if d.basis == CALIBRATED else "as stated, not measured"
    return f"{d.basis} times: within a factor of {1 + d.band:.3g}, {how}" + (f"; they rest on {of} numbers" if of else "")


def _kind(source: str, host: bool) -> str:
    if source.lower().startswith(_ASSUMED):
        return ASSUMED
    return MEASURED if host else PUBLISHED


def _flat(table: Mapping[str, Json], path: str = "") -> dict[str, Json]:
    out: dict[str, Json] = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else str(key)
        out |= _flat(value, where) if isinstance(value, Mapping) else {where: value}
    return out


def _shown(value: Json) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
