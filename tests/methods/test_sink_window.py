"""Sink and window, and through it what every static method rests on: the mask is put on, positions follow the model's bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reattend.patterns import expr as ex
from reattend.patterns.evaluate import evaluate
from reattend.patterns.methods import registry
from reattend.patterns.methods.masked import masked, nobody
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import M, P, dense, draw, kept, replaced, tiles, view
from tests.patterns.rules import late_keys, padded


@pytest.mark.parametrize(("n", "sink", "window", "pairs"), [(16, 4, 4, 100), (64, 4, 8, 702)])
def test_pairs_are_those_that_the_formula_says(n: int, sink: int, window: int, pairs: int) -> None:
    assert kept(replaced(SinkWindow(sink, window), view(P=n, M=n))).sum() == pairs


@pytest.mark.parametrize(("side", "visited", "causal"), [(64, 369, 2080), (128, 122, 528)])
def test_tiles_are_those_of_64_sinks_and_a_window_of_256(side: int, visited: int, causal: int) -> None:
    whole = view(P=4096, M=4096)
    assert tiles(replaced(SinkWindow(64, 256), whole), side)[0] == visited
    assert tiles(whole, side)[0] == causal


def test_a_window_over_all_is_the_model_itself() -> None:
    whole = view(P=24, M=24)
    assert (kept(replaced(SinkWindow(0, 24), whole)) == kept(whole)).all()


def test_rows_over_a_cache_are_the_last_rows_of_the_prompt() -> None:
    prompt, step = (kept(replaced(SinkWindow(2, 5), view(P=p, M=32))) for p in (32, 3))
    assert (step == prompt[:, -3:]).all()


def test_a_row_is_the_softmax_over_what_it_keeps() -> None:
    """Against plain torch; the dropped keys' share of the weight explains the rest: o − õ = (1 − r)(mean of the dropped − õ)."""
    whole = view(P=20, M=20)
    a, given = replaced(SinkWindow(2, 4), whole), draw(whole)
    out = evaluate(a.cascade, given, {"B": 1, "H": 2, "E": 8, "F": 8}, widen=True)["O"]
    q, k, v = (given[n].double() for n in "QKV")
    causal, keep = (torch.tensor(x) for x in (kept(whole), kept(a)))
    scores = q @ k.mT * 0.125
    expected = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v
    assert (out - expected).abs().max() < 1e-12
    full = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    r = full.masked_fill(~keep, 0).sum(-1, keepdim=True)
    dropped = full.masked_fill(keep, 0)
    mean = (dropped @ v) / dropped.sum(-1, keepdim=True).clamp(min=1e-300)
    assert (full @ v - out - (1 - r) * (mean - out)).abs().max() < 1e-12


def test_the_models_own_mask_wins() -> None:
    whole = view(padded, P=16, M=16)
    a = replaced(SinkWindow(2, 4), whole)
    given = draw(whole) | {"pad": (torch.arange(16) < 11)[None]}
    sizes = {"B": 1, "H": 2, "E": 8, "F": 8}
    other = {**given, "V": given["V"].clone()}
    other["V"][:, :, 11:] = 7.0
    first, second = (evaluate(a.cascade, x, sizes)["O"][:, :, :11] for x in (given, other))
    assert torch.equal(first, second)


def test_it_is_refused_where_nothing_is_causal() -> None:
    no = SinkWindow().replace(view(dense, P=16))
    assert isinstance(no, Refusal)
    assert "needs a causal attention" in no.reason


def test_a_row_rule_without_a_score_for_nobody_takes_no_mask() -> None:
    assert nobody(view(late_keys, P=16, M=16)) == float("-inf")

    def counting(b: Any, s: ex.Expr) -> Any:
        """Every key adds 1 to the sum, whatever its score."""
        w = b.put("W", "bhpm", ex.maximum(s, 0.0))
        return w / b.put("SD", "bhp", w + 1.0, "add", "m")

    a = view(rule=counting, P=16, M=16)
    assert nobody(a) is None
    no = masked(a, M < 3, "first three")
    assert isinstance(no, Refusal)
    assert "left out" in no.reason


@pytest.mark.parametrize("bad", [(-1, 4), (0, 0)])
def test_parameters_that_mean_nothing_are_named(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sink ≥ 0 and window ≥ 1"):
        SinkWindow(*bad)


def test_the_registry_lists_it_with_its_parameters_and_needs() -> None:
    facts = {m.name: m for m in registry.methods()}["sink-window"]
    assert (dict(facts.parameters), facts.needs, facts.make) == ({"sink": 4, "window": 1024}, ("a causal attention",), SinkWindow)
    assert "2309.17453" in facts.source
    assert registry.named("sink-window") == SinkWindow()
    assert registry.named("no-such") is None
    made = facts.make().replace(view(P=8, M=8))
    assert isinstance(made, Replacement)
    assert made.program is None


def test_positions_of_a_cache_that_is_data_are_read_there() -> None:
    def by_position(b: Any, qk: ex.Expr) -> ex.Expr:
        at = b.given("at", (b.extent("p"),), (P,), "i64")
        return ex.where(M <= at, qk * 0.125, float("-inf"))

    whole = view(by_position, P=2, M=16)
    a, given = replaced(SinkWindow(1, 3), whole), draw(whole) | {"at": torch.tensor([8, 9])}
    sizes = {"B": 1, "H": 2, "E": 8, "F": 8}
    out = evaluate(a.cascade, given, sizes, widen=True)["O"]
    q, k, v = (given[n].double() for n in "QKV")
    at = np.array([[8], [9]])
    keep = torch.tensor((np.arange(16) <= at) & ((np.arange(16) < 1) | (at - np.arange(16) < 3)))
    expected = (q @ k.mT * 0.125).masked_fill(~keep, -torch.inf).softmax(-1) @ v
    assert (out - expected).abs().max() < 1e-12
