"""What stands behind a site's costs: passes, bytes by tensor and operations, against known answers."""

from __future__ import annotations

from reattend.cost_model.count.memory import keyed_inputs
from reattend.cost_model.sites.detail import Detail, detail
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import derive, stream
from reattend.patterns.mapping import TileMapping
from reattend.patterns.verdict import Obstacle
from tests.plans import CAUSAL, SIZES

N, HEADS = 1024, 8


def made() -> Detail:
    view = attention(CAUSAL)
    assert isinstance(view, Attention)
    state = derive(view)
    assert not isinstance(state, Obstacle)
    return detail(CAUSAL, stream(view, state), TileMapping(128, 64).to_text(), SIZES)


def test_three_passes_become_one() -> None:
    d = made()
    before = {p.ranks: p for p in d.passes_before}
    after = {p.ranks: p for p in d.passes_after}
    assert before[("m",)].count == 3
    assert before[("m",)].footprint == "1024"
    assert after[("m1", "m0")].count == 1
    assert after[("m1", "m0")].inputs == {"K": 1, "V": 1}


def test_what_lives_between_the_passes_has_its_choices() -> None:
    d = made()
    assert {r.tensor for r in d.revisits} == {"S", "SN"}
    assert {r.how for r in d.revisits} == {"buffer", "spill", "recompute"}
    spilled = next(r for r in d.revisits if r.how == "spill" and r.tensor == "S")
    # written once and read once by each head
    assert spilled.moved_bytes == 2 * HEADS * N * N * 4
    assert [(f.passes, f.rewrites) for f in d.forms][-1] == (3, ())
    assert any(f.passes == 1 and "repair" in f.rewrites for f in d.forms)


def test_bytes_by_tensor() -> None:
    d = made()
    before = {t.tensor: t for t in d.bytes_before if t.written}
    assert before["QK"].moved == HEADS * N * N * 4
    once = {t.tensor: t.once for t in d.bytes_after}
    assert once == {"Q": HEADS * N * 64 * 4, "K": HEADS * N * 64 * 4, "V": HEADS * N * 64 * 4, "O": HEADS * N * 64 * 4}
    assert all(t.moved >= t.once for t in d.bytes_after)


def test_products_of_visited_tiles_are_counted() -> None:
    # causal in tiles of 128 × 64: 8 rows of 2, 4, … 16 key tiles
    visited = sum(2 * (i + 1) for i in range(8))
    assert sum(made().flops.values()) == HEADS * visited * 128 * 64 * 4 * 64


def test_without_a_mapping_only_the_lifted_form_is_counted() -> None:
    d = detail(CAUSAL, None, "", SIZES)
    assert not d.passes_after
    assert not d.bytes_after
    assert d.passes_before


def test_it_survives_being_plain_data() -> None:
    assert Detail.from_dict(made().to_dict()) == made()


def test_what_belongs_to_keys() -> None:
    view = attention(CAUSAL)
    assert isinstance(view, Attention)
    assert keyed_inputs(view) & {t.name for t in CAUSAL.inputs} == {"K", "V"}
