"""Absorbed latents: re-association is exact, slices are not, and what is no map of a latent is refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from reattend.patterns import expr as ex
from reattend.patterns.attention.latent import Widths, absorbed, naive
from reattend.patterns.attention.ranks import fuse
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library.papers import Builder
from reattend.patterns.passes.absorb import Absorbed, absorb, pieces, shared, slices, weighted
from reattend.patterns.verdict import Obstacle

SMALL = Widths(heads=4, latent=8, rotary=4, key=6, value=5, model=7, dtype="f64")


def expanded() -> Cascade:
    return naive(SMALL, batch=2, queries=3, keys=11).cascade


def data(c: Cascade) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {t.name: torch.randn([int(s) for s in t.shape], generator=g, dtype=torch.float64) for t in c.inputs}


def run(c: Cascade, x: dict[str, torch.Tensor]) -> torch.Tensor:
    return evaluate(c, {t.name: x[t.name] for t in c.inputs}, widen=True)[c.outputs[0]]


def taken(c: Cascade, *, expand: bool = False) -> Absorbed:
    found = absorb(c, "m", "p", expand=expand)
    assert isinstance(found, Absorbed), found
    return found


def test_the_expanded_form_is_absorbed_into_the_known_one() -> None:
    """The same Einsums as the hand-written absorbed cascade, up to names: as many, and of the same sizes."""
    found, known = taken(expanded()), absorbed(SMALL, batch=2, queries=3, keys=11).cascade
    x = data(expanded())
    assert torch.allclose(run(found.cascade, x), run(expanded(), x), rtol=1e-12, atol=1e-12)

    def shapes(c: Cascade) -> list[tuple[object, ...]]:
        return sorted((tuple(sorted(map(str, c.tensor[e.out.tensor].shape))), str(e.op)) for e in c.einsums if e.op)

    assert shapes(found.cascade) == shapes(known)
    assert {t.name for t in found.cascade.inputs} == {t.name for t in known.inputs}


@given(
    heads=st.sampled_from([2, 4]), group=st.sampled_from([1, 2]), latent=st.integers(1, 5), cut=st.integers(0, 3),
    bias=st.booleans(), expand=st.booleans(), late=st.booleans(),
)
def test_any_mixture_of_parts_is_the_same_function(
    heads: int, group: int, latent: int, cut: int, bias: bool, expand: bool, late: bool
) -> None:
    """Keys of a map and a shared part, with or without a bias, latents by group, the division early or late."""
    b = Builder({"b": 2, "h": heads, "p": 3, "m": 5, "e": 4, "f": 3, "c": latent, "k": latent})
    h, m, e = (ex.index(r) for r in "hme")
    groups = heads // group

    def tokens(channel: str) -> ex.Expr:
        own = h // group if groups > 1 else ex.const(0)
        return b.given("C", (2, 5, groups, latent), (ex.index("b"), m, own, ex.index(channel)), "f64")

    k = b.put("K", "bhme", tokens("c") * b.input("WK", "hec", "f64"), "add", "c")
    v = b.put("V", "bhmf", tokens("k") * b.input("WV", "hfk", "f64"), "add", "k")
    key = k + b.input("BK", "he", "f64") if bias else k
    if cut:
        key = ex.where(e < cut, key, b.given("R", (2, 5, 4), (ex.index("b"), m, e - cut), "f64"))
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe", "f64") * key, "add", "e")
    gm = b.put("GM", "bhp", qk, "max", "m")
    sn = b.put("SN", "bhpm", ex.exp(qk - gm))
    sd = b.put("SD", "bhp", sn, "add", "m")
    o = b.put("O", "bhpf", sn * v if late else sn / sd * v, "add", "m")
    c = b.cascade("drawn", str((b.put("Y", "bhpf", o / sd) if late else o).attr))
    x = data(c)
    found = taken(c, expand=expand)
    assert torch.allclose(run(found.cascade, x), run(c, x), rtol=1e-10, atol=1e-10)
    assert shared(found, "m", "h") == (groups == 1)
    wide = {n for n in found.cascade.producers if "m" in {str(i.attr) for i in found.cascade.producers[n][-1].out.index}}
    assert expand == any(found.cascade.tensor[n].shape[-1] == 5 and n.startswith(("K", "V")) for n in wide)


def test_one_slice_is_the_whole_and_two_are_another_function() -> None:
    c = expanded()
    x, found = data(c), taken(c)
    one, two = (slices(found, n) for n in (1, 2))
    assert isinstance(one, Cascade)
    assert isinstance(two, Cascade)
    assert torch.allclose(run(one, x), run(c, x), rtol=1e-12, atol=1e-12)
    assert (run(two, x) - run(c, x)).abs().max() > 0.05 * run(c, x).abs().max()


def test_slices_are_exact_where_a_slice_holds_all_of_the_latent() -> None:
    """The closed case of TPLA: a latent of half the rank, turned so that one slice is zero, and no values from the other."""
    c = expanded()
    x, found = data(c), taken(c)
    two = slices(found, 2)
    assert isinstance(two, Cascade)
    x["C"][..., 4:] = 0.0
    assert torch.allclose(run(two, x), run(c, x), rtol=1e-12, atol=1e-12)


def test_slices_that_do_not_divide_say_so() -> None:
    obstacle = slices(taken(expanded()), 3)
    assert isinstance(obstacle, Obstacle)
    assert obstacle.reason == "a latent of 8 channels does not divide into 3 slices"


def scaled_by(c: Cascade, name: str, term: object) -> Cascade:
    """The cascade with one Einsum's body changed."""
    assert callable(term)
    return replace(c, einsums=tuple(replace(e, body=term(e.body)) if e.out.tensor == name else e for e in c.einsums))


def test_a_curve_between_the_map_and_the_score_is_refused() -> None:
    def curved(body: ex.Expr) -> ex.Expr:
        k = next(x for x in ex.loads(body) if x.attr == "K")
        return ex.substitute(body, {k: ex.unary("tanh", k)})

    obstacle = absorb(scaled_by(expanded(), "QK", curved), "m", "p")
    assert isinstance(obstacle, Obstacle)
    assert obstacle.reason == "tanh(K[b,h,m,e]) is not linear in its latent"


def test_values_that_add_a_part_of_their_own_are_refused() -> None:
    def more(body: ex.Expr) -> ex.Expr:
        v = next(x for x in ex.loads(body) if x.attr == "V")
        return ex.substitute(body, {v: v + ex.cast(ex.load("KPE", (ex.index("b"), ex.index("m"), ex.const(0)), "f64"), "f64")})

    obstacle = absorb(scaled_by(expanded(), "O", more), "m", "p")
    assert isinstance(obstacle, Obstacle)
    assert "have a part of their own beside the map" in obstacle.reason


def test_without_maps_there_is_nothing_to_absorb() -> None:
    obstacle = absorb(absorbed(SMALL, batch=2, queries=3, keys=11).cascade, "m", "p")
    assert isinstance(obstacle, Obstacle)
    assert obstacle.reason == "no keys or values are linear maps of another tensor"


def test_a_term_is_cut_where_it_compares() -> None:
    e = ex.index("e")
    x, y = (ex.load(n, (e,), "f32") for n in "XY")
    cut = pieces(ex.where(e < 2, x, ex.where(e < 5, y, 0.0)), "e", 6)
    assert [(p.start, p.size, str(p.term)) for p in cut] == [(0, 2, "X[e]"), (2, 3, "Y[e]"), (5, 1, "0")]
    (whole,) = pieces(x, "e", 6)
    assert (whole.start, whole.size, whole.whole) == (0, 6, True)


def test_heads_in_groups_are_fused() -> None:
    """O over groups and members is O over heads; what only groups index is read at a quotient."""
    b = Builder({"b": 2, "h": 2, "g": 3, "p": 3, "m": 5, "e": 4, "f": 3, "c": 4})
    h, g = ex.index("h"), ex.index("g")
    tokens = b.given("C", (2, 5, 8), (ex.index("b"), ex.index("m"), h * 4 + ex.index("c")), "f64")
    k = b.put("K", "bhme", tokens * b.input("W", "hec", "f64"), "add", "c")
    q = b.given("Q", (2, 3, 6, 4), (ex.index("b"), ex.index("p"), h * 3 + g, ex.index("e")), "f64")
    qk = b.put("QK", "bhgpm", q * k, "add", "e")
    sn = b.put("SN", "bhgpm", ex.exp(qk))
    b.put("O", "bhgpf", sn / b.put("SD", "bhgp", sn, "add", "m") * b.input("V", "bhgmf", "f64"), "add", "m")
    c = b.cascade("grouped", "O")
    assert weighted(c, "m", "p") == {"h", "e", "c"}
    one = fuse(c, "h", "g")
    assert str(one.producers["QK"][0]) == "QK[b,hg,p,m] = Σ_e Q[b,p,hg,e] · K[b,hg // 3,m,e]"
    x = data(c)
    assert torch.allclose(run(one, x), run(c, x).flatten(1, 2), rtol=1e-12, atol=1e-12)
    # the projection joins heads: there they are reduced, and stay apart
    b.put("Y", "bp", ex.load("O", tuple(ex.index(r) for r in "bhgpf"), "f64"), "add", "hgf")
    joined = b.cascade("joined", "Y")
    assert fuse(joined, "h", "g") is joined
