"""Latent attention: the forms that are one function, the one that is not, and the weights that turn latents around."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reattend.patterns.attention.latent import Latent, Widths, absorbed, hadamard, naive, sliced
from reattend.patterns.cascade import Cascade
from reattend.patterns.evaluate import evaluate
from reattend.patterns.library.chunked import linear_chunks

SMALL = Widths(heads=4, latent=16, rotary=8, key=6, value=5, model=7, dtype="f64")
Tensors = dict[str, torch.Tensor]


def mla(groups: int = 1) -> Cascade:
    return absorbed(SMALL, groups=groups, batch=2, queries=3, keys=11).cascade


def tpla(slices: int) -> Latent:
    return sliced(slices, SMALL, batch=2, queries=3, keys=11)


def data(c: Cascade) -> Tensors:
    g = torch.Generator().manual_seed(5)
    return {t.name: torch.randn([int(s) for s in t.shape], generator=g, dtype=torch.float64) for t in c.inputs}


def run(c: Cascade, x: Tensors) -> torch.Tensor:
    return evaluate(c, {t.name: x[t.name].reshape([int(s) for s in t.shape]) for t in c.inputs}, widen=True)["Y"]


def inputs() -> Tensors:
    return data(mla()) | {"MU": torch.ones(1, dtype=torch.float64)}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-12 * max(1.0, float(b.abs().max())))


def test_expanded_and_absorbed_are_one_function() -> None:
    x = inputs()
    assert close(run(naive(SMALL, batch=2, queries=3, keys=11).cascade, x), run(mla(), x))


def test_TPLA_with_one_slice_is_MLA() -> None:
    one = tpla(1)
    assert one.exact
    x = inputs()
    assert close(run(one.cascade, x), run(mla(), x))


@pytest.mark.parametrize("slices", [2, 4])
def test_TPLA_with_more_slices_is_another_function(slices: int) -> None:
    latent = tpla(slices)
    assert not latent.exact
    assert "is not one over the whole" in latent.why
    x = inputs() | {"MU": torch.ones(slices, dtype=torch.float64)}
    whole = run(mla(), x)
    assert (run(latent.cascade, x) - whole).abs().max() > 0.05 * whole.abs().max()


def test_GLA_with_one_group_is_MLA() -> None:
    x = inputs()
    assert close(run(mla(groups=1), x), run(mla(), x))
    grouped = mla(groups=2)
    assert grouped.tensor["C"].shape == (2, 11, 2, 16)


@pytest.mark.parametrize("turn", ["hadamard", "random"])
def test_C12_an_orthogonal_change_of_latents_changes_nothing(turn: str) -> None:
    """C12: C ← C·U, WUK ← WUK·U, WUV ← Uᵀ·WUV, below 1e-12 in float64; the norm of every latent stays."""
    x = inputs()
    u = torch.from_numpy(hadamard(16))
    if turn == "random":
        u = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    turned = x | {"C": x["C"] @ u, "WUK": x["WUK"] @ u, "WUV": u.mT @ x["WUV"]}
    c = mla()
    before, after = run(c, x), run(c, turned)
    assert (after - before).abs().max() < 1e-12 * before.abs().max()
    assert close(turned["C"].norm(dim=-1), x["C"].norm(dim=-1))


def test_C13_hadamard() -> None:
    """C13: (100,0,0,0) → (50,50,50,50); (0,0,80,0) → (40,40,−40,−40)."""
    h = hadamard(4)
    assert np.allclose(np.array([100.0, 0, 0, 0]) @ h, [50, 50, 50, 50])
    assert np.allclose(np.array([0.0, 0, 80, 0]) @ h, [40, 40, -40, -40])
    assert np.allclose(h @ h.T, np.eye(4))
    with pytest.raises(ValueError, match="power of two"):
        hadamard(6)


@pytest.mark.parametrize("decay", [False, True])
def test_chunks_of_linear_attention_are_the_whole(decay: bool) -> None:
    c = linear_chunks(batch=2, heads=2, chunks=3, chunk=4, embed=5, value=6, decay=decay, dtype="f64")
    x = data(c)
    q, k, v = (x[n].reshape(2, 2, 12, -1) for n in "QKV")
    weight = torch.ones(12, 12, dtype=torch.float64).tril().expand(2, 2, 12, 12).clone()
    if decay:
        # a token of chunk i is scaled by the factors of the chunks between its own and the query's
        sign = torch.cumprod(torch.cat([torch.ones(2, 2, 1, dtype=torch.float64), x["G"]], -1), -1)
        at = torch.arange(12) // 4
        later = at[:, None] > at[None, :]
        ratio = sign[..., at][..., :, None] / sign[..., at + 1][..., None, :]
        weight = torch.where(later, ratio, weight)
    expected = ((q @ k.mT) * weight) @ v
    out = evaluate(c, x, widen=True)["O"].reshape(2, 2, 12, -1)
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10)
