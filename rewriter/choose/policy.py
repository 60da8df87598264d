"""The user's wishes: which candidates may be chosen, and how strict the rewrite is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from ...cost_model.count.expect import Expect, parse
from ...cost_model.mesh.mesh import Mesh
from ...cost_model.mesh.mesh import mesh as mesh_of
from ...cost_model.sites.site import ORIGINAL, Candidate
from ...patterns.methods import registry
from ...patterns.methods.method import Method

CANDIDATES = (ORIGINAL, "sdpa", "flex", "reattend")


@dataclass(frozen=True)
class Policy:
    """What a plan may do. Candidates are exact unless `approximate` admits others: ways on a mesh (TPLA), and `methods`.

    `methods` (SinkWindow(sink=4, window=1024), …; `reattend.methods()` lists them) are tried at every attention that takes
    them. `calibration` is data to measure their error on, an iterable of examples as `optimize` takes them: every other one
    configures, the others are held out. What is installed differs in the whole model's output by `max_error` at most,
    measured on the latter (docs/approximate.md); without a measured error nothing is.

    `keep` names a folder for the statistics of the calibration: one that was broken off goes on there, and the same model,
    data and methods are not measured again.

    `mesh`, "tp=8" or a Mesh, adds to a plan what every way to spread its attentions over these devices holds, sends and
    takes; what runs stays on one device.

    `allow` keeps only these candidates beside the original code, `deny` removes some; names are original, sdpa, flex,
    reattend, and those of methods: one that is allowed by name alone has its defaults. The original code stays where nothing
    else can run, denied or not. With `strict`, an attention that cannot be rewritten raises at the first capture instead of
    being left alone.

    `expect` says what to expect of run-time data that masks read, for the predictions of `plan` alone: texts such as
    "attention_mask=length:700" (cost_model/count/expect.py has the forms). It names the model's arguments, which the graphs
    of an optimised model do not know by these names.

    `check` says when what runs is held against the model's own code on the inputs at hand: "never", "first", where a graph
    first runs at sizes, types and masks of a kind, or an integer n, also in every n-th call. What differs goes back to the
    model's own code; with `strict` it raises.

    `tune`: a few of the first calls on a CPU also time what was chosen beside the model's own code, where predictions do not
    tell which is faster; what is slower there is not called again.

    `dropout`: with "original", an attention whose dropout is switched on keeps the model's own code, since no kernel can
    draw the numbers that torch would. With "own" its weights are dropped at the same rate by numbers that are counted from
    a seed of each call: training then runs our kernels, reproducibly under torch.manual_seed, and other elements are dropped
    than without it. Raises ValueError with one sentence.
    """

    approximate: bool = False
    max_error: float | None = None
    allow: Collection[str] = ()
    deny: Collection[str] = ()
    calibration: object = field(default=None, compare=False, repr=False)
    mesh: Mesh | str | None = None
    strict: bool = False
    expect: Collection[str] = ()
    check: str | int = "first"
    tune: bool = True
    methods: Collection[Method] = ()
    dropout: str = "original"
    keep: str = ""

    def __post_init__(self) -> None:
        for side in ("allow", "deny"):
            value = getattr(self, side)
            names = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, side, names)
            unknown = [n for n in names if n not in CANDIDATES and n not in _method_names()]
            if unknown:
                known = ", ".join((*CANDIDATES, *_method_names()))
                raise ValueError(f"Policy({side}): unknown candidate {unknown[0]!r}; one of {known}")
        if self.max_error is not None:
            if isinstance(self.max_error, bool) or not isinstance(self.max_error, (int, float)):
                raise ValueError(f"Policy(max_error) is a number above 0, such as 0.01, not {self.max_error!r}")
            if not self.max_error > 0:
                raise ValueError(f"Policy(max_error) must be above 0, not {self.max_error}")
        self._check_methods()
        wishes = (self.expect,) if isinstance(self.expect, str) else tuple(self.expect)
        object.__setattr__(self, "expect", wishes)
        for text in wishes:
            parse(text)
        often = isinstance(self.check, int) and not isinstance(self.check, bool) and self.check > 0
        if not often and self.check not in ("first", "never"):
            raise ValueError(f'Policy(check) must be "first", "never" or a number of calls above 0, not {self.check!r}')
        if self.dropout not in ("original", "own"):
            raise ValueError(f'Policy(dropout) must be "original" or "own", not {self.dropout!r}')
        if self.mesh is not None:
            object.__setattr__(self, "mesh", mesh_of(self.mesh))

    def _check_methods(self) -> None:
        given = (self.methods,) if isinstance(self.methods, Method) else tuple(self.methods)
        for m in given:
            if isinstance(m, type) and issubclass(m, Method):
                raise ValueError(f"Policy(methods): {m.__name__} is a class: give {m.__name__}(…) with its parameters")
            if not isinstance(m, Method):
                raise ValueError(f"Policy(methods) takes methods such as SinkWindow(sink=4, window=1024), not {m!r}")
        clash = next((n for n in self.deny if n in self.allow or n in [m.name for m in given]), None)
        # without methods, what is denied is denied, as it always was
        if clash is not None and self.approximate:
            raise ValueError(f"Policy: {clash!r} is both allowed and denied")
        by_name = [n for n in self.allow if n not in CANDIDATES and n not in [m.name for m in given]]
        for n in by_name:
            made = registry.named(n)
            if made is None:
                raise ValueError(f"Policy(allow): {n!r} has parameters without a default: give it in methods=(…)")
            given = (*given, made)
        object.__setattr__(self, "methods", tuple(dict.fromkeys(given)))
        if self.approximate and self.calibration is not None and not self.methods:
            raise ValueError("Policy(calibration) without methods: give methods=(…), or allow some by name")
        for name, value in (("methods", self.methods), ("calibration", self.calibration), ("keep", self.keep or None)):
            if not self.approximate and value is not None and value != ():
                raise ValueError(f"Policy({name}) needs approximate=True: a method changes what the model computes")

    @property
    def exactly(self) -> Policy:
        """The same without methods: what it says of exact candidates, and of the kernels that compute a method."""
        if not self.methods and not self.approximate:
            return self
        kernels = tuple(n for n in self.allow if n in CANDIDATES)
        return replace(self, methods=(), allow=kernels, calibration=None, keep="")

    @property
    def expectations(self) -> tuple[Expect, ...]:
        """What is expected of run-time data, read."""
        return tuple(map(parse, self.expect))

    def permits(self, candidate: Candidate) -> bool:
        """May this candidate be chosen?"""
        if candidate.name in self.deny:
            return False
        if not candidate.exact:
            return candidate.name in [str(m) for m in self.methods]
        return candidate.is_original or not self.allow or candidate.name in self.allow

    def __str__(self) -> str:
        parts = [
            f"allow {', '.join(self.allow)}" if self.allow else "",
            f"deny {', '.join(self.deny)}" if self.deny else "",
            f"methods {', '.join(map(str, self.methods))}" if self.methods else "",
            f"error at most {self.max_error:g}" if self.methods and self.max_error is not None else "",
        ]
        words = [p for p in parts if p] + (["strict"] if self.strict else [])
        words += ["own dropout"] if self.dropout == "own" else []
        return "; ".join(words + ([f"check {self.check}"] if self.check != "never" else [])) or "all exact candidates"


def _method_names() -> tuple[str, ...]:
    return tuple(m.name for m in registry.methods())


class StrictError(RuntimeError):
    """Raised under `Policy(strict=True)` where an attention would be left as it is; the message says which and why."""
