"""`torch.compile(model, backend="reattend", options={...})`: found through the entry-point group torch_dynamo_backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from .cost_model.devices.device import device
from .rewriter.choose.policy import Policy
from .rewriter.graph.torch_private import has_cpp_compiler, inductor_modes
from .rewriter.run.compiled import keep
from .rewriter.run.session import Session

_OPTIONS = ("rest", "target", "allow", "deny", "strict")


def reattend(
    gm: fx.GraphModule, example_inputs: Sequence[object], *, options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of Dynamo's: attention by reattend, the rest by Inductor.

    Options: `rest` ("inductor", the default where a C++ compiler is present, or "eager"), `target`, and `allow`, `deny`,
    `strict` as in `Policy`. `mode` is Inductor's, for the rest. Raises ValueError for any other option or mode.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise ValueError(f"backend reattend: unknown option {unknown[0]!r}; one of {', '.join(_OPTIONS)}")
    target = given.get("target")
    policy = Policy(allow=given.get("allow", ()), deny=given.get("deny", ()), strict=bool(given.get("strict", False)))
    inductor = _inductor(given.get("rest"))
    session = Session(
        policy, device(target) if target is not None else None, inductor=inductor, inductor_options=_asked(mode, inductor)
    )
    run = session.compile(None, gm, example_inputs)
    keep(session)
    return run


def _asked(mode: str | None, inductor: bool) -> Mapping[str, object]:
    """What a mode of torch.compile asks of Inductor."""
    if mode is None:
        return {}
    modes = inductor_modes()
    if mode not in modes:
        raise ValueError(f"backend reattend: mode={mode!r} is not known: one of {', '.join(modes)}")
    if not inductor:
        raise ValueError(f"backend reattend: mode={mode!r} is for Inductor, and the rest runs eagerly here: leave it out")
    return modes[mode]


def _inductor(rest: str | None) -> bool:
    if rest not in (None, "inductor", "eager"):
        raise ValueError(f"backend reattend: rest={rest!r} is not known: use 'inductor' or 'eager'")
    if rest == "eager":
        return False
    missing = _missing_compiler()
    if missing and rest is None:
        warnings.warn(
            f"reattend: {missing}: the rest of the model runs eagerly (options={{'rest': 'eager'}} says so)",
            stacklevel=3,
        )
    elif missing:
        raise ValueError(f"backend reattend: {missing}: install one, or use options={{'rest': 'eager'}}")
    return not missing


def _missing_compiler() -> str:
    return "" if has_cpp_compiler() else "Inductor needs a C++ compiler and found none"
