"""VMoBA: blocks of time, of a frame and of both, which a row's or a head's largest gates choose."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import reattend
from reattend.patterns.evaluate import evaluate
from reattend.patterns.methods.fitted import HeadsSeen
from reattend.patterns.methods.method import Replacement
from reattend.patterns.methods.selected.vmoba import VMoBA
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import causal, dense, draw, view

PLANE, N = (4, 4, 6), 96
BLOCKS = ((2, 0, 0), (0, 2, 3), (2, 2, 3))
SIZES = {"B": 1, "H": 2, "E": 8, "F": 8}


def members(block: tuple[int, ...]) -> Tensor:
    """[blocks, tokens]: which token is in which block, token by token."""
    size = [b or n for n, b in zip(PLANE, block)]
    many = [n // b for n, b in zip(PLANE, size)]
    out = torch.zeros(many[0] * many[1] * many[2], N, dtype=torch.bool)
    for i, (t, y, x) in enumerate(product(*map(range, PLANE))):
        at = [c // b for c, b in zip((t, y, x), size)]
        out[(at[0] * many[1] + at[1]) * many[2] + at[2], i] = True
    return out


def expected(q: Tensor, k: Tensor, inside: Tensor, share: float, scope: str) -> Tensor:
    """[1, h, tokens, blocks]: gate by gate, in float64."""
    means = inside.double() @ k.double() / inside.sum(-1, keepdim=True)
    g = (q.double() @ means.mT) * 0.125
    kept = torch.zeros_like(g, dtype=torch.bool)
    for h in range(g.shape[1]):
        parts = [[(r, j) for r in range(N) for j in range(len(inside))]] if scope == "head" else [
            [(r, j) for j in range(len(inside))] for r in range(N)
        ]
        for part in parts:
            values = torch.stack([g[0, h, r, j] for r, j in part])
            values = (values - values.min()) / (values.max() - values.min())
            total, sofar = values.sum(), 0.0
            for i in values.argsort(descending=True).tolist():
                if sofar >= share * total:
                    break
                kept[0, h][part[i]] = True
                sofar += float(values[i])
    return kept | inside.T


def made_of(method: VMoBA, given: dict[str, Tensor]) -> tuple[Replacement, Tensor]:
    made = method.replace(view(dense, P=N, M=N, H=2))
    assert isinstance(made, Replacement), made
    assert made.program is not None
    return made, made.program.run(torch, given, SIZES)


@pytest.mark.parametrize("scope", ["row", "head"])
@pytest.mark.parametrize("layer", [0, 1, 2, 5])
def test_the_table_and_the_output_are_those_of_the_formula(layer: int, scope: str) -> None:
    given = draw(view(dense, P=N, M=N, H=2), seed=layer)
    made, table = made_of(VMoBA(PLANE, BLOCKS, 0.4, scope, layer=layer), given)
    inside = members(BLOCKS[layer % 3])
    want = expected(given["Q"], given["K"], inside, 0.4, scope)
    assert torch.equal(table, want)
    out = evaluate(made.cascade, given | {made.table: table}, SIZES, widen=True)["O"]
    q, k, v = (given[n].double() for n in "QKV")
    pairs = (want.double() @ inside.double()) > 0
    assert (out - (q @ k.mT * 0.125).masked_fill(~pairs, -torch.inf).softmax(-1) @ v).abs().max() < 1e-12


@pytest.mark.parametrize("more", [{"share": 1.0}, {"share": 1.0, "scope": "row"}, {"count": 8}])
def test_a_full_budget_keeps_everything(more: dict[str, object]) -> None:
    _, table = made_of(VMoBA(PLANE, BLOCKS, layer=2, **more), draw(view(dense, P=N, M=N, H=2)))  # type: ignore[arg-type]
    assert table.all()


def test_rows_whose_gates_are_equal_and_a_needle() -> None:
    given = draw(view(dense, P=N, M=N, H=2))
    given["Q"] = torch.zeros_like(given["Q"])
    _, table = made_of(VMoBA(PLANE, BLOCKS, 0.25, "row", layer=2), given)
    # equal gates: two of eight blocks, and a row's own
    assert set(table.sum(-1).flatten().tolist()) == {2, 3}
    given["Q"][:, :, :, 0], given["K"] = 9.0, given["K"] * 0.01
    needle = 77
    given["K"][:, :, needle, 0] = 50.0
    inside = members(BLOCKS[2])
    _, table = made_of(VMoBA(PLANE, BLOCKS, 0.05, "row", layer=2), given)
    assert table[..., int(inside[:, needle].nonzero())].all()
    _, table = made_of(VMoBA(PLANE, BLOCKS, count=2, layer=2), given)
    assert (table.sum(-1) == 2).all()
    assert (table | ~inside.T).all()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_share_is_that_of_the_tiles_that_are_visited(layer: int) -> None:
    """Tokens of a cube lie apart: a tile of 32 rows and keys as they lie is visited where one pair of it is kept."""
    made, table = made_of(VMoBA(PLANE, BLOCKS, count=2, layer=layer), draw(view(dense, P=N, M=N, H=2)))
    pairs = (table.double() @ members(BLOCKS[layer]).double()) > 0
    visited = pairs.reshape(1, 2, 3, 32, 3, 32).any(-1).any(-2)
    assert made.program is not None
    assert made.program.share(table, SIZES) == pytest.approx(float(visited.double().mean()))
    assert visited.double().mean() >= table.double().mean()


def test_layers_take_the_shapes_in_turn() -> None:
    found = VMoBA(PLANE, BLOCKS).fit({n: HeadsSeen((), ()) for n in ("a", "b", "c", "d")})
    assert [found[n].block for n in "abcd"] == [(2, 4, 6), (4, 2, 3), (2, 2, 3), (2, 4, 6)]


def test_what_it_is_not_for_is_a_sentence() -> None:
    whole = view(dense, P=N, M=N, H=2)
    for method, a, said in (
        (VMoBA(PLANE, BLOCKS), whole, "by the number of the layer"), (VMoBA((4, 4), ((2, 2),), layer=0), whole, "not the 16 tokens"),
        (VMoBA(PLANE, BLOCKS, layer=0), view(causal, P=N, M=N), "which a mask would hide in part"),
    ):
        no = method.replace(a)
        assert isinstance(no, Refusal)
        assert said in no.reason
    for bad, said in (
        ({"blocks": ((3, 0, 0),)}, "blocks of 3 do not divide an axis of 4"), ({"blocks": ((2, 2),)}, "3 numbers, one an axis"),
        ({"blocks": BLOCKS, "scope": "all"}, 'the scope "row" or "head"'),
    ):
        with pytest.raises(ValueError, match=said):
            VMoBA(PLANE, **bad)


class Video(torch.nn.Module):
    """Two layers of 16 frames of 8 × 8 tokens that like their own frame."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 96) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


@pytest.mark.slow
def test_a_model_runs_it_by_layers() -> None:
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(16, 1, 32, generator=g).expand(16, 64, 32).reshape(1, 1024, 32)
    data = [3 * frames + 0.1 * torch.randn(1, 1024, 32, generator=g) for _ in range(4)]
    torch.manual_seed(0)
    model, method = Video().eval(), VMoBA((16, 8, 8), ((1, 0, 0), (2, 0, 0)), count=2)
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.9, calibration=data)
    with torch.no_grad():
        exact = model(data[0])
        reattend.optimize(model, policy=policy)
        out = model(data[0])
    report = reattend.report(model)
    assert any(s.kernel == str(method) for s in report.sites), report
    assert 0 < (out - exact).norm() / exact.norm() < 0.9
    assert {c.verdict for c in report.checks} == {"same"}
    notes = [" ".join(s.site.notes) for s in report.sites]
    assert [f"layer={i})" in x for i, x in enumerate(notes)] == [s.kernel == str(method) for s in report.sites]
