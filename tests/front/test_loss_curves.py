"""A small GPT is trained as it is written and with our kernels: the loss curves are as near to float64 as each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import loading

# Of the distance of the curve as written, which rounding alone makes; and what lies below the last digit of a loss.
MOST = 2.0
DIGIT = 1e-6
# By then the loss has fallen by a third.
STEPS = 60


@pytest.mark.slow
def test_loss_curves_over_steps_in_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; `benchmarks/losses.py` has 200 steps and bfloat16 as well, which take minutes on a CPU."""
    # benchmarks find one another beside themselves
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    losses = loading.benchmark("losses")
    exact, own, ours, report = losses.curves("f32", STEPS)
    assert set(report.kernels) == {"reattend"}, report
    assert report.kernels["reattend"] >= 2 * STEPS
    assert report.fallbacks == 0
    assert exact.losses[-10:].mean() < 0.7 * exact.losses[:10].mean()
    (rms, most), (own_rms, own_most) = ours.off(exact), own.off(exact)
    assert rms <= MOST * own_rms + DIGIT, (rms, own_rms)
    assert most <= MOST * MOST * own_most + DIGIT, (most, own_most)
