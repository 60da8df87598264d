"""Cascades of the field against plain PyTorch in float64."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from reattend.patterns.cascade import parse, to_text, verify
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library import variants
from reattend.patterns.library.papers import attention

from . import rules

torch.set_num_threads(1)
SIZES = {"B": 2, "H": 3, "P": 7, "M": 12, "E": 5, "F": 4, "M1": 3, "M0": 4, "I": 9}
CASCADES = [
    variants.softcap(30.0), variants.cosine_softmax(), variants.differential(), variants.returned(),
    variants.talking_heads(), attention("entmax", variants.entmax(3)), variants.split_keys(), variants.layer_norm(),
    variants.layer_norm_moments(), variants.layer_norm_welford(), variants.causal_linear(), variants.gated_linear(),
    variants.decayed_linear(),
]


def run(c: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    t = rules.tensors(c, sizes=SIZES)
    return t, evaluate(c, t, {k: v for k, v in SIZES.items() if k in c.free_symbols}, widen=True)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("c", CASCADES, ids=lambda c: c.name)
def test_verified_and_canonical(c: Any) -> None:
    assert verify(c) is c
    assert parse(to_text(c)) == c


def test_softcap() -> None:
    t, out = run(variants.softcap(30.0))
    s = torch.tanh(t["Q"] @ t["K"].mT * 0.125 / 30.0) * 30.0
    assert close(out["O"], s.softmax(-1) @ t["V"])


def test_cosine() -> None:
    t, out = run(variants.cosine_softmax())
    q, k = (t[n] * (t[n].square().sum(-1, keepdim=True) + 1e-6).rsqrt() for n in "QK")
    assert close(out["AV"], (q @ k.T * 10.0).softmax(-1) @ t["V"])


def test_differential() -> None:
    t, out = run(variants.differential())
    first, second = ((t[f"Q{i}"] @ t[f"K{i}"].mT).softmax(-1) for i in (1, 2))
    assert close(out["O"], (first - t["lam"][:, None, None] * second) @ t["V"])


def test_returned() -> None:
    t, out = run(variants.returned())
    a = (t["Q"] @ t["K"].T).softmax(-1)
    assert close(out["A"], a)
    assert close(out["O"], a @ t["V"])


def test_talking_heads() -> None:
    t, out = run(variants.talking_heads())
    a = (t["Q"] @ t["K"].mT).softmax(-1)
    assert close(out["O"], torch.einsum("gh,hpm->gpm", t["W"], a) @ t["V"])


def test_split_keys() -> None:
    t, out = run(variants.split_keys())
    assert close(out["AV"], (t["Q"] @ t["K"].T).softmax(-1) @ t["V"])


def test_entmax_converges() -> None:
    c = attention("entmax", variants.entmax(12))
    t = rules.tensors(c, sizes={**SIZES, "F": 12})
    t["V"] = torch.eye(12, dtype=torch.float64).expand(2, 3, 12, 12).clone()
    weights = evaluate(c, t, {"P": 7}, widen=True)["O"]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    assert (weights >= 0).all()


@pytest.mark.parametrize(
    "c", [variants.layer_norm(), variants.layer_norm_moments(), variants.layer_norm_welford()], ids=lambda c: c.name
)
def test_layer_norms(c: Any) -> None:
    t, out = run(c)
    assert close(out["Y"], functional.layer_norm(t["X"], (SIZES["E"],)))


@pytest.mark.parametrize(
    "c", [variants.causal_linear(), variants.gated_linear(), variants.decayed_linear()], ids=lambda c: c.name
)
def test_recurrent_linear_attention(c: Any) -> None:
    """The recurrence, and without a gate the masked quadratic form."""
    t, out = run(c)
    state = torch.zeros(SIZES["E"], SIZES["F"], dtype=torch.float64)
    for i in range(SIZES["I"]):
        gate = t["G"][i] if "G" in t else torch.tensor(1.0)
        state = (gate[:, None] if gate.dim() else gate) * state + t["K"][i][:, None] * t["V"][i]
        assert close(out["O"][i], t["Q"][i] @ state)
    if "G" not in t:
        assert close(out["O"], (t["Q"] @ t["K"].T).tril() @ t["V"])
