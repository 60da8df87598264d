"""Feature maps that are learned: what they are before, what fitting gains on examples it never saw, and how they are kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reattend.rewriter.approximate import feature_maps as fm

HEADS, TOKENS, WIDTH = 2, 24, 8
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def drawn(seed: int, examples: int = 4, sharp: float = 3.0) -> tuple[Tensor, Tensor]:
    """Queries that look for one of eight directions, keys that lie near them: attention with a structure to be learned."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.eye(WIDTH)
    q, k = (centres[torch.randint(WIDTH, (examples, HEADS, TOKENS), generator=g)] for _ in range(2))
    return sharp * q, sharp * k + 0.1 * torch.randn(k.shape, generator=g)


def test_features_sum_to_two_and_rows_to_one() -> None:
    q, k = drawn(0)
    maps = fm.identity(HEADS, WIDTH, WIDTH)
    phi = fm.features(q, maps.query)
    assert phi.shape == (4, HEADS, TOKENS, 2 * WIDTH)
    assert float(phi.min()) >= 0
    torch.testing.assert_close(phi.sum(-1), torch.full_like(phi[..., 0], 2.0))
    rows = fm.rows(q, k, maps, CAUSAL, 1.0)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    assert float(rows.masked_fill(CAUSAL, 0).abs().max()) == 0


def test_a_steep_identity_finds_equal_directions_alone() -> None:
    """W → identity · τ, τ → ∞: features are one-hot, and a row is even over the keys of its own direction."""
    q = torch.eye(WIDTH).repeat(3, 1)[None, None]
    w = 200 * torch.eye(WIDTH)[None]
    positive = fm.features(q, w)[..., :WIDTH]
    torch.testing.assert_close(positive, torch.eye(WIDTH).repeat(3, 1)[None, None])


def test_fitting_gains_on_examples_it_never_saw_and_is_the_same_again() -> None:
    captured, held_out = [drawn(1), drawn(2)], drawn(3)
    made = fm.fit(captured, held_out, CAUSAL, 1.0, count=WIDTH, steps=60)
    again = fm.fit(captured, held_out, CAUSAL, 1.0, count=WIDTH, steps=60)
    assert torch.equal(made.maps.query, again.maps.query)
    assert made.after < 0.75 * made.before
    for h in range(HEADS):
        assert made.held_out[h] < 0.5 * made.uniform[h]


def test_a_window_over_all_keys_is_the_softmax_and_far_keys_weigh_by_the_gain() -> None:
    q, k = drawn(4, examples=1)
    maps = fm.identity(HEADS, WIDTH, WIDTH)
    exact = (q @ k.mT).masked_fill(~CAUSAL, -math.inf).softmax(-1)
    torch.testing.assert_close(fm.rows(q, k, maps, CAUSAL, 1.0, TOKENS), exact)
    some = fm.FeatureMaps(maps.query, maps.key, torch.tensor([0.0, math.log(2.0)]))
    rows, twice = (fm.rows(q, k, x, CAUSAL, 1.0, 3)[0, 1, 20] for x in (maps, some))
    far, near = slice(0, 18), slice(18, 21)
    torch.testing.assert_close(twice[far].sum() / twice[near].sum(), 2 * rows[far].sum() / rows[near].sum())


def test_more_directions_than_the_width_are_drawn() -> None:
    w = fm.identity(HEADS, WIDTH, 12).query
    assert torch.equal(w[0, :, :WIDTH], torch.eye(WIDTH))
    torch.testing.assert_close(w[1, :, WIDTH:].norm(dim=0), torch.ones(4))


def test_maps_are_kept_as_safetensors(tmp_path: Path) -> None:
    maps = {"layers.0.attention": fm.identity(2, 4, 4), "layers.1.attention": fm.identity(2, 4, 6, seed=3)}
    path = tmp_path / "maps.safetensors"
    fm.save(path, maps)
    back = fm.load(path)
    assert list(back) == list(maps)
    for n in maps:
        assert torch.equal(back[n].query, maps[n].query)
        assert torch.equal(back[n].key, maps[n].key)
    # a length, then JSON: no pickle
    assert path.read_bytes()[8:9] == b"{"


def test_what_cannot_be_fitted_or_read_is_said(tmp_path: Path) -> None:
    q, k = drawn(0)
    with pytest.raises(ValueError, match="none were given"):
        fm.fit([], (q, k), CAUSAL, 1.0, count=4)
    with pytest.raises(ValueError, match="not finite"):
        fm.fit([(q * math.nan, k)], (q, k), CAUSAL, 1.0, count=4)
    with pytest.raises(ValueError, match="two tensors"):
        fm.FeatureMaps(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2))
    import safetensors.torch

    safetensors.torch.save_file({"a.query": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no feature maps"):
        fm.load(tmp_path / "other.safetensors")
