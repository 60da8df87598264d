"""Methods that choose tiles by queries and keys: their formulas in float64, a full budget, needles, and what each one loses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reattend.patterns import expr as ex
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library.papers import Builder
from reattend.patterns.methods import registry
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.selected.delta import DELTA, roles
from reattend.patterns.methods.selected.flexprefill import FlexPrefill
from reattend.patterns.methods.selected.moba import MoBA
from reattend.patterns.methods.selected.seer_attention import SeerAttention
from reattend.patterns.methods.selected.xattention import XAttention
from reattend.patterns.methods.selecting import steps as st
from reattend.patterns.methods.selecting.program import SelectedMethod
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import causal as causal_score
from tests.methods.attentions import dense, view
from tests.methods.tables import codes, cut, flat, pairs, recall, run, table_of
from tests.patterns.rules import padded

SCALE = 0.125


def gate(heads: int, depth: int, pools: int, rank: int = 0) -> tuple[st.Learned, st.Learned]:
    """Maps that keep a row as it is; of the keys, the last pool."""
    eye = torch.eye(depth, rank or depth)
    keys = torch.zeros(pools * depth, rank or depth)
    keys[-depth:] = eye
    return st.Learned.of(eye.expand(heads, -1, -1)), st.Learned.of(keys.expand(heads, -1, -1))


FULL = [
    FlexPrefill(mass=1.0, block=16), XAttention(mass=1.0, stride=4, block=16), MoBA(count=99, block=16),
    MoBA(count=99, block=16, rows=16), SeerAttention(*gate(2, 8, 3), threshold=0.0, block=16),
]


@pytest.mark.parametrize("method", FULL, ids=lambda m: m.name)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (80, 80), (83, 83), (7, 83)])
def test_a_full_budget_is_dense(method: SelectedMethod, queries: int, keys: int) -> None:
    """R6: the table is the whole mask, for one tile, a ragged end, and rows over a cache."""
    a = view(P=queries, M=keys)
    made = method.replace(a)
    assert isinstance(made, Replacement)
    assert made.program is not None
    q, k = flat(2, queries, 8) * 40, flat(2, keys, 8, 1) * 40
    table = made.program.run(torch, {"Q": q, "K": k}, {})
    step = method.selection(a)
    assert isinstance(step, st.CellTable)
    assert torch.equal(table, run(q, k).table(st.Everything(step)))
    given = {"Q": q, "K": k, "V": flat(2, keys, 8, 2), made.table: table}
    sizes = {"B": 1, "H": 2, "E": 8, "F": 8}
    whole = evaluate(a.cascade, {n: given[n] for n in "QKV"}, sizes, widen=True)["O"]
    assert (evaluate(made.cascade, given, sizes, widen=True)["O"] - whole).abs().max() < 1e-12


# --- FlexPrefill --------------------------------------------------------------------------------------------------


def flexprefill_written_out(q: Tensor, k: Tensor, mass: float, near: float, block: int, least: int, scale: float) -> Tensor:
    """The method's formulas for one head and whole blocks, in float64, with loops."""
    n, b = len(q), block
    s = (q.double() @ k.double().T) * scale
    p, m = torch.arange(n)[:, None], torch.arange(n)[None]
    last = s.masked_fill(m > p, -torch.inf).softmax(-1)[-b:]
    tiles = n // b
    true = cut(last, 1, (tiles, b)).sum(-1).mean(0)
    means = [cut(x.double(), 0, (tiles, b)).mean(1) for x in (q, k)]
    estimate = ((means[0][-1] @ means[1].T) * scale).softmax(-1)
    middle = (true + estimate) / 2
    js = sum(float((x * (x / middle).log())[x > 0].sum()) for x in (true, estimate)) / 2
    out = torch.zeros(tiles, tiles, dtype=torch.bool)
    if math.sqrt(js) < near:
        pooled = (means[0] @ means[1].T * scale).masked_fill(torch.ones(tiles, tiles).triu(1).bool(), -torch.inf).softmax(-1)
        total = 0.0
        for i in pooled.flatten().argsort(descending=True).tolist():
            if total >= mass * tiles:
                break
            out[i // tiles, i % tiles] = True
            total += float(pooled.flatten()[i])
    else:
        columns = last.mean(0)
        offsets = torch.stack([last[(p - m)[-b:] == o].sum() for o in range(n)])
        for values, mark in ((columns, "column"), (offsets, "offset")):
            total, count = 0.0, 0
            for i in values.argsort(descending=True).tolist():
                if total >= mass * float(values.sum()) and count >= least:
                    break
                total, count = total + float(values[i]), count + 1
                hit = (m == i).expand(n, n) if mark == "column" else (p - m) == i
                out |= cut(cut(hit, 0, (tiles, b)), 2, (tiles, b)).any(3).any(1)
    out |= torch.eye(tiles, dtype=torch.bool)
    out[:, 0] = True
    return out.tril()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("near", [0.0, 0.9])
def test_flexprefill_is_its_formulas(seed: int, near: float) -> None:
    """Both ways of a head: 0 takes columns and slashes always, 0.9 lies beyond the greatest distance."""
    q, k = flat(2, 96, 8, seed) * 60, flat(2, 96, 8, seed + 9) * 60
    found = table_of(FlexPrefill(mass=0.7, distance=near, block=16, least=2), q, k)
    for h in range(2):
        assert torch.equal(found[0, h], flexprefill_written_out(q[0, h], k[0, h], 0.7, near, 16, 2, SCALE)), h


def test_flexprefill_finds_one_column_and_one_slash() -> None:
    """Half of each row's weight on one key, half on one offset: their tiles, the diagonal and the first column, no other."""
    n, block, column, offset = 128, 16, 37, 50
    p, tiles = torch.arange(n), n // block
    x = codes(n, 64)
    k = torch.cat([x, (p == column)[:, None].float() * 20], 1)[None, None]
    q = torch.cat([x[(p - offset).clamp(0)] * 20, torch.ones(n, 1)], 1)[None, None] / SCALE
    found = table_of(FlexPrefill(mass=0.4, distance=0.0, block=block, least=1), q, k)[0, 0]
    hit = (p[None] == column) | (p[:, None] - p[None] == offset) | (p[:, None] == p[None]) | (p[None] < block)
    wanted = cut(cut(hit, 0, (tiles, block)), 2, (tiles, block)).any(3).any(1).tril()
    assert torch.equal(found, wanted)


def test_flexprefill_loses_a_needle_that_its_probe_does_not_ask_for() -> None:
    """The published limit: rows in the middle ask for a key that the last block does not look at."""
    q, k = flat(1, 256, 32), flat(1, 256, 32, 1)
    q[:, :, 128:144, 0] = k[:, :, 40, 0] = 30.0
    q[:, :, -16:, 1] = k[:, :, 200, 1] = 30.0
    method = FlexPrefill(mass=0.5, distance=0.0, block=16, least=1)
    asked = [recall(q, k, pairs(table_of(method, q, k), 16, 16, 256, 256), SCALE)[0, 0]]
    q[:, :, -16:, 0] = 30.0
    asked.append(recall(q, k, pairs(table_of(replace(method, mass=0.9), q, k), 16, 16, 256, 256), SCALE)[0, 0])
    assert asked[0][-16:].min() > 0.99
    assert asked[0][128:144].max() < 0.01
    assert asked[1][128:144].min() > 0.99


# --- XAttention ---------------------------------------------------------------------------------------------------


def xattention_written_out(q: Tensor, k: Tensor, mass: float, stride: int, block: int, scale: float) -> Tensor:
    """The published formulas for one head and whole tiles, in float64, sums along each cell's antidiagonal."""
    n, cells, tiles = len(q), len(q) // stride, len(q) // block
    s = (q.double() @ k.double().T) * scale
    a = torch.full((cells, cells), -torch.inf, dtype=torch.float64)
    for i in range(cells):
        for j in range(i + 1):
            a[i, j] = sum(s[stride * i + stride - 1 - x, stride * j + x] for x in range(stride)) / stride
    at = block // stride
    tile = cut(cut(a.softmax(-1), 0, (tiles, at)), 2, (tiles, at)).sum(3).sum(1)
    out = torch.eye(tiles, dtype=torch.bool)
    for i in range(tiles):
        total = 0.0
        for j in tile[i].argsort(descending=True).tolist():
            if total >= mass * float(tile[i].sum()):
                break
            out[i, j] = True
            total += float(tile[i, j])
    out[:, 0] = True
    assert n == tiles * block
    return out.tril()


@pytest.mark.parametrize("seed", range(3))
def test_xattention_is_its_formulas(seed: int) -> None:
    q, k = flat(2, 64, 8, seed) * 60, flat(2, 64, 8, seed + 9) * 60
    found = table_of(XAttention(mass=0.6, stride=4, block=16, alternate=False), q, k)
    for h in range(2):
        assert torch.equal(found[0, h], xattention_written_out(q[0, h], k[0, h], 0.6, 4, 16, SCALE)), h


@pytest.mark.parametrize("offset", [49, 48])
@pytest.mark.parametrize("alternate", [False, True])
def test_a_slash_at_an_even_offset_is_found_where_cells_take_turns(offset: int, alternate: bool) -> None:
    """Antidiagonals of an even stride meet odd offsets alone, as published: an even slash is invisible to them."""
    n = 512
    k = torch.eye(n)
    q = k[(torch.arange(n) - offset).clamp(0)] * 80 / SCALE
    method = XAttention(mass=0.7, stride=8, block=32, alternate=alternate)
    kept = pairs(table_of(method, q[None, None], k[None, None]), 32, 32, n, n)
    seen = recall(q[None, None], k[None, None], kept, SCALE)[0, 0, 2 * offset :]
    assert (seen.quantile(0.01) > 0.9) == (alternate or offset % 2 == 1)


def test_xattention_keeps_a_needle_wherever_it_is_asked_for() -> None:
    """A key that 16 rows ask for, in the middle and at the end."""
    for rows in (slice(300, 316), slice(-16, None)):
        q, k = flat(1, 512, 32), flat(1, 512, 32, 1)
        q[:, :, rows, 0] = k[:, :, 40:48, 0] = 30.0
        kept = pairs(table_of(XAttention(mass=0.9, stride=4, block=32), q, k), 32, 32, 512, 512)
        assert recall(q, k, kept, SCALE)[0, 0, rows].min() > 0.9


# --- MoBA ---------------------------------------------------------------------------------------------------------


def test_moba_keeps_so_many_blocks_of_a_row() -> None:
    """min(i + 1, k) blocks of a row in block i: 45 over one row of each of 16 blocks, k = 3."""
    q, k = flat(1, 256, 8) * 40, flat(1, 256, 8, 1) * 40
    found = table_of(MoBA(count=3, block=16), q, k)
    assert found.shape == (1, 1, 256, 16)
    assert int(found[0, 0, ::16].sum()) == 45
    assert (found[0, 0].sum(-1) == (torch.arange(256) // 16 + 1).clamp(max=3)).all()
    together = table_of(MoBA(count=3, block=16, rows=16), q, k)
    assert torch.equal(together[0, 0], cut(found[0, 0], 0, (16, 16)).any(1))


def test_moba_keeps_a_needle_unless_its_blocks_mean_hides_it() -> None:
    """The published limit: a neighbour that points the other way takes the needle out of the mean."""
    kept = []
    for hidden in (0.0, -30.0):
        q, k = flat(1, 512, 32), flat(1, 512, 32, 1)
        q[:, :, 300:316, 0] = k[:, :, 40, 0] = 30.0
        k[:, :, 41, 0] = hidden
        table = table_of(MoBA(count=2, block=32), q, k)
        kept.append(recall(q, k, pairs(table, 1, 32, 512, 512), SCALE)[0, 0, 300:316])
    assert kept[0].min() > 0.99
    assert kept[1].mean() < 0.5


@pytest.mark.parametrize("cached", [0, 24])
def test_moba_is_its_formulas(cached: int) -> None:
    n, m, block, count = 80, 80 + cached, 16, 2
    q, k = flat(4, n, 8, 3) * 40, flat(2, m, 8, 4) * 40
    a = view(causal_score, P=n, M=m)
    found = run(q, k).table(MoBA(count, block).selection(a))  # type: ignore[arg-type]
    for h in range(4):
        for p in range(n):
            own = (p + cached) // block
            means = [k[0, h // 2, j * block : (j + 1) * block].double().mean(0) for j in range(own)]
            best = sorted(range(own), key=lambda j: -float(q[0, h, p].double() @ means[j]))[: count - 1]
            assert found[0, h, p].nonzero().flatten().tolist() == sorted([*best, own])


def test_moba_chooses_for_a_row_without_looking_ahead() -> None:
    """A later token changes no earlier row's table: what a cached prefix was computed with stays right."""
    q, k = flat(1, 128, 8) * 40, flat(1, 128, 8, 1) * 40
    before = table_of(MoBA(2, 16), q, k)
    k[:, :, 100:] += 3.0
    q[:, :, 100:] -= 1.0
    assert torch.equal(before[:, :, :96], table_of(MoBA(2, 16), q, k)[:, :, :96])
    assert not any("prefix" in x for x in MoBA.needs)
    assert any("prefix" in x for x in FlexPrefill.needs)


# --- SeerAttention and DELTA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2])
def test_a_gate_that_changes_nothing_pools_means(count: int) -> None:
    """Identity maps of means and no positions: tiles of softmax(mean q · mean k / √d)."""
    q, k = flat(2, 96, 8) * 60, flat(2, 96, 8, 1) * 60
    method = SeerAttention(*gate(2, 8, 3), threshold=0.2, count=count, block=16, rotary=0.0)
    means = [cut(x[0].double(), 1, (6, 16)).mean(2) for x in (q, k)]
    p = (means[0] @ means[1].mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    rank = p.argsort(-1, descending=True).argsort(-1)
    wanted = (rank < count) if count else p >= 0.2
    wanted |= torch.eye(6, dtype=torch.bool)
    wanted[..., 0] = True
    assert torch.equal(table_of(method, q, k)[0], wanted.tril())


def test_positions_of_tiles_turn_rows_by_their_number() -> None:
    """Products of rotated rows depend on the distance of the tiles alone."""
    x = torch.ones(1, 1, 64, 8)
    e = run(x, x)
    s = e(st.Products(st.Rotated(st.Pooled(st.Queries(), 8)), st.Rotated(st.Pooled(st.Keys(), 8))))[0, 0]
    turns = 10000.0 ** -(torch.arange(4) / 4)
    for d in range(8):
        assert (s.diagonal(-d) - 2 * (d * turns).cos().sum()).abs().max() < 1e-4


def test_a_gate_of_another_attention_is_refused() -> None:
    no = SeerAttention(*gate(2, 16, 3)).replace(view(P=64, M=64, H=2, E=8, F=8, B=1))
    assert isinstance(no, Refusal)
    assert "its gate is for 2 heads of 16" in no.reason


def test_delta_keeps_a_page_that_one_head_alone_loves() -> None:
    """Σ over a page of the largest weight of any head; the last pages always; the first where it scores alone."""
    q, k = flat(2, 1, 8), flat(2, 160, 8, 1)
    q[0, 1, 0, 0] = k[0, 1, 50, 0] = 30.0
    found = table_of(DELTA(count=4, page=16, recent=2), q, k)
    assert found.shape == (1, 2, 1, 10)
    assert (found[0, 0] == found[0, 1]).all()
    assert int(found[0, 0].sum()) == 4
    assert found[0, 0, 0, 50 // 16]
    assert found[0, 0, 0, -2:].all()
    p = cut((q.double() @ k.double().mT * SCALE).softmax(-1)[0].amax(0)[0], 0, (10, 16)).sum(-1)
    p[-2:] = torch.inf
    assert set(found[0, 0, 0].nonzero().flatten().tolist()) == set(p.topk(4).indices.tolist())
    assert table_of(DELTA(count=10, page=16), q, k).all()


def test_layers_have_roles() -> None:
    assert roles(8, full=2, every=3) == ("full", "full", "select", "reuse", "reuse", "select", "reuse", "reuse")
    assert roles(1) == ("full",)


# --- all ----------------------------------------------------------------------------------------------------------


def test_what_is_not_as_a_method_takes_it_is_refused() -> None:
    """R1: padding, scores that are more than a product, two sets of tokens, several rows of a decode, in one sentence each."""
    flex = FlexPrefill(block=16)
    cases = [
        (flex.replace(view(padded, P=32, M=32)), "run-time data"),
        (flex.replace(view(dense, P=32, M=48)), "two sets"),
        (DELTA().replace(view(P=32, M=32)), "one row"),
        (flex.replace(view(lambda b, qk: causal_score(b, qk * qk), P=32, M=32)), "more than a multiple"),
    ]
    for no, part in cases:
        assert isinstance(no, Refusal), no
        assert part in no.reason


@pytest.mark.parametrize("make", [
    lambda: FlexPrefill(mass=0.0), lambda: XAttention(stride=3), lambda: MoBA(count=0), lambda: DELTA(recent=0),
    lambda: SeerAttention(*gate(2, 8, 3), block=0),
])
def test_parameters_that_mean_nothing_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="need"):
        make()  # type: ignore[operator]


def test_they_are_listed() -> None:
    found = {m.name for m in registry.methods()}
    assert {"flexprefill", "xattention", "moba", "seerattention", "delta"} <= found
    assert all(m.source for m in registry.methods())


def group(heads: int, key_heads: int, at: tuple[tuple[ex.Expr, ...], ...] | None) -> Attention:
    """A causal attention over 64 tokens, its queries and keys read at these places of [1, 4, 64, 8] and [1, 2, 64, 8]."""
    b, h, p, m, e = (ex.index(x) for x in "bhpme")
    each = Builder({"b": 1, "h": heads, "p": 64, "m": 64, "e": 8, "f": 8})
    ranks = "bhp" if at is None else "hp" if heads > 1 else "p"
    places = at or ((b, h, p, e), (b, h // (heads // key_heads), m, e))
    tokens_first = at is not None and heads > 1
    q = each.given("Q", (1, 64, 4, 8) if tokens_first else (1, 4, 64, 8), places[0])
    k = each.given("K", (1, 2, 64, 8), places[1])
    v = each.input("V", f"{ranks[:-1]}mf")
    s = each.put("S", f"{ranks}m", ex.where(m <= p, each.put("QK", f"{ranks}m", q * k, "add", "e") * 0.125, float("-inf")))
    top = each.put("GM", ranks, s, "max", "m")
    w = each.put("SN", f"{ranks}m", ex.exp(s - top))
    each.put("O", f"{ranks}f", w / each.put("SD", ranks, w, "add", "m") * v, "add", "m")
    a = attention(each.cascade("core", "O"))
    assert isinstance(a, Attention), a
    return a


def test_tensors_are_read_as_they_lie() -> None:
    """A batch of one read at a place, tokens before heads, heads that share keys: the table is that of plain tensors."""
    q, k = flat(4, 64, 8) * 40, flat(2, 64, 8, 1) * 40
    h, p, m, e = (ex.index(x) for x in "hpme")
    method = XAttention(mass=0.5, stride=4, block=8)
    wanted = table_of(method, q, k, group(4, 2, None))
    assert 0.1 < wanted.float().mean() < 0.5
    one = group(4, 2, ((ex.const(0), p, h, e), (ex.const(0), h // 2, m, e)))
    assert torch.equal(table_of(method, q.transpose(1, 2), k, one), wanted[0])
    alone = group(1, 1, ((ex.const(0), ex.const(3), p, e), (ex.const(0), ex.const(1), m, e)))
    assert torch.equal(table_of(method, q, k, alone), wanted[0, 3])


# --- later tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "said", "tile"), [
    (MoBA(count=2, block=16), "", 1), (MoBA(count=2, block=16, rows=16), "16 rows choose together", 16),
    (XAttention(mass=0.3, block=16, stride=4), "16 rows choose together", 16),
    (FlexPrefill(mass=0.3, block=16, least=0), "the last rows choose for all", 128),
], ids=str)
def test_whose_rows_depend_on_later_tokens_is_said(method: SelectedMethod, said: str, tile: int) -> None:
    """The last token is turned into another: rows before its own tile keep what they kept, unless the method says why not."""
    made = method.replace(view(P=128, M=128, H=2))
    assert isinstance(made, Replacement)
    assert made.ahead == said
    changed = set()
    for seed in range(8):
        q, k = (torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(2 * seed + i)) for i in range(2))
        before = table_of(method, q, k)
        q[:, :, -1], k[:, :, -1] = 40.0, -40.0
        after = table_of(method, q, k)
        rows = before.shape[2]
        changed |= {int(r) * (128 // rows) for r in (before != after).any(-1).nonzero()[:, 2]}
    # what depends on later tokens lies in the tile of the last token, or anywhere
    assert all(r >= 128 - tile for r in changed)
    assert tile < 128 or min(changed, default=128) < 64


def test_where_a_row_sees_everything_nothing_is_ahead_of_it() -> None:
    made = MoBA(count=2, block=16, rows=16).replace(view(dense, P=128, M=128, H=2))
    assert isinstance(made, Replacement)
    assert made.ahead == ""
