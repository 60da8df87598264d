"""Some rows of a method's attention, and the weight that they keep, against the whole."""

from __future__ import annotations

import torch

from reattend.patterns.evaluate import evaluate
from reattend.patterns.methods.rows import ALL, KEPT, ROWS, kept_share, some_rows
from reattend.patterns.methods.static.sink_window import SinkWindow
from tests.methods.attentions import draw, kept, replaced, view

SIZES = {"B": 1, "H": 2, "E": 8, "F": 8}


def test_some_rows_are_those_of_the_whole_and_keep_what_the_mask_says() -> None:
    whole = view(P=20, M=20)
    a, given = replaced(SinkWindow(2, 4), whole), draw(whole)
    rows = torch.tensor([3, 19, 7])
    out = evaluate(a.cascade, given, SIZES, widen=True)["O"]
    some = evaluate(some_rows(a), {**given, ROWS: rows}, SIZES, widen=True)["O"]
    assert torch.equal(some, out[:, :, rows])
    scores = given["Q"].double() @ given["K"].double().mT * 0.125
    weights = scores.masked_fill(~torch.tensor(kept(whole)), -torch.inf).softmax(-1)
    expected = weights.masked_fill(~torch.tensor(kept(a)), 0).sum(-1)[:, :, rows]
    made = evaluate(kept_share(whole, a), {**given, ROWS: rows}, SIZES, widen=True)
    assert (made[KEPT] / made[ALL] - expected).abs().max() < 1e-12
    assert 0.0 < expected.min() < 0.7
