"""The front door: optimize a model in place, undo it, report on it, plan without running, verify; doors of libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .cost_model.devices.device import Device, device
from .cost_model.plan.plan import Plan
from .rewriter.approximate.calibrate import calibrate
from .rewriter.capture.export import held_tensors
from .rewriter.capture.models import check_devices, inputs_for
from .rewriter.choose import choose
from .rewriter.choose.policy import Policy
from .rewriter.doors.book import passed
from .rewriter.doors.open import DOORS, open_door, processors_of
from .rewriter.graph.torch_private import is_compiled
from .rewriter.run.compiled import report_of
from .rewriter.run.planning import plan_model
from .rewriter.run.report import Entered, Report
from .rewriter.run.session import Session, is_copy, session_of
from .rewriter.run.verify import Verification
from .rewriter.run.verify import verify as _verify
from .rewriter.shapes import Shapes, UsageError

if TYPE_CHECKING:
    from typing import TypeVar

    M = TypeVar("M", bound=nn.Module)

Example = Tensor | tuple[object, ...] | list[object] | Mapping[str, object]


def optimize(
    model: M, *, policy: Policy | None = None, target: str | Device | None = None, example: Example | None = None
) -> M:
    """Have every attention of `model` computed by the cheapest exact candidate. Returns the same object.

    With `Policy(approximate=True, methods=…, max_error=…, calibration=data)` the model is calibrated first, and methods are
    installed where their measured error allows it (docs/approximate.md). Raises CalibrationError (a ValueError).

    Nothing is captured before the model is called; with `example` (a tensor, a tuple of arguments, a mapping of keyword
    arguments, or a pair of both) it is called once, without gradients. Twice is once. `restore` undoes it; when anything
    fails here the model is left as it was. `target` names the device that the model is on, where its kind alone (the
    default) says too little. Raises TypeError for what is no module, ValueError for a target that is not the model's
    device, and StrictError under `Policy(strict=True)`.
    """
    _check_module(model, "optimize")
    chosen = device(target) if target is not None else None
    _check_target(model, chosen)
    policy = policy or Policy()
    held = session_of(model)
    alike = held is not None and held.policy == policy and held.target == chosen
    if held is not None and alike and held.policy.calibration is policy.calibration and _as_measured(held):
        session = held
    else:
        installed = calibrate(model, policy, chosen) if policy.methods else None
        if held is not None:
            held.detach()
        session = Session(policy, chosen, installed=installed)
        session.install(model)
    if example is not None:
        args, kwargs = _arguments(example)
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Exception:
            session.detach()
            raise
    return model


def _as_measured(held: Session) -> bool:
    """Is the model as it was when the session's methods were measured, where it has any?"""
    return held.installed is None or held.installed.ground is None or held.installed.ground.stands()


def restore(model: M) -> M:
    """Undo `optimize`: the model runs its own code again. A model that is not optimised is left as it is."""
    _check_module(model, "restore")
    session = session_of(model)
    if session is not None:
        session.detach()
    return model


def report(model: nn.Module) -> Report:
    """What is planned for an optimised model and what ran: kernels, guards that fell back, captures, graph breaks.

    Of what `torch.compile(model, backend="reattend")` returns as well, after its first call.
    """
    if isinstance(model, nn.Module) and is_compiled(model) and (compiled := report_of(model)) is not None:
        return compiled
    _check_module(model, "report")
    session, through = session_of(model), passed(model)
    if session is None:
        found = Report(through.policy, (), through.pieces, copied=is_copy(model), installed=bool(through.entries))
        return replace(found, doors=through.entries, notes=through.notes)
    with session.lock:
        entries = tuple(
            Entered(e.path, e.calls, e.missed, tuple(e.failures), Counter(e.bypassed), e.as_written) for e in session.entries
        )
        pieces = (*session.pieces, *through.pieces)
        found = Report(str(session.policy), entries, pieces, tuple(session.frames_given_up))
        if session.installed is not None:
            at = session.installed
            changed = at.ground.said if at.ground is not None and at.chosen else ()
            found = replace(found, approximate=(*at.said, *changed), trade_off=at.curve, max_error=at.max_error)
    return replace(found, doors=through.entries, notes=through.notes)


def register(
    library: Literal["transformers", "diffusers"] = "transformers", *, policy: Policy | None = None,
    target: str | Device | None = None,
) -> None:
    """Let a library's models choose our attention by its name, "reattend"; nothing is captured by Dynamo.

    transformers: `attn_implementation="reattend"`; diffusers: `model.set_attention_backend("reattend")`, and for models with
    attention processors `model.set_attn_processor(...)` (docs/doors.md). Registering again changes policy and target.
    Raises ImportError where the library is not installed, and ValueError for an unknown one.
    """
    if library not in DOORS:
        raise ValueError(f"reattend.register: unknown library {library!r}; one of {', '.join(DOORS)}")
    if policy is not None and policy.methods:
        raise ValueError("reattend.register takes no methods: an approximation is measured on a model, by reattend.optimize")
    open_door(library, policy or Policy(), device(target) if target is not None else None)


def processors(model: nn.Module) -> dict[str, Any]:
    """A diffusers model's attention processors, their SDPA through our door: `unet.set_attn_processor(processors(unet))`.

    For models whose processors call SDPA themselves. Raises RuntimeError before `register("diffusers")`, and TypeError for a
    model that has no processors.
    """
    _check_module(model, "processors")
    if not hasattr(model, "attn_processors"):
        raise TypeError(f"reattend.processors takes a diffusers model with attention processors, not {type(model).__name__}")
    return processors_of(model)


def plan(
    model: nn.Module,
    args: tuple[object, ...] | Tensor = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    target: str | Device | None = None,
    policy: Policy | None = None,
    dynamic: bool = False,
) -> Plan:
    """Plan a model without running it: weights and inputs may be on the meta device, and the target need not be present.

    Without `args` and `kwargs`, inputs are built from the model's main input. `target` defaults to the model's device.
    Gradients are planned for when the model is in training mode and grad mode is on. With `dynamic`, sizes stay symbolic
    and costs are those of the given ones. Raises UsageError (a ValueError) naming a missing argument, UnknownDevice for an
    unknown target, and CaptureError where the model has no graph. Methods of the policy are listed with what they would
    cost; with its calibration they are measured, and chosen within the budget.
    """
    _check_module(model, "plan")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    given: Mapping[str, object] = kwargs or {}
    if not args and not given:
        args, given = inputs_for(model, Shapes())
    check_devices(model, args, given)
    where = device(target) if target is not None else _device_of(model, args, given)
    policy = policy or Policy()
    installed = calibrate(model, policy, where) if policy.methods and policy.calibration is not None else None
    made = plan_model(model, args, given, where, policy, dynamic=dynamic, installed=installed)
    return made if installed is None else replace(made, note="; ".join([made.note, *installed.said]))


def verify(
    model: nn.Module,
    args: tuple[object, ...] | Tensor = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    plan: Plan | None = None,
) -> Verification:
    """Compare an optimised model with float64: each attention on its own inputs, and the whole output.

    The model is called on `args` and `kwargs` without gradients, optimised or not. With `plan`, the candidates that it chose
    are verified. `Verification.ok` says whether every error is within what the type allows.
    """
    _check_module(model, "verify")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    given: Mapping[str, object] = kwargs or {}
    if not args and not given:
        args, given = inputs_for(model, Shapes(seq=64))
    check_devices(model, args, given)
    session = session_of(model)
    policy = session.policy if session is not None else Policy()
    return _verify(model, args, given, policy, plan, session.installed if session is not None else None)


def _check_module(model: object, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"reattend.{verb} takes a torch.nn.Module, not {type(model).__name__}")
    if is_compiled(model):
        raise TypeError(
            f"reattend.{verb}: this is the wrapper that torch.compile returns: pass the model itself, "
            'or compile with torch.compile(model, backend="reattend")'
        )


def _check_target(model: nn.Module, target: Device | None) -> None:
    """A model runs where it is; other devices can be planned for."""
    if target is None:
        return
    kinds = {p.device.type for p in model.parameters()} or {"cpu"}
    own = choose.running_device(next(iter(kinds)))
    if kinds != {_device_type(target)} or (target.is_gpu and own.name != target.name):
        there = ", ".join(sorted(kinds))
        raise ValueError(
            f"optimize: the model is on {own.name if own.is_gpu else there}, not on {target.name}: "
            f"leave target out, or use reattend.plan(model, args, target={target.name!r}) to plan for it"
        )


def _device_type(target: Device) -> str:
    return "cuda" if target.is_gpu else target.kind


def _device_of(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Device:
    types = [t.device.type for t in (*model.parameters(), *held_tensors((args, dict(kwargs)))[0])]
    known = [t for t in types if t != "meta"]
    if types and not known:
        raise UsageError(
            "the model is on the meta device: name a target, such as target='h200'; reattend.targets() lists them"
        )
    return choose.running_device(known[0] if known else "cpu")


def _arguments(example: Example) -> tuple[tuple[object, ...], dict[str, object]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    values = tuple(example)
    if len(values) == 2 and isinstance(values[0], (tuple, list)) and isinstance(values[1], Mapping):
        return tuple(values[0]), dict(values[1])
    return values, {}
