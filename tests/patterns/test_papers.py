"""The papers' cascades say the same thing: each form of one computation gives one result in float64."""

from typing import Any

import pytest
import torch

from reattend.patterns.cascade import parse, show, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import papers

E, F, P, M1, M0 = 3, 2, 5, 4, 6
SIZES = {"E": E, "F": F, "P": P, "M": M1 * M0, "M1": M1, "M0": M0}


def inputs() -> Any:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((P, E), (M1 * M0, E), (M1 * M0, F)))
    return {"Q": q, "K": k, "V": v}


def softmax_attention(t: Any) -> Any:
    return (t["Q"] @ t["K"].T).softmax(-1) @ t["V"]


def run(c: Any, tensors: Any) -> Any:
    return evaluate(c, tensors, {s: SIZES[s] for s in c.free_symbols if s in SIZES}, widen=True)[c.outputs[0]]


SOFTMAX = [
    papers.cascade4(), papers.cascade4(deferred=True), papers.naive(), papers.naive(deferred=True), papers.local_max(),
    papers.local_max(deferred=True), papers.cascade5(),
]


@pytest.mark.parametrize("c", SOFTMAX, ids=lambda c: f"{c.name}-{len(c.einsums)}")
def test_forms_of_softmax_agree(c: Any) -> None:
    t = inputs()
    assert torch.allclose(run(c, t), softmax_attention(t), rtol=1e-12, atol=1e-12)


def test_cascades_1_2_3_agree() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(9, generator=g).double(), torch.randn(9, generator=g).double()
    want = (a * b).sum() * a.sum()
    for c in (papers.cascade1(), papers.cascade2(), papers.cascade3()):
        assert torch.allclose(evaluate(c, {"A": a, "B": b}, widen=True)["Z"], want, rtol=1e-12, atol=0), c.name


def test_linear_attention_is_associative() -> None:
    t = inputs()
    assert torch.allclose(run(papers.reassociated(), t), (t["Q"] @ t["K"].T) @ t["V"], rtol=1e-12, atol=1e-12)


def test_cosine() -> None:
    t = inputs()
    q, k = (torch.nn.functional.normalize(t[n], dim=-1) for n in ("Q", "K"))
    assert torch.allclose(run(papers.cosine(), t), (q @ k.T).softmax(-1) @ t["V"], rtol=1e-12, atol=1e-12)


def test_sparsemax_converges() -> None:
    """Newton's steps from below reach the threshold at which the weights sum to 1."""
    c = papers.attention("sparsemax", papers.sparsemax(8))
    sizes = {"B": 1, "H": 1, "P": P, "M": 12, "E": E, "F": 12}
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, 1, P, E, generator=g).double()
    k = torch.randn(1, 1, 12, E, generator=g).double()
    weights = evaluate(c, {"Q": q, "K": k, "V": torch.eye(12).double()[None, None]}, sizes, widen=True)["O"]
    assert torch.allclose(weights.sum(-1), torch.ones(1, 1, P).double())
    assert (weights >= 0).all()


ALL = [
    *SOFTMAX, papers.cascade1(), papers.cascade2(), papers.cascade3(), papers.reassociated(), papers.scaled_twice(),
    papers.cosine(), papers.attention("differential", papers.differential), papers.attention("sink", papers.softmax_sink),
]


@pytest.mark.parametrize("c", ALL, ids=lambda c: f"{c.name}-{len(c.einsums)}")
def test_canonical_text_round_trips(c: Any) -> None:
    assert verify(c) is c
    assert parse(to_text(c)) == c
    assert to_text(parse(to_text(c))) == to_text(c)


def test_printed_in_the_papers_notation() -> None:
    assert show(papers.cascade4()).splitlines()[2:-1] == [
        "  QK[p,m] = Σ_e Q[p,e] · K[m,e]",
        "  GM[p] = max_m QK[p,m]",
        "  SN[p,m] = exp(QK[p,m] − GM[p])",
        "  SD[p] = Σ_m SN[p,m]",
        "  A[p,m] = SN[p,m] / SD[p]",
        "  AV[p,f] = Σ_m A[p,m] · V[m,f]",
    ]
    assert "RM[p,m1 + 1] = max(RM[p,m1], LM[p,m1])" in show(papers.cascade5())
