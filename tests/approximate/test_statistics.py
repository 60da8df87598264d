"""Calibrations that are kept, broken off and gone on with; the trade-off that they drew; what becomes of answers."""

from __future__ import annotations

import math
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.cost_model.report.trade_off import TradeOff, svg
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.rewriter.approximate import calibrate as module
from reattend.rewriter.approximate.calibrate import calibrate
from reattend.rewriter.approximate.data import CalibrationError
from reattend.rewriter.approximate.logits import answers, logits_of
from reattend.rewriter.approximate.record import Recorder
from tests.approximate.test_calibrate import NARROW, Two, data, policy

WIDE = SinkWindow(4, 128)


def two() -> Two:
    torch.manual_seed(0)
    return Two().eval()


def asked(**more: Any) -> reattend.Policy:
    return policy(methods=(NARROW, WIDE), max_error=0.05, **more)


@pytest.mark.slow
def test_a_calibration_that_was_broken_off_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(two(), asked())
    keep = str(tmp_path)
    seen = Recorder._seen
    count = 0

    def third(self: Recorder, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        return seen(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_seen", third)
        with pytest.raises(KeyboardInterrupt):
            calibrate(two(), asked(keep=keep))
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["example-0.npz"]
    first = calibrate(two(), asked(keep=keep))
    assert (first.chosen, first.whole, first.errors) == (whole.chosen, whole.whole, whole.errors)

    def none(self: Recorder, *args: Any) -> Any:
        raise AssertionError("it is measured again")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_seen", none)
        patch.setattr(module, "_differs", none)
        again = calibrate(two(), asked(keep=keep))
    assert (again.chosen, again.whole, again.errors, again.curve) == (first.chosen, first.whole, first.errors, first.curve)
    assert {p.name for p in folder.iterdir()} == {*(f"example-{i}.npz" for i in range(4)), "whole.json"}


@pytest.mark.slow
def test_another_model_other_data_and_other_methods_are_measured_for_themselves(tmp_path: Path) -> None:
    keep = str(tmp_path)
    calibrate(two(), asked(keep=keep))
    torch.manual_seed(1)
    calibrate(Two().eval(), asked(keep=keep))
    calibrate(two(), asked(keep=keep, calibration=data(256)))
    calibrate(two(), policy(keep=keep))
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_damaged_is_measured_again_and_a_file_is_no_folder(tmp_path: Path) -> None:
    keep = str(tmp_path / "kept")
    first = calibrate(two(), asked(keep=keep))
    (folder,) = Path(keep).iterdir()
    (folder / "example-1.npz").write_bytes(b"no numbers")
    (folder / "whole.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="measured again"):
        again = calibrate(two(), asked(keep=keep))
    assert (again.chosen, again.whole, again.errors) == (first.chosen, first.whole, first.errors)
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="statistics cannot be kept in"):
        calibrate(two(), asked(keep=str(tmp_path / "file")))
    with pytest.raises(ValueError, match=r"Policy\(keep\) needs approximate=True"):
        reattend.Policy(keep=keep)


def test_the_report_has_the_trade_off_as_numbers_and_as_a_picture() -> None:
    model = reattend.optimize(two(), policy=asked())
    report = reattend.report(model)
    (installed,) = {p for p in report.trade_off if p.installed}
    assert installed.error <= 0.05 == report.max_error
    assert installed.measured is not None
    assert all(p.saved > 0 and p.attentions in (1, 2) for p in report.trade_off)
    drawn = xml.fromstring(report.trade_off_svg())
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f".//{space}circle")) == sum(1 + (p.measured is not None) for p in report.trade_off)
    said = [t.text or "" for t in drawn.findall(f".//{space}title")]
    assert any("held out, predicted to save" in s for s in said)
    reattend.restore(model)
    with pytest.raises(ValueError, match="nothing was tried"):
        reattend.report(model).trade_off_svg()


def test_a_point_lies_where_its_error_and_its_seconds_say() -> None:
    """Errors of 0 and of infinity are drawn at the ends, and a loss of time left of 0."""
    points = [TradeOff(1, 1e-3, None, 0.1), TradeOff(2, 2e-3, -1e-3, 1e-3), TradeOff(1, 1e-3, None, math.inf), TradeOff(1, 0.0, None, 0.0)]
    drawn = xml.fromstring(svg(points, 0.01))
    at = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    first, measured, second, endless, nothing = at
    assert measured[0] < nothing[0] < first[0] < second[0]
    assert endless[1] <= first[1] < second[1] < nothing[1]
    assert "-1.00 ms" in str(points[1]) or "-1 ms" in str(points[1])


# --- answers --------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(23, 16), Two(), nn.Linear(16, 23)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embed(ids)))
        return out


def test_answers_of_a_language_model_stand_in_the_report() -> None:
    torch.manual_seed(0)
    model, g = Language().eval(), torch.Generator().manual_seed(0)
    ids = [torch.randint(23, (1, 512), generator=g) for _ in range(4)]
    exact = [model(x).detach() for x in ids[1::2]]
    reattend.optimize(model, policy=policy(calibration=ids, max_error=0.5))
    said = str(reattend.report(model))
    with torch.no_grad():
        made = [model(x) for x in ids[1::2]]
    kl = torch.cat([(a.double().softmax(-1) * (a.double().log_softmax(-1) - b.double().log_softmax(-1))).sum(-1).flatten()
                    for a, b in zip(exact, made)])
    assert f"answers on examples held out, 1024 tokens: KL {kl.mean():.3g}" in said
    same = float(torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(exact, made)]).double().mean())
    assert f"the first choice is the model's in {same:.3g}" in said


def test_only_what_is_known_to_be_logits_is_taken_for_them() -> None:
    model, x = nn.Sequential(nn.Embedding(7, 5)), torch.zeros(1, 2, 7)
    assert logits_of(model, x) is x
    assert logits_of(model, {"logits": x, "other": x[..., :3]}) is x
    assert logits_of(model, torch.zeros(1, 2, 6)) is None
    assert logits_of(model, (x, x)) is None
    assert logits_of(nn.Linear(2, 7), x) is None
    assert "are not finite" in answers([x], [x + math.nan])
    assert "KL 0 [0, 0] nats" in answers([x, x], [x, x])
