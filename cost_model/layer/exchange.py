"""Exchanges of a step over the devices of one axis: by the links' rings, or by a switch that reaches all at once."""

from __future__ import annotations

import numpy as np

from ..columns import Numbers
from ..devices.device import Device
from ..mesh.collectives import ALL_REDUCE, Collective, gathered, reduced
from ..mesh.mesh import Route

# Links of a switch reach every other device at once: an exchange takes so long, and half the rate of the links. A sum is
# made by everybody of all there is, or in two exchanges of parts. Source: all-reduce rows of aiconfigurator-core 0.12.0
# (vllm, captured) on two to eight H200: 4.4 to 4.7 us for a few bytes, 14 us for 0.5 MB and 2.0 ms for 268 MB on eight.
SWITCHED_BYTES_PER_S, SWITCHED_SECONDS, SWITCHED_SHARE = 2e11, 4.5e-6, 0.5


def exchange_seconds(kind: str, payload: Numbers, d: Device, route: Route) -> Numbers:
    """Seconds of one exchange of each payload, in bytes; `kind` is that of a sum or of a gather."""
    twice = kind == ALL_REDUCE
    transfer = reduced(payload, route) if twice else gathered(payload, route)
    if d.link_bytes_per_s < SWITCHED_BYTES_PER_S or route.outer > 1:
        return np.asarray(Collective(kind, "tp", 0, "").latency(route) + transfer)
    parts = (1 + twice) * SWITCHED_SECONDS + transfer / SWITCHED_SHARE
    whole = SWITCHED_SECONDS + (route.parts - 1) * payload / (d.link_bytes_per_s * SWITCHED_SHARE)
    return np.asarray(np.minimum(parts, whole) if twice else parts)
