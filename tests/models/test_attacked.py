"""What an attack from outside found, by kind: numbers that change their sign, rows hidden by a row's own mask, empty sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import reattend
from tests.tiers import few

pytestmark = pytest.mark.thin(3)

LOWEST = torch.finfo(torch.float32).min
OURS = reattend.Policy(allow=("reattend",), deny=("original",), check="never")
Score = Callable[[Tensor, int], Tensor]


class Scored(nn.Module):
    """Attention whose scores are edited with a number of the call."""

    def __init__(self, edit: Score) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
        return self.edit(q @ k.mT * 0.25, w).softmax(-1) @ v


def _distance(s: Tensor) -> Tensor:
    return torch.arange(s.shape[-1]) - torch.arange(s.shape[-2])[:, None]


SIGNED: dict[str, Score] = {
    "absolute": lambda s, w: s * abs(w),
    "at least one": lambda s, w: s * max(w, 1),
    "a shifted triangle": lambda s, w: s.masked_fill(_distance(s) > w, LOWEST),
    "a shifted triangle of −∞": lambda s, w: s.masked_fill(_distance(s) > w, -math.inf),
    "a window": lambda s, w: s.masked_fill(_distance(s).abs() > w, -math.inf),
    "a slope": lambda s, w: s + _distance(s) * (w * 0.01),
    "a quotient": lambda s, w: s.masked_fill(_distance(s) // 4 > w // 2, LOWEST),
}


@pytest.mark.parametrize(
    ("name", "ours"),
    few(
        [(name, ours) for name in SIGNED for ours in (False, True)],
        ("absolute", False), ("a shifted triangle", True), ("a window", True), ("a quotient", False),
    ),
)
def test_a_number_of_the_call_is_no_size(name: str, ours: bool) -> None:
    """Open where it changes, and then of either sign."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Scored(SIGNED[name])
    optimised = reattend.optimize(Scored(SIGNED[name]), policy=OURS if ours else reattend.Policy())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for w in (5, 7, 9, -3, 0, -1, 6):
            x = [torch.randn(2, 3, 40, 16) for _ in range(3)]
            torch.testing.assert_close(optimised(*x, w), model(*x, w), rtol=0, atol=1e-5, equal_nan=True)


class Added(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


@pytest.mark.parametrize("candidate", ["reattend", "sdpa"])
@pytest.mark.parametrize("shape", [(40, 1), (3, 40, 1), (2, 1, 1, 1), (2, 3, 40, 1), (1,), ()])
def test_a_mask_of_whole_rows_hides_them(shape: tuple[int, ...], candidate: str) -> None:
    """Scores that are all −∞ by a number of the row: NaN, as in the model, with no net to help."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Added()
    policy = reattend.Policy(allow=(candidate,), deny=("original",), check="never")
    optimised = reattend.optimize(Added(), policy=policy)
    mask = torch.zeros(shape)
    hidden = mask.clone()
    hidden.view(-1)[:2] = -math.inf
    with torch.no_grad():
        for m in (mask, hidden, mask):
            x = [torch.randn(2, 3, 40, 16) for _ in range(3)]
            torch.testing.assert_close(optimised(*x, m), model(*x, m), rtol=0, atol=1e-5, equal_nan=True)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize("policy", [reattend.Policy(), OURS], ids=["default", "ours"])
@pytest.mark.parametrize("calls", [((2, 40), (2, 33), (0, 33), (2, 0)), ((2, 0),)], ids=["later", "first"])
def test_empty_batches_and_keys(calls: tuple[tuple[int, int], ...], policy: reattend.Policy) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Plain(), reattend.optimize(Plain(), policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch, keys in calls:
            q = torch.randn(batch, 3, 21, 16, requires_grad=True)
            k, v = (torch.randn(batch, 3, keys, 16) for _ in range(2))
            torch.testing.assert_close(optimised(q, k, v, 0.25), model(q, k, v, 0.25), rtol=0, atol=1e-5)


class Vendor(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_keys_without_a_width_are_named() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, v = torch.randn(2, 3, 21, 0), torch.randn(2, 3, 21, 8)
    optimised = reattend.optimize(Vendor())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(optimised(q, q, v), Vendor()(q, q, v))
    (miss,) = reattend.report(optimised).misses
    assert "width 0" in miss.reason


class Weighing(nn.Module):
    """Who asks for the weights gets them, and is told by whom."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.attention, self.average = nn.MultiheadAttention(32, 2, batch_first=True), average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, need_weights=True, average_attn_weights=self.average)  # type: ignore[no-any-return]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_an_attention_whose_weights_are_asked_for_is_named(average: bool, trained: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Weighing(average).eval(), torch.randn(2, 150, 32)
    with torch.set_grad_enabled(trained), warnings.catch_warnings():
        warnings.simplefilter("error")
        want = model(x)
        for made, own in zip(reattend.optimize(model)(x), want, strict=True):
            torch.testing.assert_close(made, own)
    (site,) = reattend.report(model).sites
    assert (site.name, site.kernel) == ("attention", "original")
    assert ("gradients flow through" if trained else "predicted fastest") in site.site.chosen.why


@pytest.mark.slow
def test_a_model_that_gives_its_attentions_names_them() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=64, num_attention_heads=2, num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(64, (2, 150))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        want = model(ids, output_attentions=True)
        reattend.optimize(model)
        made = model(ids, output_attentions=True)
        torch.testing.assert_close((made.logits, *made.attentions), (want.logits, *want.attentions))
        without = model(ids)
    torch.testing.assert_close(without.logits, want.logits, rtol=0, atol=1e-4)
    said = [any("what else reads scores or weights" in p for p in s.site.proofs) for s in reattend.report(model).sites]
    assert said == [True, True, False, False]


class Windowed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[-2])
        d = at[:, None] - at
        return (q @ k.mT * 0.25).masked_fill((d < 0) | (d >= 64), -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("rows", [8, 200])
@pytest.mark.parametrize("candidate", ["reattend", "sdpa"])
@pytest.mark.parametrize("trained", [False, True])
def test_queries_that_share_their_elements(rows: int, candidate: str, trained: bool) -> None:
    """A window that slides by one element: torch's own SDPA lays its result out by these strides, and writes it by others."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    policy = reattend.Policy(allow=(candidate,), deny=("original",), check="never")
    model, optimised = Windowed(), reattend.optimize(Windowed(), policy=policy)
    q = torch.randn(2, 3, rows + 15).unfold(-1, 16, 1).requires_grad_(trained)
    k, v = (torch.randn(2, 3, rows, 16) for _ in range(2))
    assert q.stride()[-2:] == (1, 1)
    with torch.set_grad_enabled(trained):
        made, want = optimised(q, k, v), model(q, k, v)
        torch.testing.assert_close(made, want, rtol=0, atol=1e-5)
        if trained:
            g = torch.randn(want.shape)
            (a,), (b,) = (torch.autograd.grad(y, q, g) for y in (made, want))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert set(reattend.report(optimised).kernels) == {candidate}


def test_a_scale_that_is_no_number() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Plain(), reattend.optimize(Plain(), policy=reattend.Policy(deny=("original",)))
    x = [torch.randn(2, 3, 21, 16) for _ in range(3)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (0.25, math.nan, math.inf):
            torch.testing.assert_close(optimised(*x, scale), model(*x, scale), rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("width", [8, 16])
def test_flex_attention_reads_no_key_behind_the_last(width: int) -> None:
    """Inductor's product of few channels takes 16 keys at a time, and writes what it reads too much over its maxima."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Plain()
    optimised = reattend.optimize(Plain(), policy=reattend.Policy(allow=("flex",), deny=("original",), check="never"))
    memory = torch.full((2 * 3 * 24 * width + 4096,), math.nan)
    k = memory[: 2 * 3 * 24 * width].view(2, 3, 24, width)
    k.copy_(torch.randn(k.shape))
    q, v = (torch.randn(2, 3, 24, width) for _ in range(2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(optimised(q, k, v, 0.25), model(q, k, v, 0.25), rtol=0, atol=1e-5)
    assert set(reattend.report(optimised).kernels) == {"flex"}


class Halved(nn.Module):
    """Keys that are read, and a tensor that is written before the attention ends."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, q: Tensor, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        k = self.made(b)
        a.mul_(0.5)
        return (q @ k.mT * 0.25).softmax(-1) @ v


@pytest.mark.parametrize("policy", [reattend.Policy(tune=False), OURS], ids=["default", "ours"])
@pytest.mark.parametrize("made", [lambda b: b.repeat(1, 1, 1, 1), lambda b: b.double().float() * 0.5], ids=["moved", "cast"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_inputs_that_share_memory(first: bool, made: Callable[[Tensor], Tensor], policy: reattend.Policy) -> None:
    """Two views of one tensor, given as two inputs: what is written into one is read in the other, at the first call or later."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Halved(made), reattend.optimize(Halved(made), policy=policy)
    ran = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for together in (first, not first, True, False):
            q, k, v, other = (torch.randn(2, 3, 24, 16) for _ in range(4))
            views = [(x[:, :2], x.view(x.shape)) if together else (other.clone()[:, :2], x) for x in (k.clone(), k.clone())]
            want, got = (m(q, a, b, v) for m, (a, b) in zip((model, optimised), views))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
            torch.testing.assert_close(views[1], views[0], rtol=0, atol=0)
            ran.append(reattend.report(optimised).kernels["reattend"])
    if policy is OURS and not first:
        assert ran[0] == 1
        assert ran[-1] == 2, ran


class Repeated(nn.Module):
    """One key head, repeated as often as there are query heads."""

    def forward(self, x: Tensor) -> Tensor:
        k = x[:, :1].repeat(1, x.shape[1], 1, 1)
        return (x @ k.mT * 0.25).softmax(-1) @ k


def test_heads_are_repeated_as_often_as_an_open_size_says() -> None:
    """The net computes the model's own code again: where a number of repeats is open as well."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Repeated(), reattend.optimize(Repeated(), policy=reattend.Policy(deny=("original",)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((2, 3, 12, 16), (1, 2, 33, 16), (3, 4, 33, 16)):
            x = torch.randn(shape)
            torch.testing.assert_close(optimised(x), model(x), rtol=0, atol=1e-5)
    assert all(c.ok for c in reattend.report(optimised).checks)


@pytest.mark.parametrize("candidate", ["reattend", "sdpa"])
def test_a_result_is_no_view(candidate: str) -> None:
    """What was made without gradients may be written with them, and be detached in place."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    policy = reattend.Policy(allow=(candidate,), deny=("original",), check="never")
    model, optimised = Plain(), reattend.optimize(Plain(), policy=policy)
    x, w = [torch.randn(2, 3, 21, 16) for _ in range(3)], torch.ones(16, requires_grad=True)
    with torch.no_grad():
        want, got = (m(*x, 0.25) for m in (model, optimised))
    assert set(reattend.report(optimised).kernels) == {candidate}
    for out in (want, got):
        out.mul_(w).detach_()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flat", [torch.trunc, pytest.param(lambda s: s.round() * 0.5, marks=pytest.mark.slow)])
def test_a_score_without_a_gradient(flat: Callable[[Tensor], Tensor]) -> None:
    """The gradient of its products is a number, 0."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, optimised = Scored(lambda s, w: flat(s * w)), reattend.optimize(Scored(lambda s, w: flat(s * w)), policy=OURS)
    found = []
    for m in (model, optimised):
        x = [torch.randn(2, 3, 21, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)]
        found.append(torch.autograd.grad(m(*x, 3).sin().sum(), x))
    assert set(reattend.report(optimised).kernels) == {"reattend"}
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_result_that_is_written_in_place_is_left_alone_without_an_alarm() -> None:
    """Where gradients are wanted the kernel needs the model's own code to stand by, and it cannot."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    optimised = reattend.optimize(Doubled(), policy=OURS)
    x = [torch.randn(2, 3, 21, 16, requires_grad=True) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(optimised(*x), Doubled()(*x), rtol=0, atol=1e-5)
    (check,) = reattend.report(optimised).checks
    assert "written in place" in check.why


class Doubled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT * 0.25).softmax(-1) @ v).mul_(2)
