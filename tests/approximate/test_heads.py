"""Heads told apart by a calibration: a Llama whose heads look at different places, and what each method makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.patterns.methods.by_head.duo_attention import DuoAttention
from reattend.patterns.methods.by_head.moa import MoA, Span
from reattend.patterns.methods.by_head.razor import RazorAttention
from reattend.patterns.methods.method import Method
from reattend.rewriter.approximate.data import CalibrationError, Example
from reattend.rewriter.approximate.heads import fit, repeated
from tests.approximate.test_selected_methods import llama

N, HEADS = 512, 4


class ByHead(nn.Module):
    """Scores fall by a slope of each head: heads with slope 0 look everywhere alike."""

    def __init__(self, slopes: tuple[float, ...]) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.slopes: Tensor
        self.register_buffer("slopes", torch.tensor(slopes))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        s = q @ k.mT * 0.1 + self.slopes[:, None, None] * (at[None] - at[:, None])
        s = s.masked_fill(at[None] > at[:, None], float("-inf"))
        out: Tensor = x + (s.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ByHead((1.0, 0.0, 1.0, 1.0))
        self.second = ByHead((0.0, 1.0, 1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def examples(n: int = N) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, 32, generator=g) for _ in range(4)]


def model() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


DUO = DuoAttention(share=0.375, sink=4, window=32)


@pytest.mark.slow
def test_full_are_the_heads_that_look_far_and_the_report_says_which() -> None:
    made = model()
    policy = reattend.Policy(approximate=True, methods=(DUO,), max_error=1e-3, calibration=examples())
    reattend.optimize(made, policy=policy)
    with torch.no_grad():
        out, exact = made(examples()[0]), model()(examples()[0])
    report = reattend.report(made)
    assert [s.kernel for s in report.sites] == [str(DUO)] * 2, report
    assert 0 < (out - exact).norm() / exact.norm() < 1e-3
    said = {s.name: " ".join(s.site.notes) for s in report.sites}
    assert "full=(1,))" in said["first"]
    assert "full=(0,3))" in said["second"]
    for s in report.sites:
        chosen = s.site.candidate(str(DUO))
        assert chosen.error is not None
        assert chosen.error.mass is not None
        assert chosen.error.mass.least > 0.999
        # of 16 × 16 tiles a full head visits 136, and a streaming one the last two of a row and the first
        full = 1 if s.name == "first" else 2
        assert chosen.density == (full * 136 + (4 - full) * 45) / (4 * 256)
    assert {c.verdict for c in report.checks} == {"same"}
    reattend.restore(made)


def test_without_a_calibration_it_is_listed_and_refused() -> None:
    policy = reattend.Policy(approximate=True, methods=(DUO,))
    site = reattend.plan(model(), (examples()[0],), policy=policy).sites[0]
    assert "found by a calibration" in site.candidate(str(DUO)).why
    assert site.chosen.exact


def test_spans_go_to_the_heads_that_need_them() -> None:
    method = MoA(density=0.47, sink=4, choices=(Span(32), Span(64), Span(16, 0.25)))
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=1e-3, calibration=examples())
    with torch.no_grad():
        found = fit(model(), policy, [Example((x,), {}) for x in examples()])
    assert all(isinstance(m, MoA) for m in found.values()), found
    spans = {s: m.spans for (s, _), m in found.items() if isinstance(m, MoA)}
    assert spans == {
        "first": (Span(32), Span(0, 1.0), Span(32), Span(32)), "second": (Span(0, 1.0), Span(32), Span(32), Span(0, 1.0)),
    }


def test_what_cannot_be_fitted_is_refused_with_its_reason() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.reshape(*x.shape[:2], HEADS, 8).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    policy = reattend.Policy(approximate=True, methods=(DUO,), max_error=0.5, calibration=examples(64), deny="flex")
    with torch.no_grad():
        (why,) = fit(Both().eval(), policy, [Example((x,), {}) for x in examples(64)]).values()
    assert not isinstance(why, Method)
    assert "needs a causal attention" in why.reason
    with pytest.raises(CalibrationError, match="no attention was found"):
        reattend.optimize(nn.Linear(32, 32).eval(), policy=policy)


def test_a_text_that_repeats_itself_is_made_of_the_examples_own_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(50, 90, (2, 22), generator=g), torch.ones(2, 22, dtype=torch.int64)
    places = torch.arange(22)[None]
    found = repeated(Example((places,), {"input_ids": ids, "attention_mask": mask}), g)
    assert not isinstance(found, str)
    text, many = found
    assert many == 5
    assert text.kwargs["attention_mask"] is mask
    made = text.kwargs["input_ids"]
    assert isinstance(made, Tensor)
    assert (made[:, 5:] == made[:, :-5]).all()
    assert set(made.flatten().tolist()) <= set(ids.flatten().tolist())
    assert "0 are token ids" in str(repeated(Example((torch.randn(1, 8, 4),), {}), g))
    assert "2 are token ids" in str(repeated(Example((ids, ids), {}), g))
    assert "too few" in str(repeated(Example((ids[:, :7],), {}), g))


@pytest.mark.parametrize(("lead", "known"), [((2, 3), True), ((1, 3), True), ((3, 1), False), ((1, 1), False)])
def test_heads_are_known_by_the_one_sequence_in_front_of_them(lead: tuple[int, int], known: bool) -> None:
    """A batch of one leaves one rank, which is that of the heads; a single head leaves that of the sequences."""

    class Causal(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    method = DuoAttention(full=())
    (site,) = reattend.plan(
        Causal().eval(), (torch.zeros(*lead, 64, 8),), policy=reattend.Policy(approximate=True, methods=(method,))
    ).sites
    found = site.candidate(str(method))
    assert found.feasible == known
    assert known or "known number of heads" in found.why


class Repeats(nn.Module):
    """Tokens as random directions; head 1 looks for equal tokens, head 3 for what stood behind one, the others near by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.v = nn.Embedding(40, 32), nn.Linear(32, 32)
        one, none = torch.eye(32), torch.zeros(32, 32)
        self.register_buffer("wq", torch.stack([torch.cat([one * x, none]) for x in (0.0, 1.0, 0.0, 1.0)]))
        self.register_buffer("wk", torch.stack([torch.cat(x) for x in [(one, none)] * 3 + [(none, one)]]))

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.normalize(self.embed(ids), dim=-1) * 8
        both = torch.cat([x, nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]], -1)
        q, k = (torch.einsum("bnc,hcf->bhnf", both, w) for w in (self.wq, self.wk))
        v = self.v(x).unflatten(-1, (HEADS, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.slow
def test_retrieval_heads_are_found_by_tokens_that_repeat_themselves() -> None:
    """Heads of no sharpness see all keys alike: the token of what they drop is exact."""
    torch.manual_seed(0)
    made = Repeats().eval()
    g = torch.Generator().manual_seed(0)
    data = [torch.randint(40, (1, N), generator=g) for _ in range(4)]
    method = RazorAttention(induction=0.25, echo=0.25, least=32, part=100)
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=1e-3, calibration=data)
    with torch.no_grad():
        (found,) = fit(made, policy, [Example((x,), {}) for x in data[:2]]).values()
        assert isinstance(found, RazorAttention)
        assert found.full == (1, 3)
        exact = made(data[0])
        # half of the heads see everything alike, so that only what the others drop could be wrong
        reattend.optimize(made, policy=reattend.Policy(
            approximate=True, methods=(method,), max_error=1e-3, calibration=data, deny=("sdpa", "flex"),
        ))
        out = made(data[0])
    report = reattend.report(made)
    (site,) = report.sites
    assert site.kernel == str(method), report
    assert (out - exact).norm() / exact.norm() < 1e-3
    (check,) = report.checks
    assert check.verdict == "same", check
    assert "full=(1,3))" in " ".join(site.site.notes)
    reattend.restore(made)


def test_without_token_ids_retrieval_heads_are_not_guessed() -> None:
    method = RazorAttention()
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.1, calibration=examples(64))
    with torch.no_grad():
        for why in fit(model(), policy, [Example((x,), {}) for x in examples(64)]).values():
            assert not isinstance(why, Method)
            assert "0 are token ids" in why.reason


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    DuoAttention(window=64, sink=16), MoA(density=0.4, sink=16, choices=(Span(64), Span(32, 0.25))),
    RazorAttention(induction=0.25, echo=0.0, least=64, part=16),
], ids=lambda x: getattr(x, "name", ""))
def test_a_llama_runs_it_within_its_error(method: Method) -> None:
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(97, (1, 1024), generator=g)} for _ in range(4)]
    plain, policy = llama(), reattend.Policy(approximate=True, methods=(method,), max_error=0.5, calibration=data)
    made = reattend.optimize(llama(), policy=policy)
    with torch.no_grad():
        near, exact = made(**data[0]).logits, plain(**data[0]).logits
    report = reattend.report(made)
    (site,) = report.sites
    assert site.kernel == str(method), report
    assert 0 < (near - exact).norm() / exact.norm() < 0.5
    error = site.site.candidate(str(method)).error
    assert error is not None
    assert error.mass is not None
    assert 0 < error.mass.least < 1
    assert "here it is" in " ".join(site.site.notes)
    (check,) = report.checks
    assert check.verdict == "same"
