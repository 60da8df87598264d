"""PyTorch's own matcher on one model of the walk: how many attentions do Inductor's patterns turn into SDPA?

    written   calls of SDPA that the model makes itself        hits   places where a pattern put one (`fuse_attention`)

Inductor captures, decomposes and matches as it always does; only the code that it would then print is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from coverage_one import Say, first_call, outputs, said
from models import Case
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx


def matched(case: Case, say: Say) -> None:
    """Say how many attentions of a model are SDPA as it is written, and how many more where Inductor has matched."""
    warnings.simplefilter("ignore")
    with torch.no_grad():
        model, calls, seen = first_call(case)
        row: dict[str, Any] = {"written": seen.fused}
        if seen.fused < seen.count:
            row |= hits(model, calls[0])
    say({"matcher": row})


def hits(model: torch.nn.Module, call: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    out: dict[str, Any] = {}
    try:
        outputs(torch.compile(model, backend=_matches_alone), call)
    except Exception as e:
        out["raised"] = said(e)
    return {"hits": counters["inductor"]["fuse_attention"]} | out


def _matches_alone(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    run: Callable[..., Any] = compile_fx(gm, inputs, inner_compile=_as_it_is)
    return run


def _as_it_is(gm: fx.GraphModule, *_args: Any, **_settings: Any) -> Callable[..., Any]:
    return gm.forward
