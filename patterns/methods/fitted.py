"""A method whose parameters differ from attention to attention: a calibration looks at options, and the method chooses.

    options    one method for all heads alike; what each of them changes, head by head of keys, is measured
    fit        attentions with what was measured  →  attentions with the method that each of them gets

Losses are shares: the squared change of a head's part of the output over the squared output of the whole attention, so that
heads of one attention add up to its squared relative error. Published profiles weigh heads by the gradient of a loss; here
no gradient is asked for, and what the whole model loses is measured afterwards, closed loop, by who installs (validation).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import expr as ex
from ..attention.attention import Attention
from ..expr import Expr
from ..verdict import Refusal
from .method import Method, TokenPositions, heads, key_group


@dataclass(frozen=True)
class HeadsSeen:
    """What a calibration saw at one attention, on the examples that configure.

    `losses[option][key head]`: mean over the examples; `lengths`: (queries, keys) of the calls that were seen; `group`:
    query heads that share a key head; `echo` and `induction` [query heads]: the mean weight on the same token before, and
    on the token behind it, in a text that repeats itself; empty where none was shown.
    """

    losses: tuple[tuple[float, ...], ...]
    lengths: tuple[tuple[int, int], ...]
    group: int = 1
    echo: tuple[float, ...] = ()
    induction: tuple[float, ...] = ()


class FittedMethod(Method):
    """A method with parameters that a calibration finds; without them it is refused."""

    @property
    @abstractmethod
    def options(self) -> tuple[Method, ...]:
        """What every head is tried with."""

    @property
    def repeats(self) -> bool:
        """Does it ask how heads read a text that repeats itself?"""
        return False

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Are its parameters known?"""

    @abstractmethod
    def fit(self, seen: Mapping[str, HeadsSeen]) -> Mapping[str, FittedMethod]:
        """The method of each attention, by name."""


def of_key_head(a: Attention, at: TokenPositions) -> tuple[Expr, int] | Refusal:
    """The key head of a query head as a term, and how many key heads there are. Refused where they are not known."""
    count = heads(a)
    if at.head is None or not isinstance(count, int):
        return Refusal("", "it needs a known number of heads")
    group = key_group(a)
    return at.head // group if group > 1 else at.head, count // group


def is_one_of(head: Expr, chosen: Sequence[int]) -> Expr:
    """Is the head one of these? A b1 term of one comparison or two for every run of them."""
    out = ex.FALSE
    runs: list[list[int]] = []
    for h in sorted(set(chosen)):
        if runs and runs[-1][1] == h - 1:
            runs[-1][1] = h
        else:
            runs.append([h, h])
    for low, high in runs:
        out = out | (ex.equal(head, low) if low == high else (head >= low) & (head <= high))
    return out


def largest(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, tuple[int, ...]]:
    """The heads of the `count` largest scores of all attentions together, by attention; of equal ones the first."""
    order = sorted(((-x, at, h) for at, (_, row) in enumerate(scores.items()) for h, x in enumerate(row)))
    names = list(scores)
    out: dict[str, list[int]] = {n: [] for n in names}
    for _, at, h in order[:count]:
        out[names[at]].append(h)
    return {n: tuple(sorted(hs)) for n, hs in out.items()}


def full_heads(m: Method, full: Sequence[int] | None, kind: str, at: TokenPositions, a: Attention) -> Expr | Refusal:
    """Is a row of one of a method's full heads, of the `kind` that it calls them? Refused where they are not known."""
    if full is None:
        return m.refuse(f"its {kind} heads are found by a calibration: give one, or give them as full=(…)")
    found = of_key_head(a, at)
    if isinstance(found, Refusal):
        return m.refuse(found.reason)
    head, count = found
    if any(not 0 <= h < count for h in full):
        named = ", ".join(map(str, full))
        return m.refuse(f"its full heads are {named}, and this attention has {count} heads of keys")
    return is_one_of(head, full)
