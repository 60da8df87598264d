"""Passes: the known answers A1–A8 of FuseMax and of the field, and what must not change them."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.passes import families, key_family, key_passes, levels, passes, report
from reattend.patterns import expr as ex
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import RowState, derive, stream
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, verify
from reattend.patterns.library import papers, variants
from reattend.patterns.library.papers import Builder

TILED = ("m1", "m0")

KNOWN = [
    ("A1", papers.cascade1(), ("k",), 2),
    ("A1", papers.cascade2(), ("k",), 1),
    ("A1", papers.cascade3(), ("i",), 1),
    ("A2", papers.naive(), ("m",), 2),
    ("A2", papers.naive(deferred=True), ("m",), 1),
    ("A3", papers.cascade4(), ("m",), 3),
    ("A3", papers.cascade4(deferred=True), ("m",), 2),
    ("A3", papers.local_max(), TILED, 2),
    ("A3", papers.local_max(deferred=True), TILED, 2),
    ("A3", papers.cascade5(), TILED, 1),
    ("A3", papers.cascade5(), ("m0",), 2),
    ("A5", papers.attention("sigmoid", papers.sigmoid), ("m",), 1),
    ("A5", papers.attention("softplus", papers.softplus), ("m",), 2),
    ("A5", papers.attention("softplus, deferred", papers.softplus_late, late=True), ("m",), 1),
    ("A5", papers.reassociated(), ("m",), 1),
    ("A5", papers.cosine(), ("m",), 1),
    ("A5", papers.cosine(), ("e",), 2),
    ("A7", papers.scaled_twice(), ("k",), 2),
]


@pytest.mark.parametrize(("id", "cascade", "family", "count"), KNOWN, ids=[f"{k[0]}-{k[1].name}-{k[2]}" for k in KNOWN])
def test_known_answers(id: Any, cascade: Any, family: Any, count: Any) -> None:
    assert passes(cascade, family) == count


def test_a4_passes_of_each_input() -> None:
    assert report(papers.cascade4(), ("m",)).inputs == {"K": 3, "V": 1}


def test_a4_views_visit_nothing() -> None:
    """Local maxima as the paper has them read the keys for the maxima and once more for the weights; V only then."""
    assert report(papers.local_max(), TILED).inputs == {"K": 2, "V": 1}
    assert report(papers.cascade5(), TILED).inputs == {"K": 1, "V": 1}


def as_soon_as_possible(c: Cascade, family: tuple[str, ...]) -> int:
    """The known-wrong count: every barrier adds a pass, whether or not anything heavy lies between it and the last."""
    level: dict[str, int] = {}
    outer, whole = family[0], set(family)
    for e in c.einsums:
        walked = e.ranks | set(e.over)
        reached = [
            level[str(x.attr)] + (outer in walked and not any(outer in i.ranks for i in x.args))
            for x in e.reads
            if str(x.attr) in level
        ]
        level[e.out.tensor] = max([*reached, int(whole <= walked)])
    return max(level.values())


def test_a3_local_maxima_are_not_three_passes() -> None:
    """Counting levels as soon as possible agrees on Cascades 1, 2 and 4 and is wrong on local maxima: 3 for 2."""
    for c, family, count in ((papers.cascade1(), ("k",), 2), (papers.cascade2(), ("k",), 1), (papers.cascade4(), ("m",), 3)):
        assert as_soon_as_possible(c, family) == passes(c, family) == count
    assert as_soon_as_possible(papers.local_max(), TILED) == 3
    assert passes(papers.local_max(), TILED) == 2


FIELD = [
    ("softmax with a cap", variants.softcap(50.0), ("m",), 3),
    ("cosine as written", variants.cosine_softmax(), ("m",), 3),
    ("cosine over the embedding", variants.cosine_softmax(), ("e",), 2),
    ("sinks", papers.attention("sink", papers.softmax_sink), ("m",), 3),
    ("differential", variants.differential(), ("m",), 3),
    ("returned probabilities", variants.returned(), ("m",), 3),
    ("sparsemax, 2 steps", papers.attention("sparsemax", papers.sparsemax(2)), ("m",), 4),
    ("sparsemax, 7 steps", papers.attention("sparsemax", papers.sparsemax(7)), ("m",), 9),
    ("entmax, 3 steps", papers.attention("entmax", variants.entmax(3)), ("m",), 5),
    ("talking heads", variants.talking_heads(), ("m",), 3),
    ("talking heads, over the heads", variants.talking_heads(), ("h",), 1),
    ("split keys", variants.split_keys(), TILED, 1),
    ("split keys, in a part", variants.split_keys(), ("m0",), 2),
    ("layer norm", variants.layer_norm(), ("e",), 3),
    ("layer norm by moments", variants.layer_norm_moments(), ("e",), 2),
    ("layer norm by Welford", variants.layer_norm_welford(), ("e",), 2),
    ("causal linear", variants.causal_linear(), ("i",), 1),
    ("gated linear", variants.gated_linear(), ("i",), 1),
    ("decayed linear", variants.decayed_linear(), ("i",), 1),
]


@pytest.mark.parametrize(("what", "cascade", "family", "count"), FIELD, ids=[t[0] for t in FIELD])
def test_what_the_field_writes(what: Any, cascade: Any, family: Any, count: Any) -> None:
    """Forms as written; `test_search` has what becomes of them."""
    assert passes(cascade, family) == count


def test_a7_levels_without_a_second_visit() -> None:
    """Two levels: the Einsums cannot be fused; but no input is visited twice."""
    assert report(papers.scaled_twice(), ("k",)).inputs == {"A": 1, "B": 1, "C": 1}


TABLE_1 = [
    ("PyTorch, TensorFlow, FLAT, E.T.", papers.cascade4(), ("m",), 3),
    ("TileFlow, Choi et al.", papers.local_max(), TILED, 2),
    ("FlashAttention, FlashAttention-2, Rabe and Staats", papers.cascade5(), TILED, 1),
]


@pytest.mark.parametrize(("who", "cascade", "family", "count"), TABLE_1, ids=[t[0] for t in TABLE_1])
def test_a8_table_1(who: Any, cascade: Any, family: Any, count: Any) -> None:
    assert passes(cascade, family) == count


def test_footprint_is_a_fiber_or_nothing() -> None:
    assert str(report(papers.cascade4(), ("m",)).footprint) == "M"
    assert report(papers.cascade5(), TILED).footprint == 0
    assert str(report(papers.cascade5(), ("m0",)).footprint) == "M0"


def test_families_pair_the_halves_of_a_coordinate() -> None:
    assert families(papers.cascade5()) == (TILED, ("e",))
    assert set(families(papers.cascade4())) == {("m",), ("e",)}


def test_eager_softmax_three_passes_streamed_one() -> None:
    c = papers.attention("softmax", papers.softmax)
    view: Any = attention(c)
    state: Any = derive(view)
    assert key_passes(c) == 3
    assert key_passes(stream(view, state)) == 1


def test_sparsemax_steps() -> None:
    """One pass for the maximum, one a step, one for the output."""
    assert key_passes(papers.attention("sparsemax", papers.sparsemax(2))) == 4


def test_differential_softmax_is_three_passes_as_written() -> None:
    assert key_passes(papers.attention("differential", papers.differential)) == 3


def test_no_attention_has_no_key_rank() -> None:
    with pytest.raises(ValueError, match="no key rank"):
        key_family(papers.cascade2())


def test_unknown_rank() -> None:
    with pytest.raises(KeyError):
        passes(papers.cascade4(), ("x",))


def test_prefix_filter_streams_and_suffix_filter_does_not() -> None:
    """S_i = Σ_{k ≤ i} Y_k follows the rank; with k > i every element must be seen before the first result."""

    def filtered(condition: Any) -> Any:
        b = Builder({"i": papers.size("N"), "k": papers.size("N")})
        a = b.input("A", "i")
        y = b.put("Y", "i", a * 2.0)
        at_k = ex.load("Y", (ex.index("k"),), "f32")
        s = b.put("S", "i", ex.where(condition(ex.index("k"), ex.index("i")), at_k, 0.0), "add", "k")
        b.put("Z", "i", y * s)
        return b.cascade("filter", "Z")

    assert passes(filtered(lambda k, i: k <= i), ("i",)) == 1
    assert passes(filtered(lambda k, i: k > i), ("i",)) == 2


def test_light_work_between_barriers_counts_once() -> None:
    """A chain of row scalars between two sweeps is one barrier: levels as soon as possible would give 3 here."""
    c = papers.local_max()
    assert max(levels(c, TILED).values()) == 2
    by_name = {c.einsums[i].out.tensor: h for i, h in levels(c, TILED).items()}
    assert by_name["SLN"] == 1
    assert by_name["SN"] == 2


# --- properties ---------------------------------------------------------------------------------------------------

CASCADES = [(k[1], k[2]) for k in KNOWN] + [(f[1], f[2]) for f in FIELD]


def shuffled(c: Cascade, seed: int) -> Cascade:
    """The Einsums in another topological order; writers of one tensor keep theirs."""
    rng = random.Random(seed)
    left = list(c.einsums)
    out: list[Einsum] = []
    written: set[str] = set()
    iterative = {r.name for r in c.ranks if r.iterative}
    first = {n: es[0] for n, es in c.producers.items()}
    while left:
        ready = []
        for e in left:
            needs = {str(r.attr) for r in e.reads if str(r.attr) in c.producers}
            if e is not first[e.out.tensor]:
                needs.add(e.out.tensor)
            # what is read at its end needs every writer
            waits = [
                o
                for o in left
                if o is not e and o.out.tensor in needs and not (o.ranks & iterative and e.ranks & iterative)
            ]
            in_step = [
                o for o in left if o is not e and o.out.tensor in needs and o.ranks & iterative and e.ranks & iterative
            ]
            before = {id(o) for o in in_step if c.einsums.index(o) < c.einsums.index(e)}
            if not waits and not before and (needs <= written | {e.out.tensor} or e.ranks & iterative):
                ready.append(e)
        pick = rng.choice(ready)
        left.remove(pick)
        out.append(pick)
        written.add(pick.out.tensor)
    return replace(c, einsums=tuple(out))


def renamed(c: Cascade, table: dict[str, str]) -> Cascade:
    terms = {ex.index(a): ex.index(b) for a, b in table.items()}
    return replace(
        c,
        ranks=tuple(Rank(table[r.name], r.size, r.iterative) for r in c.ranks),
        einsums=tuple(
            replace(
                e,
                out=Access(e.out.tensor, tuple(ex.substitute(i, terms) for i in e.out.index)),
                body=ex.substitute(e.body, terms),
                over=tuple(table[r] for r in e.over),
            )
            for e in c.einsums
        ),
    )


@given(st.sampled_from(CASCADES), st.integers(0, 10**6))
def test_topological_order_changes_nothing(case: Any, seed: Any) -> None:
    c, family = case
    other = verify(shuffled(c, seed))
    assert passes(other, family) == passes(c, family)
    assert report(other, family).inputs == report(c, family).inputs


@given(st.sampled_from(CASCADES), st.randoms(use_true_random=False))
def test_rank_names_change_nothing(case: Any, rng: Any) -> None:
    c, family = case
    names = [r.name for r in c.ranks]
    fresh = rng.sample([f"r{i}" for i in range(50)], len(names))
    table = dict(zip(names, fresh, strict=True))
    assert passes(renamed(c, table), tuple(table[r] for r in family)) == passes(c, family)


_maps = [lambda x: x, ex.exp, lambda x: x * x, lambda x: ex.unary("relu", x), lambda x: ex.unary("sigmoid", x)]
_steps = ["shift", "scale", "map", "mask"]


def chain(b: Builder, s: Any, steps: Any, maps: Any) -> Any:
    """A row rule drawn at random: shifts by a maximum, divisions by a sum, maps and masks."""
    for i, (step, f) in enumerate(zip(steps, maps)):
        if step == "shift":
            s = b.put(f"S{i}", "bhpm", s - b.put(f"G{i}", "bhp", s, "max", "m"))
        elif step == "scale":
            s = b.put(f"S{i}", "bhpm", s / (b.put(f"G{i}", "bhp", s, "add", "m") + 1.0))
        elif step == "mask":
            s = b.put(f"S{i}", "bhpm", ex.where(ex.index("m") <= ex.index("p"), s, 0.0))
        else:
            s = b.put(f"S{i}", "bhpm", f(s))
    return s


@given(st.lists(st.sampled_from(_steps), max_size=5), st.lists(st.sampled_from(_maps), min_size=5, max_size=5))
def test_deferral_never_adds_a_pass(steps: Any, maps: Any) -> None:
    """The last division before the product, or after it: never more passes, and at most one fewer."""

    def early(b: Any, s: Any) -> Any:
        sn = chain(b, s, steps, maps)
        return sn / b.put("SD", "bhp", sn, "add", "m")

    def late(b: Any, s: Any) -> Any:
        sn = chain(b, s, steps, maps)
        b.put("SD", "bhp", sn, "add", "m")
        return sn

    before = passes(papers.attention("early", early), ("m",))
    after = passes(papers.attention("late", late, late=True), ("m",))
    assert before - 1 <= after <= before


@given(st.lists(st.sampled_from(_steps), max_size=4), st.lists(st.sampled_from(_maps), min_size=4, max_size=4))
def test_what_streams_is_one_pass(steps: Any, maps: Any) -> None:
    view: Any = attention(papers.attention("drawn", lambda b, s: chain(b, s, steps, maps)))
    state = derive(view)
    if isinstance(state, RowState):
        assert key_passes(stream(view, state)) == 1
