"""A small GPT is trained as it is written and with our kernels: the loss curves are as near to float64 as each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import loading

# Of the distance of the curve as written, which rounding alone makes; and what lies below the last digit of a loss.
MOST = 2.0
DIGIT = {"f32": 1e-6, "bf16": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_loss_curves_over_200_steps_in_checkpoints(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # benchmarks find one another beside themselves
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    losses = loading.benchmark("losses")
    exact, own, ours, report = losses.curves(dtype, 200)
    assert set(report.kernels) == {"reattend"}, report
    assert report.kernels["reattend"] >= 2 * 200
    assert report.fallbacks == 0
    assert exact.losses[-10:].mean() < 0.7 * exact.losses[:10].mean()
    (rms, most), (own_rms, own_most) = ours.off(exact), own.off(exact)
    assert rms <= MOST * own_rms + DIGIT[dtype], (rms, own_rms)
    assert most <= MOST * MOST * own_most + DIGIT[dtype], (most, own_most)
