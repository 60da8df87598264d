"""How good an approximation is, on examples that it has not seen: answers, rows and outputs, each with an interval.

    r = exp(lse_kept - lse_full)              what a row keeps of its softmax's mass, exact from two log-sum-exps
    o - õ = (1 - r) · (o_dropped - õ)         so a mean of r near 1 hides a row, and so a needle, that is lost completely

Means hide total loss: a mean kept mass of 0.955 and a relative error of 0.14 were measured while every needle was lost. So
the first percentile and the minimum of r stand beside its mean, the 99th percentile of the divergence beside the mean, and
all of it is about answers that a task asks for where it asks for any. Intervals are percentile bootstraps by example (Efron
and Tibshirani 1993, chapter 13): rows of one example are not independent, examples are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Resamples of a bootstrap: the ends of a 95% interval then stand on 25 of them each.
DRAWS = 1000
AT_A_TIME = 20


@dataclass(frozen=True)
class Interval:
    """A measured value and where, at `confidence`, it lies on other examples of the same kind."""

    value: float
    low: float
    high: float
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class AnswerQuality:
    """What an approximation does to the answers of a model, `answers` of them in `examples` examples.

    `accuracy` and `original` are shares of right answers with it and without; `kept` is the share of the answers which the
    model has right that stay right; `agreement` the share of equal first choices; `kl` the divergence KL(original ‖
    approximate) in nats, its mean and its 99th percentile.
    """

    accuracy: Interval
    original: Interval
    kept: Interval
    agreement: Interval
    kl: Interval
    kl_p99: Interval
    answers: int
    examples: int


@dataclass(frozen=True)
class HeadQuality:
    """What a head keeps of its rows' mass, and its error behind the output projection, over `rows` rows.

    `worst` is the smallest kept mass that was seen. Its interval is open below by nature: what was not seen may be worse,
    but at 95% fewer than 3 in `rows` rows are, were rows independent (the rule of three). A method that weighs keys anew
    keeps no part of a mass: there the three are None.
    """

    layer: int
    head: int
    mean: Interval | None
    p1: Interval | None
    worst: Interval | None
    error: Interval
    rows: int


@dataclass(frozen=True)
class Sample:
    """Values with the example that each is from, ready to be resampled by example: values [A] float64, example [A] int64."""

    values: Tensor
    example: Tensor
    examples: int

    def __post_init__(self) -> None:
        if self.values.numel() == 0:
            raise ValueError("There is nothing to measure: no example asks for an answer")
        if not bool(self.values.isfinite().all()):
            raise ValueError("What was measured is not finite: the model or the approximation gives NaN or infinities")


def _resampled(examples: int, seed: int) -> Tensor:
    """How often every example is in each resample, [DRAWS, examples] float64."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(examples, (DRAWS, examples), generator=g)
    once = torch.ones(1, dtype=torch.float64).expand_as(drawn)
    return torch.zeros(DRAWS, examples, dtype=torch.float64).scatter_add_(1, drawn, once)


def _ends(value: float, drawn: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return Interval(value, low, high, confidence)


def mean(s: Sample, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The mean over all values, resampled by example."""
    zero = torch.zeros(s.examples, dtype=torch.float64)
    total, number = zero.scatter_add(0, s.example, s.values), zero.scatter_add(0, s.example, torch.ones_like(s.values))
    often = _resampled(s.examples, seed)
    count = often @ number
    # a resample of nothing but examples that ask for nothing has no mean
    drawn = ((often @ total) / count)[count > 0]
    return _ends(float(s.values.mean()), drawn, confidence)


def quantile(s: Sample, q: float, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """The smallest value with at least a share q of all values at or below it; q = 0 is the minimum."""
    values, order = s.values.sort()
    example = s.example[order]
    number = torch.bincount(s.example, minlength=s.examples).double()
    often = _resampled(s.examples, seed)
    often = often[(often @ number) > 0]
    # weights are whole numbers: at least one, whatever the share
    reached = (q * (often @ number)).clamp(min=1.0) - 1e-6
    # resamples differ from the sample by little: of a low quantile the lowest values are enough, or else all are asked;
    # a few resamples at a time, since all at once are a thousand copies of the values
    for first in (int(4 * q * len(values)) + 64 * max(1, int(number.max())), len(values)):
        drawn = [
            _at(values[:first], often[i : i + AT_A_TIME, example[:first]].cumsum(1), reached[i : i + AT_A_TIME])
            for i in range(0, len(often), AT_A_TIME)
        ]
        if all(x is not None for x in drawn):
            break
    own = _at(values, torch.arange(1.0, len(values) + 1, dtype=torch.float64)[None], _least(q * len(values)))
    assert own is not None
    return _ends(float(own), torch.cat([x for x in drawn if x is not None]), confidence)


def _least(share: float) -> Tensor:
    return torch.tensor([max(1.0, share) - 1e-6], dtype=torch.float64)


def _at(values: Tensor, weight: Tensor, reached: Tensor) -> Tensor | None:
    """The sorted value at which each running weight [R, A] reaches [R]; None where one does not."""
    at = torch.searchsorted(weight, reached[:, None]).squeeze(1)
    return None if bool((at == len(values)).any()) else values[at]


def kept_mass(kept: Tensor, full: Tensor) -> Tensor:
    """r = exp(lse_kept - lse_full) in float64, of any shape; a row that keeps nothing has 0, one without keys 1."""
    kept, full = kept.double(), full.double()
    r = torch.where(full.isneginf(), torch.ones_like(full), (kept - full).exp())
    # rounding alone can lift a row above all of its mass
    return r.clamp(max=1.0)


def divergence(exact: Tensor, approximate: Tensor) -> Tensor:
    """KL(softmax(exact) ‖ softmax(approximate)) in nats over the last rank, float64, never below 0."""
    p, q = exact.double().log_softmax(-1), approximate.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def answer_quality(
    exact: Tensor, approximate: Tensor, labels: Tensor, *, nobody: int = -100, seed: int = 0
) -> AnswerQuality:
    """Logits [B, N, V] of the model with and without the approximation, labels [B, N] with `nobody` where nothing is asked.

    Raises ValueError in one sentence where shapes differ, nothing is asked, or a logit is not finite.
    """
    if exact.shape != approximate.shape or exact.shape[:-1] != labels.shape:
        shapes = f"Logits {tuple(exact.shape)} and {tuple(approximate.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"{shapes} do not belong together")
    asked = labels != nobody
    example = torch.arange(len(labels)).unsqueeze(-1).expand_as(labels)[asked]
    a, b, want = exact[asked], approximate[asked], labels[asked]
    first, second = a.argmax(-1), b.argmax(-1)

    def sample(values: Tensor, of: Tensor | None = None) -> Sample:
        chosen = slice(None) if of is None else of
        return Sample(values.double()[chosen], example[chosen], len(labels))

    was = first == want
    kl = sample(divergence(a, b))
    return AnswerQuality(
        accuracy=mean(sample(second == want), seed=seed), original=mean(sample(was), seed=seed),
        kept=mean(sample(second == want, was), seed=seed) if bool(was.any()) else Interval(1.0, 0.0, 1.0),
        agreement=mean(sample(first == second), seed=seed), kl=mean(kl, seed=seed), kl_p99=quantile(kl, 0.99, seed=seed),
        answers=len(want), examples=len(labels),
    )


def head_quality(
    layer: int, mass: Tensor | None, off: Tensor, size: Tensor, *, seed: int = 0
) -> tuple[HeadQuality, ...]:
    """Per head: kept mass [B, H, P] of rows (None: there is no such), squared norms off [B, H] of its error and size [B, H]
    of its exact part, both behind the output projection.

    The error is sqrt(Σ off / Σ size) over the examples: relative L2 of what the head adds to the layer's output.
    """
    b, heads = off.shape
    often = _resampled(b, seed)
    out = []
    for h in range(heads):
        above, below = off[:, h].double(), size[:, h].double()
        ratio = ((often @ above) / (often @ below)).sqrt()
        error = _ends(float((above.sum() / below.sum()).sqrt()), ratio, 0.95)
        if mass is None:
            out.append(HeadQuality(layer, h, None, None, None, error, 0))
            continue
        rows = mass.shape[-1]
        example = torch.arange(b).unsqueeze(-1).expand(b, rows).reshape(-1)
        s = Sample(mass[:, h].reshape(-1).double(), example, b)
        kept = mean(s, seed=seed), quantile(s, 0.01, seed=seed), quantile(s, 0.0, seed=seed)
        out.append(HeadQuality(layer, h, *kept, error, b * rows))
    return tuple(out)


