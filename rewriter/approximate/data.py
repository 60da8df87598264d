"""Calibration data: read, looked at, and split into what configures and what is held out to measure."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.models import run
from ..graph.torch_private import tree_leaves

# Two to configure and two to measure: one alone says nothing of how far others lie from it.
LEAST = 4


class CalibrationError(ValueError):
    """Calibration data, or a policy, that nothing can be measured with; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Example:
    """One call of the model."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class Halves:
    """Examples with odd numbers configure, those with even ones are held out: an order by length is in both."""

    configure: tuple[Example, ...]
    held_out: tuple[Example, ...]


def read(data: object) -> Halves:
    """The examples of an iterable: tensors, tuples of arguments, mappings, or pairs of a tuple and a mapping.

    Raises CalibrationError for what is no such data, for fewer than four, and for floats that are not finite.
    """
    if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            "Policy(calibration) is an iterable of examples, such as a list of tensors or of keyword arguments, "
            f"not {type(data).__name__}"
        )
    examples = tuple(_example(x, i) for i, x in enumerate(data))
    if not examples:
        raise CalibrationError("Policy(calibration) is empty: give at least 4 examples")
    if len(examples) < LEAST:
        raise CalibrationError(
            f"Policy(calibration) has {len(examples)} example{'s' * (len(examples) > 1)}: give at least 4, two that "
            "configure and two that are held out to measure"
        )
    return Halves(examples[0::2], examples[1::2])


def _example(given: object, number: int) -> Example:
    made = _arguments(given, number)
    for x in tree_leaves((made.args, dict(made.kwargs))):
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"Policy(calibration): example {number} holds NaN or infinite numbers")
    return made


def _arguments(given: Any, number: int) -> Example:
    if isinstance(given, Tensor):
        return Example((given,), {})
    if isinstance(given, Mapping):
        return Example((), dict(given))
    if isinstance(given, (tuple, list)):
        if len(given) == 2 and isinstance(given[0], (tuple, list)) and isinstance(given[1], Mapping):
            return Example(tuple(given[0]), dict(given[1]))
        return Example(tuple(given), {})
    raise CalibrationError(
        f"Policy(calibration): example {number} is a {type(given).__name__}: an example is a tensor, a tuple of arguments "
        "or a mapping of keyword arguments"
    )


def output(model: nn.Module, e: Example) -> Any:
    """The output. What the model writes into its inputs is not in the example; seeds are the same in every call."""
    args, kwargs = copy.deepcopy((e.args, dict(e.kwargs)))
    torch.manual_seed(0)
    return run(model, args, kwargs)


def call(model: nn.Module, e: Example) -> list[Tensor]:
    """The float tensors of the output."""
    out = output(model, e)
    return [x.detach().clone() for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
