"""The audit: rows that keep what was measured are left alone, rows that do not end the method at its site."""

from __future__ import annotations

import pytest
import torch

import reattend
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.rewriter.check.audit import Audit, tail
from tests.approximate.test_calibrate import NARROW, Two, data, policy
from tests.methods.attentions import draw, replaced, view

SIZES = {"B": 1, "H": 2, "E": 8, "F": 8}


def test_the_tail_is_the_binomials() -> None:
    assert tail(0, 10, 0.01) == 1.0
    assert tail(1, 10, 0.01) == pytest.approx(1 - 0.99**10)
    assert tail(10, 10, 0.5) == pytest.approx(2.0**-10)


def test_rows_that_keep_as_much_as_was_measured_break_nothing_and_others_do() -> None:
    whole = view(P=64, M=64)
    a, given = replaced(SinkWindow(2, 8), whole), draw(whole)
    fair, strict = Audit(whole, a, least=0.0), Audit(whole, a, least=0.99)
    assert [fair.look(call, given, SIZES) for call in range(3)] == [""] * 3
    assert (fair.looked, fair.below) == (96, 0)
    why = strict.look(0, given, SIZES)
    assert "keep less of their weight than the 0.9900" in why


@pytest.mark.slow
def test_where_no_audit_can_be_made_the_model_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> str:
        raise MemoryError("no memory")

    torch.manual_seed(0)
    model = Two().eval()
    reattend.optimize(model, policy=policy(check=3))
    monkeypatch.setattr(Audit, "look", look)
    with torch.no_grad(), pytest.warns(UserWarning, match="it cannot be audited: MemoryError: no memory"):
        [model(x) for x in data()]
    report = reattend.report(model)
    assert report.fallbacks > 0
    assert any(c.verdict == "unchecked" for c in report.checks)


def test_inputs_unlike_the_calibration_end_the_method_and_the_report_says_so() -> None:
    """A channel that grows with the position backwards makes a layer that looks near by look everywhere alike."""
    torch.manual_seed(0)
    model = Two().eval()
    with torch.no_grad():
        # scores get the first channel of the key
        model.near.qkv.bias[0], model.near.qkv.bias[16] = 1.0, 0.0
        model.near.qkv.weight[16] = 0.0
        model.near.qkv.weight[16, 0] = 1.0
    reattend.optimize(model, policy=policy(check=3))
    with torch.no_grad():
        for x in data():
            model(x)
        assert reattend.report(model).fallbacks == 0
        # undoes the slope: rows see all that lies before
        far = torch.randn(1, 512, 16)
        far[..., 0] = -1.0 * torch.arange(512)
        with pytest.warns(UserWarning, match="calibrate on data that is like these inputs"):
            out = [model(far) for _ in range(6)][-1]
    report = reattend.report(model)
    assert report.fallbacks > 0
    assert any(c.verdict == "differs" and c.how.startswith("audit") and c.kernel == str(NARROW) for c in report.checks)
    reattend.restore(model)
    with torch.no_grad():
        assert torch.allclose(out, model(far), rtol=1e-4, atol=1e-4)
