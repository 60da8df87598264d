"""Is a result what the model's own code gives? Both are held against the same code in float64.

    own      the model's code in its own types      exact    the same with every float widened
    ours     RMS error at most 1.2 times, largest at most 2.5 times the own error, or some units in the last place

A row is one vector over the last dimension, and errors are in units of its largest value. Where the model's own rounding
changed a row altogether (a score absorbed by a fill of -1e9, an overflow), to give what the model gives is right as well as
to give what is exact; such a row widens no limit for others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RMS_RATIO, MAX_RATIO = 1.2, 2.5
# Units in the last place within which a result is right whatever the own error is; summing in another order costs some.
# Nothing wider measures float64: its limit is a thousandth of what one operand in float32 would show.
UNITS = {torch.float64: 2.0**16, torch.float32: 16.0, torch.float16: 1.5, torch.bfloat16: 1.0}
# A row of the own code that is off by more units is changed altogether.
ALTOGETHER = 256.0
# It may be cancellation: to be off by no more than the own code, and by no more than this share of a row, is then right.
CANCELLED = 2.0**-7
# How many times what one unit of its inputs changes a result may be off by.
CONDITION = 8.0
# How far inputs are moved at most to draw the own error again; numbers from LARGE on may be fills.
NEAR, LARGE = 2.0**-6, 1e3
# How often the own error is drawn again before a result counts as wrong.
DRAWS = 4
# What is as near to a type's largest number may round to it, or to ∞.
EDGE = 2.0**-6
# A row is at least this share of the largest: sums over many keys cancel.
SMALLEST_ROW = 1 / 16


@dataclass(frozen=True)
class Errors:
    """Errors of a result and of the own code, relative to each row's largest value; `odd` values are NaN or infinite where
    the own code's are not, or the other way round."""

    rms: float
    largest: float
    own_rms: float
    own_largest: float
    odd: int
    floor: float

    def within(self, yardstick: tuple[float, float] = (0.0, 0.0)) -> bool:
        """Is the result right, also where the own errors could be as large as the yardstick's?"""
        rms = max(RMS_RATIO * self.own_rms, yardstick[0], self.floor)
        largest = max(MAX_RATIO * self.own_largest, yardstick[1], MAX_RATIO * self.floor)
        return not self.odd and self.rms <= rms and self.largest <= largest

    def __str__(self) -> str:
        if self.odd:
            return f"NaN or infinite in {self.odd} places where it should not be, or the other way round"
        own = f"the model's own code by {self.own_largest:.1e} (RMS {self.own_rms:.1e})"
        return f"off by {self.largest:.1e} (RMS {self.rms:.1e}) of a row's largest value, {own}"


def errors(ours: Tensor, own: Tensor, exact: Tensor, altogether: float = 0.0) -> Errors:
    """The errors of a result of the own code's shape. Own rows off by more than `altogether` and some units widen none."""
    unit = torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0
    floor = UNITS.get(own.dtype, 0.0) * unit
    a, b, c = (_rows(x.detach().double()) for x in (ours, own, exact))
    if not a.numel():
        return Errors(0.0, 0.0, 0.0, 0.0, 0, floor)
    a = torch.where(_at_the_edge(a, b, c, own.dtype), b, a)
    kinds = [_kind(x) for x in (a, b, c)]
    odd = int(((kinds[0] != kinds[1]) & (kinds[0] != kinds[2])).sum())
    scale = _scale(c, b)
    off, missed = _off(a, c, scale)
    off_own, missed_own = _off(a, b, scale)
    # The nearer of the two, row by row; one of which values are missing is not near.
    nearer = (off.square().sum(-1) <= off_own.square().sum(-1)) & ~missed | missed_own
    error = torch.where(nearer[:, None], off, off_own)
    base, _ = _off(b, c, scale)
    own_error = base.square().mean(-1).sqrt()
    sane = own_error <= max(ALTOGETHER * unit, altogether)
    off_by = error.square().mean(-1).sqrt()
    cancelled = ~sane & (off_by <= CANCELLED) & (off_by <= own_error)
    # rows that are rounded beside something large are rounded alike, each with luck of its own
    rounded = ~sane & (own_error <= CANCELLED)
    cancelled |= rounded & (off_by <= MAX_RATIO * own_error[rounded].amax()) if bool(rounded.any()) else False
    error = torch.where(cancelled[:, None], 0.0, error)
    kept = base[sane]
    own_rms, own_largest = (_rms(kept), kept.max().item()) if kept.numel() else (0.0, 0.0)
    return Errors(_rms(error), error.max().item(), own_rms, own_largest, odd, floor)


def _at_the_edge(a: Tensor, b: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Is one of two results ∞, and the other beside the type's largest number, as the exact one is? Rounding tells which."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
    near = (exact.abs() - largest).abs() <= EDGE * largest
    smaller = torch.minimum(a.abs(), b.abs())
    return near & (a.isinf() != b.isinf()) & (a.sign() == b.sign()) & (smaller >= (1 - EDGE) * largest)


def moved(given: Sequence[Any]) -> list[Any]:
    """The inputs in float64, each number by up to one unit of the types that are computed in more or less.

    The own error is one draw of what rounding does; what such a change of the inputs does is another.
    """
    generator = torch.Generator().manual_seed(len(given))

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        return x.detach().double() * (1 + unit * (2 * noise - 1))

    return [one(x) for x in given]


def redrawn(given: Sequence[Any], seed: int) -> list[Any]:
    """The inputs in their own types, each number moved: by up to a unit of its type, or, every other time, by up to `NEAR`.

    Rounding beside a large number (a fill of -1e4) is the same for all inputs that are a unit apart; fills are not moved.
    """
    generator = torch.Generator().manual_seed(seed)

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        by = torch.where(x.abs() < LARGE, torch.finfo(x.dtype).eps if seed % 2 == 0 else NEAR, 0.0)
        return (x.detach().double() * (1 + by * (2 * noise - 1))).to(x.dtype)

    return [one(x) for x in given]


def drawn(own: Sequence[Errors], longer: float = 1.0) -> tuple[float, float]:
    """The RMS and largest error that is right as well where the own code is off by that much on moved inputs."""
    rms, largest = (max((getattr(e, name) for e in own), default=0.0) for name in ("own_rms", "own_largest"))
    return longer * RMS_RATIO * rms, longer * MAX_RATIO * largest


def change(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """The RMS and largest error that is right as well where the moved inputs give the other result."""
    a, b = _rows(other.detach().double()), _rows(exact.detach().double())
    if not a.numel():
        return 0.0, 0.0
    off, _ = _off(a, b, _scale(b, b))
    return CONDITION * _rms(off), CONDITION * off.max().item()


def beside(number: float, dtype: torch.dtype) -> float:
    """The error that is right in float64 where scores are rounded beside such a number: -1e9 in a row without a key.

    Nothing wider shows it, and another order of operations rounds in another place. What is large enough to take in all
    scores takes in the same ones in any order.
    """
    off = MAX_RATIO * abs(number) * torch.finfo(torch.float64).eps
    return off if dtype == torch.float64 and off < CANCELLED else 0.0


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1] if x.dim() else 1) if x.numel() else x.reshape(0, 0)


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))


def _scale(exact: Tensor, own: Tensor) -> Tensor:
    """The largest value of each row, and no less than a share of the largest of all."""
    rows = torch.maximum(*(x.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True) for x in (exact, own)))
    top = rows.max().item()
    return rows.clamp_min(top * SMALLEST_ROW if top else 1.0)


def _off(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of finite values, and the rows in which one is finite and the other is not."""
    both = a.isfinite() & b.isfinite()
    return torch.where(both, a - b, 0.0).abs() / scale, (a.isfinite() != b.isfinite()).any(-1)


def _rms(x: Tensor) -> float:
    return math.sqrt(x.square().mean().item()) if x.numel() else 0.0


def relative(made: Tensor, own: Tensor) -> float:
    """‖made − own‖ / ‖own‖ over what is finite in the own value; infinite where only one of them is finite."""
    finite = own.isfinite()
    if not torch.equal(finite, made.isfinite()):
        return math.inf
    size = own[finite].norm().item()
    off = (made[finite] - own[finite]).norm().item()
    return off / size if size else (0.0 if off == 0 else math.inf)
