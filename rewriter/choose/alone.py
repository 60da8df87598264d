"""A cascade by itself, with no model around it: an attention is a site with its candidates, any other cascade is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...cost_model.devices.device import Device
from ...cost_model.sites.detail import Detail, detail
from ...cost_model.sites.site import Site
from ...cost_model.time.cost import Cost
from ...cost_model.time.predict import predict_original
from ...patterns.attention.recognise import attention
from ...patterns.cascade import Cascade, CascadeError
from ...patterns.evaluate import DTYPE
from ...patterns.notation import read
from ...patterns.verdict import Obstacle
from ..shapes import UsageError
from .candidates import Question, answer
from .policy import Policy


def read_file(path: Path, sizes: Mapping[str, int]) -> Cascade:
    """The cascade of a file in the papers' notation. Raises UsageError, also for an open size that `sizes` lacks."""
    try:
        c = read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, CascadeError) as no:
        raise UsageError(f"{path}: {no}") from None
    open_sizes = [n for n in c.free_symbols if n not in sizes]
    if open_sizes:
        example = " ".join(f"--size {n}=4096" for n in open_sizes)
        raise UsageError(f"{path} leaves {', '.join(open_sizes)} open: give {example}")
    if unknown := [n for n in sizes if n not in c.free_symbols]:
        raise UsageError(f"{path} has no open size {unknown[0]}: it has {', '.join(c.free_symbols) or 'none'}")
    return c


def site_of(c: Cascade, device: Device, sizes: Mapping[str, int]) -> Site | Obstacle:
    """The cascade as an attention of a plan: candidates, passes and times; or why it is none."""
    view = attention(c)
    if isinstance(view, Obstacle):
        return view
    dtype = str(DTYPE[c.tensor[c.outputs[0]].dtype]).removeprefix("torch.")
    site, _ = answer(Question(c, tuple(sorted(sizes.items())), device, Policy(), False, None, "", dtype, None, False))
    return replace(site, name=c.name)


def counted(c: Cascade, device: Device, sizes: Mapping[str, int]) -> tuple[Detail, Cost]:
    """Passes, bytes and operations of any cascade, and its time where each Einsum is an operator that writes its result."""
    return detail(c, None, "", sizes), predict_original(c, device, sizes)
