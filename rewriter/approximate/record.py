"""A model run as written, with the attentions that a choice names computed by their methods, and what every method changes.

One capture serves all choices: at an attention's output the value is the own code's, or that of the method's kernel, the
very call that is spliced later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...cost_model.devices.device import Device
from ...patterns.attention.attention import Attention
from ...patterns.attention.recognise import attention
from ...patterns.cascade import bind
from ...patterns.evaluate import evaluate
from ...patterns.methods.method import head_rank
from ...patterns.methods.rows import ALL, KEPT, ROWS, kept_share
from ..capture import capture
from ..check.approximate import row_sample
from ..check.compare import relative
from ..choose import choose
from ..choose.approximations import Approximation, Fitted, Installed, kind_of
from ..choose.policy import Policy
from ..graph.functional import adopt
from ..run.session import Session
from ..splice import splice

# Scores, over all heads, that the kept weight of one attention is measured on: rows are drawn where there are more.
SCORES = 1 << 21
SEED = 0xCA1


@dataclass(frozen=True, eq=False)
class MethodSeen:
    """A method at an attention in one call: relative errors (L2) of the output, of each head, and the weight that rows keep.

    `mass`: [heads, rows], None where it was not looked at; `rows` of `of` were. `share` of its cells that a table kept.
    `parts`: what each head's change is of the squared output of the whole attention. `seconds` by the clock, and `exact`
    those of the best exact kernel beside it; None where the model's own code is the best.
    """

    example: int
    error: float
    heads: tuple[float, ...]
    mass: Tensor | None
    rows: int
    of: int
    queries: int
    keys: int
    share: float | None = None
    parts: tuple[float, ...] = ()
    seconds: float = 0.0
    exact: float | None = None


@dataclass
class SiteRecord:
    """What is known of a method at an attention. `saved`: predicted seconds over the best exact candidate, over all graphs.

    `why`: why it cannot be installed, or nothing. `seen` in the order of the calls.
    """

    saved: float = 0.0
    why: str = ""
    seen: list[MethodSeen] = field(default_factory=list)


class Recorder:
    """A backend that runs graphs as captured. `choice` names the methods to run by site; with `recording` all are tried.

    What rows keep is looked at on examples that are `held_out`. `watch` looks at attentions in the place of methods.
    """

    def __init__(self, policy: Policy, target: Device | None, fitted: Fitted | None = None) -> None:
        self.policy, self.target, self.found = policy, target, Installed(fitted=fitted or {})
        self.choice: Mapping[str, str] = {}
        self.recording, self.example, self.held_out = False, 0, False
        self.watch: Callable[[choose.Decision, Mapping[str, Tensor], Mapping[str, int]], None] | None = None
        self.records: dict[tuple[str, str], SiteRecord] = {}
        self.sites: dict[str, set[str]] = {}
        self.ahead: dict[tuple[str, str], str] = {}
        self.graphs: list[dict[fx.Node, choose.Decision]] = []
        self.timed: list[choose.Decision] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object], names: Mapping[int, str]) -> Callable[..., Any]:
        try:
            captured = capture.from_dynamo(gm, inputs, names)
        except capture.CaptureError:
            return gm.forward
        decisions, taken, again = {}, Counter[str](), Counter[str]()
        for region in capture.regions(captured.graph):
            adopt(region)
            made, _ = choose.decide(region, choose.Request(self.policy, installed=self.found), taken)
            decisions.update({d.found.output: d for d in made})
            for d in made:
                self.sites.setdefault(d.site.name, set()).add(kind_of(d.site))
            timed = made
            if self.target is not None:
                asked = choose.Request(self.policy, self.target, executable=False, installed=self.found)
                timed, _ = choose.decide(region, asked, again)
            for d in timed:
                self._enter(d)
            self.timed += timed
        self.graphs.append(decisions)
        return lambda *values: _BesideMethods(captured.graph, decisions, self).run(*values)

    @contextmanager
    def at_work(self, model: nn.Module) -> Iterator[None]:
        """Within it the model's calls come here."""
        session = Session(self.policy.exactly, None, backend=self)
        try:
            session.install(model)
            yield
        finally:
            session.detach()

    def _enter(self, d: choose.Decision) -> None:
        best = min(c.seconds for c in d.site.candidates if c.exact)
        for m in d.methods:
            record = self.records.setdefault((d.site.name, m.candidate.name), SiteRecord())
            record.why = record.why or m.candidate.why * (not m.candidate.feasible)
            if m.made is not None and m.made.ahead:
                self.ahead[d.site.name, m.candidate.name] = m.made.ahead
            record.saved += best - m.candidate.seconds if m.candidate.feasible else 0.0

    def reprice(self, examples: int) -> None:
        """Give methods that select the time, and the tiles, of the shares that they kept on the first `examples`."""
        shares: dict[tuple[str, str], float] = {}
        for at, r in self.records.items():
            seen = [s.share for s in r.seen if s.share is not None and s.example < examples]
            if seen and not r.why:
                shares[at], r.saved = sum(seen) / len(seen), 0.0
        for d in self.timed:
            best = min(c.seconds for c in d.site.candidates if c.exact)
            for m in d.methods:
                at = d.site.name, m.candidate.name
                if at in shares:
                    self.records[at].saved += best - m.expecting(shares[at]).candidate.seconds
        for decisions in self.graphs:
            for n, d in decisions.items():
                at_site = [shares.get((d.site.name, m.candidate.name)) for m in d.methods]
                methods = tuple(m if s is None else m.expecting(s) for m, s in zip(d.methods, at_site))
                decisions[n] = replace(d, methods=methods)

    def at(self, d: choose.Decision, env: Mapping[fx.Node, Any], value: Tensor) -> Tensor:
        """What the attention yields: the own code's value, or that of the method which is chosen for it."""
        tensors = {name: env[n] for name, n in d.found.tensors.items()}
        sizes = choose.bind_sizes(d.found.cascade, tensors, {name: env[n] for name, n in d.found.scalars.items()})
        if self.watch is not None:
            self.watch(d, tensors, sizes)
            return value
        chosen = self.choice.get(d.site.name)
        out, exact = value, _exact_seconds(d, tensors, sizes) if self.recording else None
        for m in d.methods:
            record = self.records[d.site.name, m.candidate.name]
            if record.why or m.call is None or not (self.recording or m.candidate.name == chosen):
                continue
            broken = next((c for c in m.call.conditions if not c.holds(tensors, sizes)), None)
            if broken is not None:
                record.why = f"on an example of the calibration it is not so that {broken.sentence}"
                continue
            try:
                made, seconds = _timed(m.call, tensors, sizes)
            except Exception as error:
                # a method that fails on the calibration's own data is no candidate, and no reason to stop
                record.why = f"{type(error).__name__}: {' '.join(str(error).split())}"
                continue
            like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            like.copy_(made.reshape(value.shape))
            if self.recording:
                seen = self._seen(d, m, tensors, sizes, value, like)
                record.seen.append(replace(seen, seconds=seconds, exact=exact))
            if m.candidate.name == chosen:
                out = like
        return out


    def _seen(
        self, d: choose.Decision, m: Approximation, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], own: Tensor,
        made: Tensor,
    ) -> MethodSeen:
        view = attention(d.found.cascade)
        assert isinstance(view, Attention), view
        c = view.cascade
        at = [str(i.attr) for i in c.producers[c.outputs[0]][-1].out.index]
        shape = [int(bind(c.rank[r].size, sizes)) for r in at]
        head = head_rank(view)
        a, b = (x.reshape(shape).double() for x in (own, made))
        dim = at.index(head) if head is not None else None
        heads = [relative(x, y) for x, y in zip(_split(b, dim), _split(a, dim))]
        rows, keys = (int(bind(c.rank[r].size, sizes)) for r in (view.query, view.key))
        keeps = self.held_out and m.made is not None and m.made.masks
        program = m.made.program if m.made is not None else None
        given = m.tensors(tensors, sizes) if keeps or program is not None else tensors
        mass, looked = _mass(view, m, given, sizes) if keeps else (None, 0)
        share = program.share(given[m.made.table], sizes) if program is not None and m.made is not None else None
        parts = [float((x - y).square().sum() / a.square().sum()) for x, y in zip(_split(b, dim), _split(a, dim))]
        return MethodSeen(self.example, relative(b, a), tuple(heads), mass, looked, rows, rows, keys, share, tuple(parts))


def _timed(call: splice.Call, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, float]:
    """What a call gives, and its seconds by the clock."""
    arguments = call.arguments(tensors, lambda name: sizes[name])
    cuda = any(x.is_cuda for x in tensors.values())
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    made: Tensor = call.target(*arguments)
    if cuda:
        torch.cuda.synchronize()
    return made, time.perf_counter() - start


def _exact_seconds(d: choose.Decision, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> float | None:
    """Seconds of the best exact kernel; None where none is better than the model's own code, or it cannot run here."""
    best = min((c for c in d.site.candidates if c.exact), key=lambda c: c.seconds)
    call = d.calls.get(best.name)
    if call is None or any(not c.holds(tensors, sizes) for c in call.conditions):
        return None
    try:
        return _timed(call, tensors, sizes)[1]
    except Exception:
        # the clock alone is missed: what runs is watched where it is installed
        return None


class _BesideMethods(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, decisions: Mapping[fx.Node, choose.Decision], recorder: Recorder) -> None:
        # inputs of an attention are read when its output is there: nothing is dropped before
        super().__init__(gm, garbage_collect_values=False)
        self.decisions, self.recorder = decisions, recorder

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        d = self.decisions.get(n)
        return value if d is None else self.recorder.at(d, self.env, value)


def _split(x: Tensor, dim: int | None) -> tuple[Tensor, ...]:
    return (x,) if dim is None else x.unbind(dim)


def _mass(
    view: Attention, m: Approximation, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[Tensor, int]:
    """The share of its weight that each row keeps, [heads, rows], and how many rows of each head were looked at.

    `tensors`: with the table of a selection.
    """
    rows = row_sample(view, sizes, torch.Generator().manual_seed(SEED), SCORES)
    given = {**tensors, ROWS: rows.to(next(iter(tensors.values())).device)}
    out = evaluate(kept_share(view, m.view), given, dict(sizes), widen=True)
    share = out[KEPT] / out[ALL]
    # a row without any weight keeps what there is
    share = torch.where(out[ALL] == 0, 1.0, share).nan_to_num(1.0)
    head = head_rank(view)
    dim = view.batch.index(head) if head is not None else None
    parts = [x.reshape(-1) for x in _split(share, dim)]
    return torch.stack(parts).cpu(), len(rows)

