"""Quality of an approximation: numbers that can be worked out by hand, and what means hide."""

from __future__ import annotations

import math

import pytest
import torch

from reattend.rewriter.approximate import quality
from reattend.rewriter.approximate.quality import Sample


def logits_of(chosen: list[list[int]], words: int = 4, sure: float = 8.0) -> torch.Tensor:
    return sure * torch.nn.functional.one_hot(torch.tensor(chosen), words).double()


def test_answers_by_hand() -> None:
    """Two examples of three positions, the last not asked; one right answer is lost, one wrong choice stays."""
    labels = torch.tensor([[1, 2, -100], [3, 0, -100]])
    exact, other = logits_of([[1, 2, 0], [3, 1, 0]]), logits_of([[1, 0, 3], [3, 1, 0]])
    q = quality.answer_quality(exact, other, labels)
    assert (q.answers, q.examples) == (4, 2)
    assert [x.value for x in (q.original, q.accuracy, q.kept, q.agreement)] == [0.75, 0.5, pytest.approx(2 / 3), 0.75]
    # the one that moved: KL of two one-hot-like rows of four is (p - r) · 8
    p, r = math.exp(8) / (math.exp(8) + 3), 1 / (math.exp(8) + 3)
    assert q.kl_p99.value == pytest.approx((p - r) * 8)
    assert q.kl.value == pytest.approx((p - r) * 8 / 4)
    assert q.kl.low == 0.0
    assert q.kl.high == pytest.approx((p - r) * 8 / 2)


def test_equal_logits_lose_nothing() -> None:
    x = torch.randn(3, 5, 7)
    q = quality.answer_quality(x, x.clone(), x.argmax(-1))
    assert q.accuracy.value == q.agreement.value == q.kept.value == 1.0
    assert q.kl_p99.value == 0.0


def test_a_mean_hides_the_row_that_is_lost() -> None:
    """95 rows keep everything, five a thousandth: mean 0.95, first percentile and minimum 0.001."""
    mass = torch.ones(1, 1, 100)
    mass[..., -5:] = 1e-3
    (h,) = quality.head_quality(3, mass, torch.tensor([[1.0]]), torch.tensor([[4.0]]))
    assert (h.layer, h.head, h.rows) == (3, 0, 100)
    assert h.mean is not None
    assert h.p1 is not None
    assert h.worst is not None
    assert h.mean.value == pytest.approx(0.95, abs=1e-3)
    assert h.p1.value == h.worst.value == pytest.approx(1e-3)
    assert h.error.value == 0.5


def test_kept_mass_from_two_log_sums() -> None:
    """Scores 0, log 3 and none: without the second a quarter is kept; a row that keeps nothing has 0, one without keys 1."""
    full = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0], [-math.inf, -math.inf]]).logsumexp(-1)
    kept = torch.tensor([0.0, -math.inf, -math.inf])
    assert quality.kept_mass(kept, full).tolist() == pytest.approx([0.25, 0.0, 1.0])


def test_the_interval_of_a_mean_is_that_of_its_examples() -> None:
    """64 examples of one value each, half 0 and half 1: the standard error is 0.5 / 8, so 95% are ± 0.1225. Each value ten
    times in its example changes nothing: rows of one example say one thing."""
    values = torch.arange(64).remainder(2).double()
    once = quality.mean(Sample(values, torch.arange(64), 64))
    often = quality.mean(Sample(values.repeat_interleave(10), torch.arange(64).repeat_interleave(10), 64))
    assert (once.low, once.high) == (often.low, often.high)
    assert once.value == 0.5
    assert once.high - once.low == pytest.approx(2 * 0.1225, rel=0.15)


@pytest.mark.parametrize(("q", "want"), [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_quantiles_are_values_that_were_seen(q: float, want: float) -> None:
    values = torch.arange(100, 0, -1).double()
    assert quality.quantile(Sample(values, torch.arange(100), 100), q).value == want


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.99])
def test_quantiles_of_resamples_by_brute_force(q: float) -> None:
    """Each resample written out, value by value; examples differ in size and in kind."""
    g = torch.Generator().manual_seed(1)
    example = torch.arange(12).repeat_interleave(torch.arange(1, 13))
    values = torch.randn(len(example), generator=g, dtype=torch.float64) + example
    found = quality.quantile(Sample(values, example, 12), q)
    often = quality._resampled(12, 0).long()
    want = []
    for draw in often:
        written = values.repeat_interleave(draw[example]).sort().values
        want.append(written[max(0, math.ceil(q * len(written) - 1e-9) - 1)])
    low, high = torch.quantile(torch.stack(want), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == (low, high)


def test_the_same_seed_gives_the_same_interval() -> None:
    s = Sample(torch.rand(50, dtype=torch.float64), torch.arange(50), 50)
    assert quality.quantile(s, 0.9, seed=3) == quality.quantile(s, 0.9, seed=3)
    assert quality.mean(s, seed=3) != quality.mean(s, seed=4)


def test_what_cannot_be_measured_is_said() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="no example asks"):
        quality.answer_quality(x, x, torch.full((2, 3), -100))
    with pytest.raises(ValueError, match="not finite"):
        quality.answer_quality(x, x * math.nan, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="do not belong together"):
        quality.answer_quality(x, x[:1], torch.zeros(2, 3, dtype=torch.long))
