"""The net's parts: the cut of an operator is the operator's cut, errors and their limits, rows, verdicts, what is left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend.codegen.files import cache
from reattend.rewriter.check import rows
from reattend.rewriter.check.compare import errors
from reattend.rewriter.check.cut import cut
from reattend.rewriter.check.demand import Demand, everything, groups, kept, pick
from reattend.rewriter.check.own import Uncheckable, read
from reattend.rewriter.check.rows import Budget, picked, poor
from reattend.rewriter.splice import sampling
from tests.loading import script
from tests.tiers import few, one_in

from .helpers import graph_of

# Dynamo looks the module of a function up by its name
CASES = script("tests/cases/spellings.py").CASES


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


N = 12
OPERATORS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "matmul": (lambda a, b: a @ b, [r(2, 3, 5, 4), r(3, 4, 6)]),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b), [r(5, 1), r(3, 5, 4), r(3, 4, 6)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b), [r(6), r(5, 4), r(4, 6)]),
    "linear": (lambda x, w, b: F.linear(x, w, b), [r(2, 5, 4), r(6, 4), r(6)]),
    "einsum": (lambda a, b: torch.einsum("bpe,me->bmp", a, b), [r(2, 5, 4), r(6, 4)]),
    "einsum of one": (lambda a, b: torch.einsum("bp,bm->bpm", a, b), [r(2, 5), r(1, 6)]),
    "softmax": (lambda x: x.softmax(-2), [r(2, 5, 4)]),
    "softmax of rows without a key": (lambda x: torch.ops.aten._safe_softmax(x, -2), [r(2, 5, 4)]),
    "running sum": (lambda x: x.cumsum(1), [r(2, 5, 4)]),
    "sum": (lambda x: x.sum((0, -1)), [r(2, 5, 4, 3)]),
    "largest": (lambda x: x.amax(-1, keepdim=True), [r(2, 5, 4)]),
    "max": (lambda x: x - x.max(-1, keepdim=True).values, [r(2, 5, 4)]),
    "topk": (lambda x: x.topk(3, 1).values, [r(2, 5, 4)]),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), [r(2, 5, 4)]),
    "sdpa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), [r(2, 3, 5, 4), r(2, 3, 6, 4), r(2, 3, 6, 4)]),
    "sdpa causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [r(2, 3, 5, 4), r(2, 3, 5, 4), r(2, 3, 5, 4)],
    ),
    "sdpa grouped": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True),
        [r(2, 4, 5, 4), r(2, 2, 6, 4), r(2, 2, 6, 4), r(5, 6) > -1],
    ),
    "merge": (lambda x: x.reshape(6, 20), [r(2, 3, 5, 4)]),
    "split": (lambda x: x.view(2, 3, 4, 5), [r(6, 20)]),
    "merge and split": (lambda x: x.reshape(4, 3, 10), [r(2, 6, 10)]),
    "heads repeated": (lambda x: x[:, :, None].expand(2, 2, 3, 5, 4).reshape(2, 6, 5, 4), [r(2, 2, 5, 4)]),
    "flatten": (lambda x: x.flatten(1, 2).unflatten(1, (5, 3)), [r(2, 3, 5, 4)]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(0), [r(1, 5, 4)]),
    "permute": (lambda x: x.permute(2, 0, 1).transpose(0, -1).mT, [r(2, 5, 4)]),
    "slice": (lambda x: x[:, 1:9:2], [r(2, N, 4)]),
    "select": (lambda x: x[:, 2], [r(2, 5, 4)]),
    "cat": (lambda a, b: torch.cat([a, b], -1), [r(2, 5, 4), r(2, 5, 3)]),
    "stack": (lambda a, b: torch.stack([a, b], 1), [r(2, 5), r(2, 5)]),
    "repeat": (lambda x: x.repeat(2, 1, 3), [r(5, 4)]),
    "repeat interleaved": (lambda x: x.repeat_interleave(3, 1), [r(2, 5, 4)]),
    "table": (lambda t, i: t[i].permute(2, 0, 1), [r(9, 3), torch.randint(0, 9, (5, 6))]),
    "index": (lambda x, i, j: x[:, i, j], [r(3, 5, 6), torch.randint(0, 5, (4, 1)), torch.randint(0, 6, (2,))]),
    "gather": (lambda x, i: x.gather(-1, i), [r(2, 5, 6), torch.randint(0, 6, (2, 5, 3))]),
    "index select": (lambda x, i: x.index_select(1, i), [r(2, 5, 6), torch.randint(0, 5, (7,))]),
    "embedding": (lambda w, i: F.embedding(i, w), [r(9, 4), torch.randint(0, 9, (2, 5))]),
    "lower triangle": (lambda x: x.tril(1) + x.triu(-2), [r(5, 6)]),
    "made": (lambda x: x + torch.ones(5, 6).tril() + torch.zeros_like(x) + x.new_full((5, 1), 2.0), [r(5, 6)]),
    "causal fill": (lambda x: x.masked_fill(torch.arange(N)[:, None] < torch.arange(N), -1.0), [r(N, N)]),
    "in place": (lambda x: (x * 2).masked_fill_(x > 0, -1.0).add_(x).sigmoid(), [r(5, 6)]),
    "in place through a view": (lambda x: _view_written(x * 2), [r(5, 6)]),
    "written and then seen in part": (lambda x: _written_and_cut(x), [r(5, 6)]),
    "converted": (lambda x, y: x.type_as(y).to(torch.float64), [r(5, 6).double(), r(3)]),
    "a slice laid in": (lambda x, y: torch.slice_scatter(x, y, 1, 1, 4), [r(2, 5, 6), r(2, 3, 6)]),
    "a column laid in": (lambda x, y: torch.select_scatter(x, y, -1, 2), [r(2, 5, 6), r(2, 5)]),
    "a diagonal laid in": (lambda x, y: torch.diagonal_scatter(x, y, 1, 0, 2), [r(5, 3, 6), r(3, 5)]),
    "a diagonal": (lambda x: x.diagonal(1, -1, 0), [r(5, 3, 6)]),
    "filled at indices": (lambda x, i: x.index_fill(1, i, 3.0), [r(2, 5, 6), torch.tensor([0, 3])]),
    "put by a mask": (
        lambda x, m, c: torch.ops.aten.index_put(x, [None, m], c),
        [r(2, 5, 6), torch.randn(5, 6) > 0, torch.tensor(2.0)],
    ),
    "put at indices": (lambda x, i, c: x.index_put((i,), c), [r(5, 6), torch.tensor([0, 3]), torch.tensor(2.0)]),
    "without a rule": (lambda x: torch.flip(x, (0,)).roll(1, 1), [r(5, 6)]),
}


def _written_and_cut(x: Tensor) -> Tensor:
    out = torch.zeros(5, 7)
    out.scatter_(-1, torch.arange(5)[:, None], 2.0)
    return x + out[..., :6].unsqueeze(0)[0]


def _view_written(x: Tensor) -> Tensor:
    x[1:3].zero_()
    return x + 1


def demands(shape: Sequence[int]) -> list[Demand]:
    """Each dimension cut alone, and all of them."""
    some = [tuple(sorted({0, n // 2, n - 1})) for n in shape]
    alone = [tuple(s if i == d else None for i in range(len(shape))) for d, s in enumerate(some)]
    return [*alone, tuple(some), everything(shape)]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_cut_of_an_operator_is_the_cut_of_its_output(name: str) -> None:
    fn, args = OPERATORS[name]
    own = read(graph_of(fn, args), args)
    want = fn(*args)
    for demand in demands(want.shape):
        program = cut(own, demand)
        got, exact = program.run(args)
        expected = pick(want, everything(want.shape), demand)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(exact, expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if n not in ("dropout_train",)])
def test_the_cut_of_a_spelling_is_the_cut_of_its_output(name: str) -> None:
    case = CASES[name]
    args = [a.to(case["dtype"]) if a.is_floating_point() else a for a in case["args"]()]
    want = case["fn"](*args)
    if not isinstance(want, Tensor):
        want, fn = want[0], lambda *a: case["fn"](*a)[0]
    else:
        fn = case["fn"]
    own = read(graph_of(fn, args), args)
    for demand in demands(want.shape):
        got, _ = cut(own, demand).run(args)
        torch.testing.assert_close(got, pick(want, everything(want.shape), demand))


def test_a_cut_saves_what_it_leaves_out() -> None:
    """Eight rows of 512 need no 512 × 512 scores, and two of four heads no others' keys."""
    args = [torch.randn(1, 4, 512, 16) for _ in range(3)]

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(512, 512, dtype=torch.bool).tril()
        return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v

    own = read(graph_of(causal, args), args)
    whole, rows_ = (cut(own, d) for d in ((None,) * 4, (None, None, tuple(range(8)), None)))
    heads = cut(own, (None, (0, 3), tuple(range(8)), None))
    assert rows_.bytes * 60 < whole.bytes
    assert rows_.flops * 60 < whole.flops
    assert heads.flops * 2 == rows_.flops


def test_random_operators_are_not_run_again() -> None:
    with pytest.raises(Uncheckable, match="random numbers"):
        read(graph_of(lambda x: F.dropout(x, 0.5, True), [r(4)]), [r(4)])


def test_what_is_given_is_not_written() -> None:
    with pytest.raises(Uncheckable, match="writes into its inputs"):
        read(graph_of(lambda x: x.add_(1), [r(4)]), [r(4)])


def test_groups_of_a_reshape() -> None:
    assert list(groups([2, 3, 20], [6, 4, 5])) == [([0, 1], [0]), ([2], [1, 2])]
    assert list(groups([4, 6], [2, 12])) == [([0, 1], [0, 1])]


# --- which positions --------------------------------------------------------------------------------------------------


def test_positions_are_ends_special_ones_and_one_of_each_stretch() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = picked(4096, 64, [77, 900], generator)
    assert chosen is not None
    assert {0, 1, 77, 900, 4094, 4095} <= set(chosen)
    assert len(chosen) <= 64
    assert max(b - a for a, b in pairwise(chosen)) < 160
    assert picked(64, 64, [], generator) is None


def test_masks_say_where_few_keys_are() -> None:
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[1, :5] = False
    bias = torch.zeros(6, 7)
    bias[4, 2:] = float("-inf")
    found = poor([keep, bias, torch.randn(5, 4)])
    assert found == {8: [0, 4], 3: [1], 7: [2, 6], 6: [4]}


# --- errors -------------------------------------------------------------------------------------------------------------


def test_an_error_is_one_of_the_result_alone() -> None:
    exact = torch.randn(64, 32, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = exact.to(dtype)
        assert errors(own, own, exact).within()
        assert errors((exact + 1e-9).to(dtype), own, exact).within()
        assert not errors((exact * 1.05).to(dtype), own, exact).within()
        one = own.clone()
        one[7] = own[8]
        assert not errors(one, own, exact).within()


def test_a_value_that_is_no_number_counts() -> None:
    exact = torch.randn(8, 4, dtype=torch.float64)
    own = exact.float()
    wrong = own.clone()
    wrong[3] = float("nan")
    assert errors(wrong, own, exact).odd == 4
    assert not errors(own, wrong, wrong.double()).within()
    assert errors(wrong, wrong, wrong.double()).within()


@pytest.mark.parametrize(
    ("ours", "own", "exact", "odd"),
    [
        (math.inf, 65440.0, 65517.1, 0), (65440.0, math.inf, 65521.0, 0), (-math.inf, -65472.0, -65519.0, 0),
        (math.inf, 65440.0, 60000.0, 1), (-math.inf, 65440.0, 65517.1, 1), (math.nan, 65440.0, 65517.1, 1),
        (math.inf, 100.0, 65517.1, 1),
    ],
)
def test_beside_the_largest_number_of_a_type_rounding_tells(ours: float, own: float, exact: float, odd: int) -> None:
    a, b = (torch.tensor([[x, 1.0]], dtype=torch.float16) for x in (ours, own))
    assert errors(a, b, torch.tensor([[exact, 1.0]], dtype=torch.float64)).odd == odd


def test_what_the_models_own_rounding_changed_may_be_either() -> None:
    """An overflow in 16 bits, and a row that a fill of -1e9 flattened: both answers are right, and they widen nothing."""
    exact = torch.randn(8, 4, dtype=torch.float64)
    own = exact.half()
    own[0] = float("nan")
    own[1] = 0.25
    assert errors(own, own, exact).within()
    assert errors(exact.half(), own, exact).within()
    other = exact.half()
    other[2] *= 1.1
    assert not errors(other, own, exact).within()


def test_a_row_that_cancels_may_be_as_far_off_as_the_models_own() -> None:
    torch.manual_seed(0)
    exact = torch.randn(8, 32, dtype=torch.float64)
    own = exact.float()
    own[3] += 1e-3 * torch.randn(32)
    other = exact.float()
    other[3] += 0.5e-3 * torch.randn(32)
    assert errors(other, own, exact).within()
    other[3] += 5e-3 * torch.randn(32)
    assert not errors(other, own, exact).within()
    # and it widens nothing for other rows
    other = own.clone()
    other[4] += 0.5e-3 * torch.randn(32)
    assert not errors(other, own, exact).within()


@pytest.mark.parametrize("dtype", few([torch.float64, torch.float32], torch.float32))
def test_a_gradient_behind_a_saturated_softmax_is_no_false_alarm(dtype: torch.dtype) -> None:
    """p·(dp − Σ p·dp) cancels: by how much the model's own code is off on few rows is luck, and in float64 nothing."""
    for seed in range(6):
        torch.manual_seed(seed)
        x = [torch.randn(2, 2, 3, 48, dtype=dtype) for _ in range(3)]
        q, k = (F.layer_norm(t, (48,)) for t in x[:2])
        model = reattend.optimize(Unscaled(), policy=reattend.Policy(allow="sdpa", deny="original"))
        model(*(t.detach().requires_grad_() for t in (q, k, x[2])))
        (check,) = reattend.report(model).checks
        assert (check.verdict, check.gradients) == ("same", True), check


class Causal(nn.Module):
    """Several layers: the first row of each has one key, whose queries get no gradient."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        for _ in range(3):
            v = v + (q @ k.mT * 0.25).masked_fill(~keep, -torch.inf).softmax(-1) @ v
        return v


@pytest.mark.parametrize("dtype", few([torch.float64, torch.float32], torch.float32))
@pytest.mark.parametrize("what", few(["random", "large", "equal", "one key, many times"], "large", "equal"))
def test_gradients_that_are_nothing_are_no_false_alarm(what: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        x = [torch.randn(2, 4, 40 + seed, 16, dtype=dtype) for _ in range(3)]
        if what == "large":
            x = [x[0] * 8, x[1] * 8, x[2]]
        elif what == "equal":
            x = [torch.ones_like(t) * t[:1, :1, :1, :1] for t in x]
        elif what != "random":
            x[1] = x[1][:, :, :1].expand(-1, -1, x[1].shape[2], -1)
        model = reattend.optimize(Causal(), policy=reattend.Policy(allow="sdpa", deny="original"))
        model(*(t.detach().clone().requires_grad_() for t in x))
        checks = reattend.report(model).checks
        assert [(c.verdict, c.gradients) for c in checks] == [("same", True)] * 3, checks


class Unscaled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = (q @ k.mT).softmax(-1) @ v
        return out


# --- the whole --------------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        a = q @ k.mT * q.shape[-1] ** -0.5
        if keep is not None:
            a = a.masked_fill(~keep, float("-inf"))
        out: Tensor = a.softmax(-1) @ v
        return out


def optimised(check: str | int = "first", **options: Any) -> nn.Module:
    policy = reattend.Policy(allow=("sdpa", "reattend"), deny="original", check=check, **options)
    model: nn.Module = reattend.optimize(Attend(), policy=policy)
    return model


def test_random_state_gradients_and_inputs_are_left_alone() -> None:
    x = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]
    model, before = optimised(), [t.detach().clone() for t in x]
    state = torch.get_rng_state()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*x)
        first = len(packed)
        model(*x)
    assert reattend.report(model).checks[0].gradients
    assert len(packed) == 2 * first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.grad is None and torch.equal(t, b) for t, b in zip(x, before))


@pytest.mark.parametrize("tune", few([False, True], True))
def test_where_nobody_may_set_hooks_on_what_is_saved_it_is_checked_all_the_same(tune: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = reattend.optimize(Attend(), policy=reattend.Policy(allow="reattend", deny=("sdpa", "flex"), tune=tune))
    x = [torch.randn(1, 2, 150, 16, requires_grad=True) for _ in range(3)]
    with warnings.catch_warnings(), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        warnings.simplefilter("error")
        for _ in range(5):
            made, want = model(*x), Attend()(*x)
            torch.testing.assert_close(made, want, rtol=0, atol=1e-5)
            made.sum().backward()
    checks = reattend.report(model).checks
    assert {c.verdict for c in checks} == {"same"}
    assert any(c.gradients for c in checks)


def test_every_call_of_a_kind_is_checked_once_and_every_nth_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # a call that is timed runs its kernels once more
    monkeypatch.setattr(sampling, "due", lambda call: False)
    x = [torch.randn(1, 2, 64, 16) for _ in range(3)]
    for check, expected in (("first", 1), (1, 5), (2, 3)):
        model = optimised(check=check)
        with torch.no_grad():
            for _ in range(5):
                model(*x)
        assert len(reattend.report(model).checks) == expected


def test_a_mask_that_takes_keys_away_is_a_new_kind() -> None:
    model = reattend.optimize(Attend(), policy=reattend.Policy(allow="reattend", deny="original", check="first"))
    x = [torch.randn(2, 2, 64, 16) for _ in range(3)]
    keep = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    with torch.no_grad():
        model(*x, keep)
        model(*x, keep.clone())
        assert len(reattend.report(model).checks) == 1
        keep[0, ..., 40:] = False
        model(*x, keep)
        assert len(reattend.report(model).checks) == 2
        # a row without a key is another kind, also where keys were missing before
        keep[1] = False
        model(*x, keep)
    assert len(reattend.report(model).checks) == 3


def test_what_does_not_fit_keeps_the_original_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Budget(0, 0.0)
    monkeypatch.setattr(rows, "FULL", none)
    monkeypatch.setattr(rows, "SAMPLED", none)
    x = [torch.randn(1, 2, 48, 16) for _ in range(3)]
    model = optimised(check=1)
    with torch.no_grad(), pytest.warns(UserWarning, match="reattend: \\S+:\\d+ .*keeps the original code: even a sample of it"):
        assert torch.equal(model(*x), Attend()(*x))
    (check,) = reattend.report(model).checks
    assert (check.verdict, check.why[:20]) == ("unchecked", "even a sample of it ")
    assert "unchecked: " in str(reattend.report(model))
    assert reattend.report(model).fallbacks == 1


def test_gradients_that_reach_other_tensors_are_not_compared() -> None:
    """The own code reads queries that were scaled in place; the kernel, what they were made of."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q = self.project(x)
            q.mul_(0.25)
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, x, x))
            out: Tensor = (q @ k.mT).softmax(-1) @ v
            return out

    model, x = Scaled(), torch.randn(1, 64, 32)
    (want,) = torch.autograd.grad(model(x).square().sum(), model.project.weight)
    policy = reattend.Policy(allow="sdpa", deny="original", check=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = reattend.optimize(model, policy=policy)(x)
    (got,) = torch.autograd.grad(out.square().sum(), model.project.weight)
    torch.testing.assert_close(got, want)
    assert [(c.verdict, c.gradients) for c in reattend.report(model).checks] == [("same", False)]


def test_what_cannot_run_again_keeps_the_original_and_says_so() -> None:
    class Cleared(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            s = q @ k.mT
            weights = s.softmax(-1)
            s.zero_()
            out: Tensor = weights @ v
            return out

    x = [torch.randn(1, 2, 64, 16) for _ in range(3)]
    policy = reattend.Policy(allow="sdpa", deny="original", check="first")
    model = reattend.optimize(Cleared(), policy=policy)
    with torch.no_grad():
        assert torch.equal(model(*x), Cleared()(*x))
    report = reattend.report(model)
    assert [(c.verdict, c.why[:30]) for c in report.checks] == [("unchecked", "its own code cannot run again:")]
    assert [s.kernel for s in report.sites] == ["original"]


@pytest.mark.parametrize("value", ["often", 0, -1, True, None])
def test_a_wrong_value_is_one_sentence(value: Any) -> None:
    with pytest.raises(ValueError, match=r'Policy\(check\) must be "first", "never" or a number of calls above 0'):
        reattend.Policy(check=value)


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "_is_mine", lambda path: False)
    with pytest.warns(UserWarning, match="is not used .it belongs to another user."):
        assert tmp_path not in cache.directory.__wrapped__().parents


@pytest.mark.parametrize(
    ("candidate", "dtype", "grad"),
    few(
        [(c, t, g) for c in ("reattend", "sdpa") for t in (torch.float32, torch.bfloat16) for g in (False, True) if c == "sdpa" or not g],
        ("reattend", torch.float32, False),
    ),
)
@pytest.mark.parametrize("name", one_in(3, [n for n in CASES if n != "dropout_train"]))
def test_no_false_alarm(
    name: str, candidate: str, dtype: torch.dtype, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every spelling on every candidate, compared in full and on sampled rows."""
    case = CASES[name]
    args = [a.detach().to(dtype).requires_grad_(grad) if a.is_floating_point() else a for a in case["args"]()]
    try:
        case["fn"](*args)
    except RuntimeError:
        pytest.skip("the spelling itself mixes types")
    torch._dynamo.reset()
    model = Spelled(case["fn"])
    # every call is looked at, whatever is on disk
    policy = reattend.Policy(allow=candidate, deny="original", check=1)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error")
        reattend.optimize(model, policy=policy)
        model(*args)
        monkeypatch.setattr(rows, "FULL", Budget(0, 0.0))
        monkeypatch.setattr(rows, "KEPT", (5, 3, 2, 2, 2, 2))
        model(*args)
    checks = reattend.report(model).checks
    assert all(c.ok for c in checks), checks


class Spelled(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Tensor) -> Any:
        return self.fn(*args)


def test_kept_is_the_shape() -> None:
    assert kept([4, 5, 6], (None, (1, 2), (0,))) == [4, 2, 1]


def test_identical_layers_are_read_once_whatever_their_nodes_are_called() -> None:
    x = [torch.randn(1, 2, 32, 16) for _ in range(3)]
    first, second = graph_of(Attend(), x), graph_of(Attend(), x)
    for n in second.graph.nodes:
        n.name = f"{n.name}_of_layer_1"
    own = read(first, x)
    assert read(second, x) is own
    assert read(first, [t[:, :1] for t in x]) is not own
    assert read(first, [t.double() for t in x]) is not own

    class Halved(Attend):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
            return super().forward(q * 0.5, k, v)

    class Third(Attend):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
            return super().forward(q * 0.25, k, v)

    assert read(graph_of(Halved(), x), x) is not read(graph_of(Third(), x), x)


def test_fewer_rows_are_looked_at_where_many_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.randn(1, 2, 512, 16) for _ in range(3)]
    own = read(graph_of(Attend(), x), x)
    enough = cut(own, (None, None, tuple(range(16)), None))
    monkeypatch.setattr(rows, "FULL", Budget(0, 0.0))
    monkeypatch.setattr(rows, "SAMPLED", Budget(enough.bytes, enough.flops))
    shape = kept(own.shape, rows.fitting(own, x, torch.Generator()).wanted)
    assert shape[2] == 16
