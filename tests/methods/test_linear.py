"""Linear methods: their laws as cascades against float64 written from the formulas, and what each is known to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.attention.rowstate import derive
from reattend.patterns.attention.traits import kind
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library.papers import sigmoid, softmax_late, softmax_naive
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog
from reattend.patterns.methods.linear.sla import SparseLinear
from reattend.patterns.methods.method import Method, Replacement
from reattend.patterns.verdict import Obstacle, Refusal
from reattend.rewriter.approximate.feature_maps import FeatureMaps, rows
from tests.methods.attentions import dense, draw, view

SIZES = {"B": 1, "H": 2, "E": 8, "F": 8}


def run(method: Method, a: Attention, given: dict[str, Tensor]) -> Tensor:
    made = method.replace(a)
    assert isinstance(made, Replacement), made
    (out,) = made.cascade.outputs
    return evaluate(made.cascade, given, SIZES, widen=True)[out]


def mean(weight: Tensor, v: Tensor) -> Tensor:
    return weight @ v / weight.sum(-1, keepdim=True)


@pytest.mark.parametrize("window", [0, 3, 12])
def test_taylor_and_window_by_the_formula(window: int) -> None:
    a = view(P=12, M=12)
    given = draw(a)
    q, k, v = (given[n].double() for n in "QKV")
    s, p, m = q @ k.mT * 0.125, torch.arange(12)[:, None], torch.arange(12)
    weight = torch.where(p - m < window, s.exp(), 1 + s + s * s / 2).masked_fill(m > p, 0)
    out = run(TaylorWindow(window), a, given)
    assert (out - mean(weight, v)).abs().max() < 1e-12
    if window == 12:
        assert (out - s.masked_fill(m > p, -math.inf).softmax(-1) @ v).abs().max() < 1e-12


def test_taylor_is_a_product_of_features() -> None:
    """φ = [1, x̃, x̃x̃ᵀ/√2]: 1 + 8 + 64 features give 1 + z + z²/2, which is least, 1/2, at z = -1."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(20, 8, generator=g, dtype=torch.float64) for _ in range(2))
    phi = [torch.cat([torch.ones(20, 1), x, (x[:, :, None] * x[:, None] / math.sqrt(2)).flatten(1)], -1) for x in (q, k)]
    z = q @ k.T
    torch.testing.assert_close(phi[0] @ phi[1].T, 1 + z + z * z / 2)
    assert phi[0].shape[1] == 73
    assert float((1 + z + z * z / 2).min()) >= 0.5


def test_taylor_grows_again_for_scores_below_minus_one() -> None:
    """Not the exponential there: of two keys with scores 0 and -4 the second gets 5 of 6 parts. This is its published limit."""
    a = view(dense, P=1, M=2)
    given = draw(a)
    given["Q"] = torch.zeros(1, 2, 1, 8)
    given["Q"][..., 0] = 8.0
    given["K"] = torch.zeros(1, 2, 2, 8)
    given["K"][:, :, 1, 0] = -4.0
    given["V"] = torch.arange(2.0).reshape(1, 1, 2, 1).expand(1, 2, 2, 8).contiguous()
    found = TaylorWindow(0).replace(a)
    assert isinstance(found, Refusal)
    assert "two sets" in str(found)
    a = view(dense, P=2, M=2)
    given["Q"] = given["Q"].expand(1, 2, 2, 8).contiguous()
    assert run(TaylorWindow(0), a, given)[0, 0, 0, 0].item() == pytest.approx(5 / 6)


def test_large_scores_do_not_overflow_beside_a_polynomial() -> None:
    a = view(P=12, M=12)
    given = {n: 60 * x for n, x in draw(a).items()}
    made = TaylorWindow(2).replace(a)
    assert isinstance(made, Replacement)
    out = evaluate(made.cascade, given, SIZES)[made.cascade.outputs[0]]
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("features", [5, 8])
@pytest.mark.parametrize("score", ["causal", "dense"])
def test_hedgehog_by_the_formula(features: int, score: str) -> None:
    a = view(dense, P=10, M=10) if score == "dense" else view(P=10, M=10)
    g = torch.Generator().manual_seed(1)
    w = {n: torch.randn(2, 8, features, generator=g) for n in ("WQ", "WK")}
    given = draw(a)
    q, k, v = (given[n].double() for n in "QKV")
    phi = []
    for x, n in ((q, "WQ"), (k, "WK")):
        at = x @ w[n].double()
        phi.append(torch.cat([at.softmax(-1), (-at).softmax(-1)], -1))
    weight = phi[0] @ phi[1].mT
    if score == "causal":
        weight = weight.tril()
    out = run(Hedgehog("maps.safetensors", features), a, given | w)
    assert (out - mean(weight, v)).abs().max() < 1e-12


def test_hedgehog_beside_a_window_by_the_formula() -> None:
    a = view(P=12, M=12)
    g = torch.Generator().manual_seed(3)
    learned = {n: torch.randn(2, 8, 5, generator=g) for n in ("WQ", "WK")} | {"GAIN": torch.tensor([0.3, -1.2])}
    given = draw(a)
    q, k, v = (given[n].double() for n in "QKV")
    maps = FeatureMaps(learned["WQ"].double(), learned["WK"].double(), learned["GAIN"].double())
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    out = run(Hedgehog("maps.safetensors", 5, window=4), a, given | learned)
    assert (out - rows(q, k, maps, causal, 0.125, 4) @ v).abs().max() < 1e-12
    # by hand, the last row: four keys of the window, eight beside it
    s, phi = q @ k.mT * 0.125, [torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in (q @ maps.query, k @ maps.key)]
    weight = torch.cat([learned["GAIN"].double().exp()[:, None] * (phi[0] @ phi[1].mT)[0, :, -1, :8],
                        (s[0, :, -1, 8:] - s[0, :, -1, 8:].amax(-1, keepdim=True)).exp()], -1)
    assert (out[0, :, -1] - mean(weight[:, None], v[0])[:, 0]).abs().max() < 1e-12


def test_hedgehog_with_equal_keys_is_a_mean_and_knows_no_later_token() -> None:
    a = view(P=10, M=10)
    given = draw(a) | {n: torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(2)) for n in ("WQ", "WK")}
    method = Hedgehog("maps.safetensors", 4)
    other = {**given, "K": given["K"].clone(), "V": given["V"].clone()}
    other["K"][:, :, 6:] = 9.0
    other["V"][:, :, 6:] = 9.0
    assert torch.equal(run(method, a, given)[:, :, :6], run(method, a, other)[:, :, :6])
    given["K"] = given["K"][:, :, :1].expand(1, 2, 10, 8).contiguous()
    v = given["V"].double()
    torch.testing.assert_close(run(method, a, given), v.cumsum(2) / torch.arange(1, 11, dtype=torch.float64)[:, None])


def test_a_softmax_is_told_by_what_it_does() -> None:
    assert isinstance(TaylorWindow(2).replace(view(rule=softmax_naive, P=6, M=6)), Replacement)
    # the second is a sum of exponentials that nobody divides
    for rule in (sigmoid, softmax_late):
        no = TaylorWindow(2).replace(view(rule=rule, P=6, M=6))
        assert isinstance(no, Refusal)
        assert "no softmax" in str(no)


def test_refusals_say_why() -> None:
    assert "give their file as maps" in str(Hedgehog().replace(view(P=6, M=6)))
    capped = view(lambda b, qk: (qk * 0.125) + b.input("bias", "hpm"), P=6, M=6)
    assert "more than a scaled product" in str(Hedgehog("m", 4).replace(capped))
    assert "needs a causal attention" in str(TaylorWindow(4).replace(view(dense, P=6, M=6)))
    with pytest.raises(ValueError, match="window ≥ 0"):
        TaylorWindow(-1)
    with pytest.raises(ValueError, match="features ≥ 1"):
        Hedgehog("m", 0)


def sla(a: Attention, proj: Tensor, critical: float, negligible: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The method's output, its table, its inputs."""
    made = SparseLinear("p.safetensors", critical, negligible, rows=4, keys=4).replace(a)
    assert isinstance(made, Replacement), made
    assert made.program is not None
    given = draw(a)
    table = made.program.run(torch, given, SIZES)
    return evaluate(made.cascade, given | {made.table: table, "PROJ": proj}, SIZES, widen=True)["O"], table, given


def test_sparse_and_linear_by_the_formula() -> None:
    """Eleven tokens in tiles of four: critical one tile of three, marginal one, negligible one; the last tile is short."""
    a = view(dense, P=11, M=11)
    g = torch.Generator().manual_seed(5)
    proj = torch.randn(8, 8, generator=g)
    out, table, given = sla(a, proj, 0.34, 0.34)
    q, k, v = (given[n].double() for n in "QKV")
    pooled = [torch.stack([x[:, :, i : i + 4].mean(2) for i in (0, 4, 8)], 2) for x in (q, k)]
    order = (pooled[0] @ pooled[1].mT).argsort(-1, descending=True)
    first, second = (torch.zeros(1, 2, 3, 3, dtype=torch.bool).scatter_(-1, order[..., i : i + 1], True) for i in (0, 1))
    assert torch.equal(table, torch.cat([first, second], 2))
    wide = [x.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :11, :11] for x in (first, second)]
    sparse = (q @ k.mT * 0.125).masked_fill(~wide[0], -math.inf).softmax(-1) @ v
    weight = (q.softmax(-1) @ k.softmax(-1).mT).masked_fill(~wide[1], 0)
    linear = weight @ v / (1e-5 + weight.sum(-1, keepdim=True))
    assert (out - sparse - linear @ proj.double()).abs().max() < 1e-12


def test_sparse_alone_without_a_projection_and_dense_with_all_tiles_critical() -> None:
    a, zero = view(dense, P=12, M=12), torch.zeros(8, 8)
    out, table, given = sla(a, zero, 1.0, 0.0)
    q, k, v = (given[n].double() for n in "QKV")
    assert (out - (q @ k.mT * 0.125).softmax(-1) @ v).abs().max() < 1e-12
    assert table[:, :, :3].all()
    assert not table[:, :, 3:].any()
    # a share that rounds to no tile at all is one tile
    assert sla(a, zero, 0.01, 0.5)[1][:, :, :3].sum(-1).eq(1).all()


def test_sla_refuses_what_it_is_not_for() -> None:
    assert "causal mask hold later tokens" in str(SparseLinear("p").replace(view(P=8, M=8)))
    assert "give its file as projection" in str(SparseLinear().replace(view(dense, P=8, M=8)))
    with pytest.raises(ValueError, match="at most 1 together"):
        SparseLinear("p", 0.8, 0.4)


def test_a_taylor_row_has_a_one_pass_form() -> None:
    """It is a softmax of another score, so that any kernel computes it."""
    made = TaylorWindow(4).replace(view(P=12, M=12))
    assert isinstance(made, Replacement)
    found = attention(made.cascade)
    assert isinstance(found, Attention)
    assert kind(found) == "softmax"
    assert not isinstance(derive(found), Obstacle)
