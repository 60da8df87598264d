"""Which heads get what: methods whose parameters differ from attention to attention, fitted on the examples that configure.

    losses             every option of a method at all heads alike, beside the model's own code: what each head changes
    echo, induction    weight on the same token before, and on the one behind it, in random tokens that repeat themselves

Both are seen in one capture of the model. Nothing is learned, and the same data gives the same parameters.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...patterns import expr as ex
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import bind
from ...patterns.evaluate import evaluate
from ...patterns.methods.fitted import FittedMethod, HeadsSeen
from ...patterns.methods.linear.learned import LearnedMethod
from ...patterns.methods.masked import masked
from ...patterns.methods.method import Method, head_rank, key_group, positions
from ...patterns.methods.rows import ALL, KEPT, ROWS, kept_share
from ...patterns.verdict import Refusal
from ..choose import choose
from ..choose.approximations import Fitted
from ..choose.policy import CANDIDATES, Policy
from .data import Example, call
from .learned import learned
from .record import Recorder

# A text is so many times the same; examples that are shown as such a text; rows of each head that are looked at in one.
TIMES, TEXTS, LOOKED = 4, 2, 256
SEED = 0x3EAD


def fit(model: nn.Module, policy: Policy, examples: Sequence[Example]) -> Fitted:
    """The policy's methods that are to be fitted, at each attention with the parameters that it gets there, or why none."""
    wanted = [m for m in policy.methods if isinstance(m, FittedMethod) and not m.is_fitted]
    if not wanted:
        return {}
    options = tuple(dict.fromkeys(o for m in wanted for o in m.options))
    exact = replace(policy.exactly, deny=tuple(n for n in policy.deny if n in CANDIDATES))
    recorder = Recorder(replace(exact, approximate=True, methods=options), None)
    recorder.recording = True
    texts, scores = _texts(examples), _RepeatScores()
    with recorder.at_work(model):
        for recorder.example, e in enumerate(examples):
            call(model, e)
        if any(m.repeats for m in wanted) and not isinstance(texts, str):
            recorder.watch = scores.see
            for text, scores.period in texts:
                call(model, text)
        recorder.watch = None
        of_files = {m: learned(model, m, recorder, examples) for m in wanted if isinstance(m, LearnedMethod)}
    why = texts if isinstance(texts, str) else ""
    groups = _groups(recorder)
    out: dict[tuple[str, str], Method | Refusal] = {}
    for m in wanted:
        if m in of_files:
            out |= {(s, str(m)): x for s, x in of_files[m].items()}
            continue
        no = f"its heads are told apart by tokens that repeat themselves, and {why}" if m.repeats and why else ""
        seen = {s: _seen(m, s, recorder, scores, groups[s]) for s in recorder.sites}
        good = {s: x for s, x in seen.items() if isinstance(x, HeadsSeen)}
        found: Mapping[str, FittedMethod] = m.fit(good) if good and not no else {}
        for s, x in seen.items():
            why_here = x if isinstance(x, str) else "no choice for its heads is within what it may keep"
            out[s, str(m)] = found.get(s) or m.refuse(no or why_here)
    return out


def _groups(recorder: Recorder) -> dict[str, int]:
    """How many query heads share a key head, by site."""
    out = {}
    for d in (d for decisions in recorder.graphs for d in decisions.values()):
        view = attention(d.found.cascade)
        assert isinstance(view, Attention), view
        out[d.site.name] = key_group(view)
    return out


def _seen(m: FittedMethod, site: str, recorder: Recorder, scores: _RepeatScores, group: int) -> HeadsSeen | str:
    """What is known of an attention, or why a method cannot be fitted to it."""
    records = [recorder.records[site, str(o)] for o in m.options]
    if why := next((r.why for r in records if r.why), ""):
        return why
    if m.repeats and site not in scores.echo:
        return scores.why.get(site, "it did not run on tokens that repeat themselves")
    losses = []
    for r in records:
        heads = [statistics.fmean(x) for x in zip(*(s.parts for s in r.seen), strict=True)]
        losses.append(tuple(sum(heads[i : i + group]) for i in range(0, len(heads), group)))
    lengths = tuple(dict.fromkeys((s.queries, s.keys) for r in records[:1] for s in r.seen))
    return HeadsSeen(tuple(losses), lengths, group, *scores.of(site))


class _RepeatScores:
    """Echo and induction of every head at every site, summed over the texts."""

    def __init__(self) -> None:
        self.period = 0
        self.echo: dict[str, list[Tensor]] = {}
        self.induction: dict[str, list[Tensor]] = {}
        self.why: dict[str, str] = {}

    def of(self, site: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The means over the texts; nothing of a site that was not seen."""
        parts = [x.get(site) for x in (self.echo, self.induction)]
        echo, induction = (tuple(torch.stack(x).mean(0).tolist()) if x else () for x in parts)
        return echo, induction

    def see(self, d: choose.Decision, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Look at an attention of a text."""
        view, site = attention(d.found.cascade), d.site.name
        assert isinstance(view, Attention), view
        found = [repeat_share(view, tensors, sizes, self.period, behind) for behind in (0, 1)]
        if any(isinstance(x, str) for x in found):
            self.why[site] = next(x for x in found if isinstance(x, str))
            return
        for kind, x in zip((self.echo, self.induction), found):
            assert isinstance(x, Tensor)
            kind.setdefault(site, []).append(x)


def repeat_share(
    a: Attention, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], period: int, behind: int
) -> Tensor | str:
    """[heads], float64: the mean share of its weight that a row has on tokens before it that are equal to it (`behind` 0),
    or that stand so many places behind such a one; rows are those from `period` on, some where there are many. Or why there
    is no such number.
    """
    at = positions(a)
    if isinstance(at, Refusal):
        return at.reason
    if not at.causal:
        return "it is not causal: a token is not looked for among those before it"
    gap = at.row - at.key
    probe = masked(a, ex.equal((gap + behind) % period, 0) & (gap > 0), "tokens that repeat themselves")
    if isinstance(probe, Refusal):
        return probe.reason
    view = attention(probe)
    assert isinstance(view, Attention), view
    queries, keys = (int(bind(a.cascade.rank[r].size, sizes)) for r in (a.query, a.key))
    first = max(0, period - (keys - queries))
    if first >= queries:
        return "no row of it lies behind a token that is equal to its own"
    rows = torch.arange(first, queries)
    if len(rows) > LOOKED:
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:LOOKED]
        rows = rows[drawn.sort().values]
    given = {**tensors, ROWS: rows.to(next(iter(tensors.values())).device)}
    out = evaluate(kept_share(a, view), given, dict(sizes), widen=True)
    share = torch.where(out[ALL] == 0, 0.0, out[KEPT].double() / out[ALL].double())
    head = head_rank(a)
    dim = a.batch.index(head) if head is not None else None
    parts = (share,) if dim is None else share.unbind(dim)
    return torch.stack([x.mean() for x in parts]).cpu()


def _texts(examples: Sequence[Example]) -> list[tuple[Example, int]] | str:
    """Some examples with random tokens of their own, repeated, in the place of theirs, and how long one repetition is."""
    out = []
    for i, e in enumerate(examples[:TEXTS]):
        found = repeated(e, torch.Generator().manual_seed(SEED + i))
        if isinstance(found, str):
            return found
        out.append(found)
    return out


def repeated(e: Example, generator: torch.Generator) -> tuple[Example, int] | str:
    """An example whose tokens are drawn from its own and repeat themselves `TIMES` times, and how many there are of them.

    Tokens are the one tensor of integers [batch, tokens] that is neither a mask (two values at most) nor counts upwards.
    """
    places = [*((i, x) for i, x in enumerate(e.args)), *e.kwargs.items()]
    ids = [(at, x) for at, x in places if isinstance(x, Tensor) and _is_tokens(x)]
    if len(ids) != 1:
        return f"of the inputs of an example {len(ids)} are token ids [batch, tokens], where one must be"
    ((at, x),) = ids
    many = x.shape[1] // TIMES
    if many < 2:
        return f"its {x.shape[1]} tokens are too few to repeat {TIMES} times"
    drawn = x.flatten()[torch.randint(x.numel(), (x.shape[0], many), generator=generator).to(x.device)]
    text = drawn.repeat(1, TIMES + 1)[:, : x.shape[1]].contiguous()
    args = tuple(text if i == at else a for i, a in enumerate(e.args))
    return Example(args, {n: text if n == at else a for n, a in e.kwargs.items()}), many


def _is_tokens(x: Tensor) -> bool:
    if x.dim() != 2 or x.dtype not in (torch.int32, torch.int64) or len(set(x.flatten().tolist())) < 3:
        return False
    return not bool((x.diff(dim=1) == 1).all())
