"""The laboratory: tasks with their known answers, trainings that go on where they were, and what a window of keys loses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import reattend
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog
from reattend.patterns.methods.static.sink_window import SinkWindow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules by name."""
    # benchmarks find one another beside themselves
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parts = ("tasks", "models", "training", "selections", "laws", "attend", "rows", "page", "minilm", "budgets", "by_head")
    return SimpleNamespace(**{n: importlib.import_module(f"laboratory.{n}") for n in parts})


@pytest.mark.parametrize("task", ["recall", "needle"])
def test_every_key_is_asked_once_and_its_value_is_the_answer(lab: Any, task: str) -> None:
    size = lab.tasks.Size(64, 8)
    batch = lab.tasks.TASKS[task].batch(size, 16, 5)
    for words, labels in zip(batch.words.tolist(), batch.labels.tolist()):
        asked = [i for i, y in enumerate(labels) if y != lab.tasks.NOBODY]
        assert len({words[i] for i in asked}) == 8
        for i in asked:
            (first,) = [j for j, w in enumerate(words) if w == words[i] and j != i]
            assert first < i
            assert words[first + 1] == labels[i]
    if task == "recall":
        # gaps are of power law: half of the keys are asked among the first slots, at 2D + 2 · gap
        assert batch.labels[:, 16:24].ne(lab.tasks.NOBODY).sum() > 2 * batch.labels[:, 48:56].ne(lab.tasks.NOBODY).sum()
    else:
        assert batch.labels[:, :48].eq(lab.tasks.NOBODY).all()


def test_held_out_text_is_never_trained_on(lab: Any) -> None:
    train, held = lab.tasks.characters()
    assert len(held) > 5_000
    piece = held[: 64].tolist()
    whole = train.unfold(0, 64, 1)
    assert not bool((whole == torch.tensor(piece)).all(-1).any())
    batch = lab.tasks.TASKS["text"].batch(lab.tasks.Size(32), 4, 0)
    assert batch.words[:, 1:].equal(batch.labels[:, :-1])


def test_what_cannot_be_drawn_is_said(lab: Any) -> None:
    with pytest.raises(ValueError, match="at least 32 tokens and 8 keys, given 30 and 96"):
        lab.tasks.TASKS["recall"].batch(lab.tasks.Size(30, 8), 1, 0)


def recipe(lab: Any) -> Any:
    shape, size = lab.models.Shape(lab.tasks.WORDS, width=16, heads=2, layers=1), lab.tasks.Size(16, 2)
    return lab.training.Recipe("tiny", shape, (("recall", size, 4), ("needle", size, 4)), steps=6)


def test_a_training_that_was_cut_off_ends_where_it_would_have(lab: Any, tmp_path: Path) -> None:
    """Parameters are equal bit by bit; what is kept is read, not trained again; no pickle is written."""
    whole = lab.training.trained(recipe(lab), tmp_path / "whole")
    lab.training.trained(recipe(lab), tmp_path / "cut", until=3)
    cut = lab.training.trained(recipe(lab), tmp_path / "cut")
    again = lab.training.trained(recipe(lab), tmp_path / "cut")
    for a, b, c in zip(whole.parameters(), cut.parameters(), again.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    (kept,) = (tmp_path / "cut").iterdir()
    assert kept.suffix == ".safetensors"


def planted(n: int = 256, width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal, one head: the last query asks for the key at 40, everyone else for the key before it."""
    g = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 1, n, width, generator=g), dim=-1)
    q = 40 * k.roll(1, -2)
    q[:, :, -1] = 40 * k[:, :, 40]
    return q, k, torch.randn(1, 1, n, width, generator=g)


def test_a_window_loses_the_needle_and_a_test_of_every_score_keeps_it(lab: Any) -> None:
    """At a quarter of the tiles; the mean of what all rows keep does not tell."""
    q, k, v = planted()
    allowed = torch.ones(256, 256, dtype=torch.bool).tril()
    last, mean = {}, {}
    for kind in lab.selections.SELECTIONS:
        made = lab.attend.attended(q, k, v, allowed, 1.0, kind(0.25))
        most = lab.selections.best(torch.zeros(1, 1, 32, 32), 0.25, allowed).sum()
        assert lab.selections.by_tile(made.keep).sum() <= most
        last[kind.__name__], mean[kind.__name__] = float(made.mass[0, 0, -1]), float(made.mass.mean())
    assert last["SinkAndWindow"] < 1e-3
    assert mean["SinkAndWindow"] > 0.9
    assert last["LargestScore"] > 0.99
    assert last["Oracle"] > 0.99


@pytest.mark.parametrize(("n", "sink", "window", "want"), [(16, 4, 4, 100), (64, 4, 8, 702), (8192, 4, 1024, 7_893_498)])
def test_pairs_of_a_sink_and_a_window(lab: Any, n: int, sink: int, window: int, want: int) -> None:
    assert lab.budgets.pairs(n, sink, window) == want
    assert lab.budgets.window_for(n, want / (n * (n + 1) / 2), sink) == window


def test_each_method_has_a_budget_or_says_what_it_needs(lab: Any) -> None:
    made = {m.name: lab.budgets.at_defaults(m) for m in reattend.methods()}
    assert "no default for frames, tokens" in made["radial"]
    assert str(made["moba"]) == "moba(count=3, block=512, rows=1)"


def test_rows_keep_the_same_number_of_tiles_within_the_share(lab: Any) -> None:
    """64 rows of tiles, causal: eight a row are 484 of 2080, nine would be 540 and more than a quarter."""
    valid = torch.arange(1, 65)
    assert lab.selections.count(valid, 0.25) == 8
    assert lab.selections.count(valid, 1.0) == 64
    assert lab.selections.count(valid, 0.0) == 2


def test_the_full_budget_is_dense_and_the_model_s_own_mask_wins(lab: Any) -> None:
    q, k, v = planted(64)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    for kind in lab.selections.SELECTIONS:
        made = lab.attend.attended(q, k, v, allowed, 1.0, kind(1.0))
        torch.testing.assert_close(made.out, want)
        assert made.keep[0, 0].equal(allowed)
        assert made.mass.min() == 1.0


def test_a_method_of_the_package_is_its_own_cascade(lab: Any) -> None:
    """Sink and window by its law keeps what its formula says; a Taylor row keeps no part of a softmax's mass."""
    q, k, v = planted(64)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    p, m = torch.arange(64)[:, None], torch.arange(64)
    keep = (m <= p) & ((m < 2) | (p - m < 5))
    made = lab.attend.attended(q, k, v, allowed, 1.0, lab.laws.Law(SinkWindow(2, 5)))
    assert made.keep[0, 0].equal(keep)
    scores = q @ k.mT
    torch.testing.assert_close(made.out, scores.masked_fill(~keep, float("-inf")).softmax(-1) @ v)
    exact = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    torch.testing.assert_close(made.mass.float(), exact.masked_fill(~keep, 0).sum(-1))
    assert lab.attend.attended(q, k, v, allowed, 1.0, lab.laws.Law(TaylorWindow(4))).keep is None
    with pytest.raises(lab.laws.Refused, match="give their file as maps"):
        lab.attend.attended(q, k, v, allowed, 1.0, lab.laws.Law(Hedgehog()))


def test_heads_have_laws_of_their_own(lab: Any) -> None:
    q, k, v = (torch.cat([x, x.flip(-1)], 1) for x in planted(64))
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    law = lab.laws.Law(SinkWindow(2, 5))
    under = lab.by_head.ByHead([[None, law]], 0.5, "by head")
    made = lab.attend.attended(q, k, v, allowed, 1.0, under)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(made.out[:, :1], exact[:, :1])
    torch.testing.assert_close(made.out[:, 1:], lab.attend.attended(q[:, 1:], k[:, 1:], v[:, 1:], allowed, 1.0, law).out)
    assert made.keep[0, 0].equal(allowed)
    assert int(made.keep[0, 1].sum()) == lab.budgets.pairs(64, 2, 5)


def test_levels_go_down_where_that_costs_least(lab: Any) -> None:
    """Of two heads one is worth ten times the other; at half of the pairs the cheap one is at nothing."""

    def cost(levels: Any) -> Any:
        (a, b), worth = levels[0], 10.0
        return lab.by_head.Cost(worth * (4 - a) + (4 - b), (a + b) / 8)

    assert lab.by_head.search(1, 2, 4, cost, 0.5) == [[4, 0]]
    assert lab.by_head.search(1, 2, 4, cost, 0.4) == [[3, 0]]
    assert lab.by_head.search(1, 2, 4, cost, 1.0) == [[4, 4]]
    # what saves nothing is not gone down to
    assert lab.by_head.search(1, 2, 4, lambda levels: lab.by_head.Cost(0.0, 1.0), 0.5) == [[4, 4]]


def test_rows_have_what_a_head_lost_behind_its_projection(lab: Any) -> None:
    """Worked out once more: error of a head = ‖(o - õ) W_h‖ / ‖o W_h‖, of the first layer, whose input nothing changed."""
    torch.manual_seed(0)
    model = lab.models.Model(lab.models.Shape(lab.tasks.WORDS, width=16, heads=2, layers=2)).eval()
    size = lab.tasks.Size(128, 8)
    batch = lab.tasks.TASKS["needle"].batch(size, 3, 0)
    exact = lab.rows.logits(model, batch)
    row = lab.rows.measured(model, "random", "needle", size, lab.selections.SinkAndWindow(0.25), exact, batch)
    assert [(h.layer, h.head) for h in row.heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    attention, x = model.blocks[0].attention, model.blocks[0].before(model.words(batch.words))
    x = x + attention.near(x.transpose(1, 2))[..., :128].transpose(1, 2)
    q, k, v = (t.view(3, 128, 2, 8).transpose(1, 2) for t in attention.qkv(x).chunk(3, -1))
    q, k = lab.models.rotated(q, 1e4), lab.models.rotated(k, 1e4)
    allowed = torch.ones(128, 128, dtype=torch.bool).tril()
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    other = lab.attend.attended(q, k, v, allowed, 8**-0.5, lab.selections.SinkAndWindow(0.25)).out
    for h in range(2):
        w = attention.out.weight[:, h * 8 : h * 8 + 8]
        want = ((o - other)[:, h] @ w.T).norm() / (o[:, h] @ w.T).norm()
        assert row.heads[h].error.value == pytest.approx(want.item(), rel=1e-5)
    assert row.answers.kl.value > 0
    full = lab.rows.measured(model, "random", "needle", size, lab.selections.Oracle(1.0), exact, batch)
    assert full.answers.kl_p99.value < 1e-9
    assert full.density == full.tiles == 1.0
    as_json = json.loads(json.dumps([row.as_json(), full.as_json()]))
    text = lab.page.page(as_json, "about")
    assert text.count("<polyline") == 2 * 2
    assert "SinkAndWindow(0.25)" in lab.page.markdown(as_json)


def test_weights_that_are_absent_are_one_sentence(
    lab: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = importlib.import_module("quality")
    monkeypatch.setattr(lab.minilm, "PACKAGE", "no_such_package_of_weights")
    assert list(quality.rows_of("minilm", ["passages"], [0.25], 4, Path("nowhere"), lambda family: True)) == []
    assert capsys.readouterr().out.strip() == lab.minilm.ABSENT


def test_the_continuation_that_is_nearest_is_the_answer(lab: Any) -> None:
    queries, continuations = torch.eye(3)[:, None], torch.eye(3)[[0, 2, 1]][:, None]
    logits = lab.minilm.similarities(torch.cat([queries, continuations]))
    assert logits.shape == (3, 1, 3)
    assert logits.argmax(-1).flatten().tolist() == [0, 2, 1]
    assert logits.max() == lab.minilm.SHARP


def test_the_committed_table_is_that_of_the_committed_rows(lab: Any) -> None:
    rows = json.loads((ROOT / "benchmarks/results/quality_cpu.json").read_text(encoding="utf-8"))["rows"]
    document = (ROOT / "docs/laboratory.md").read_text(encoding="utf-8")
    assert lab.page.markdown(rows) in document, "python benchmarks/quality.py --table docs/laboratory.md"


def test_on_the_committed_rows_a_window_does_not_keep_recall_and_a_selection_does(lab: Any) -> None:
    """What the laboratory is for, as it was measured: at a quarter of the tiles, on data held out."""
    rows = json.loads((ROOT / "benchmarks/results/quality_cpu.json").read_text(encoding="utf-8"))["rows"]
    for task in ("recall", "needle"):
        at = {r["method"]: r for r in rows if r["task"] == task and r["budget"] == 0.25}
        assert at["SinkAndWindow(0.25)"]["answers"]["kept"]["high"] < 0.9
        assert at["SinkAndWindow(0.25)"]["answers"]["kl_p99"]["value"] > 1.0
        assert at["Oracle(0.25)"]["answers"]["kept"]["value"] > 0.99
