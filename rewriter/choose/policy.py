"""The user's wishes: which candidates may be chosen, and how strict the rewrite is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ...cost_model.count.expect import Expect, parse
from ...cost_model.mesh.mesh import Mesh
from ...cost_model.mesh.mesh import mesh as mesh_of
from ...cost_model.sites.site import ORIGINAL, Candidate

CANDIDATES = (ORIGINAL, "sdpa", "flex", "reattend")


@dataclass(frozen=True)
class Policy:
    """What a plan may do. All candidates of this version are exact, so `approximate` admits only ways on a mesh that are not
    (TPLA), and `max_error` nothing.

    `mesh`, "tp=8" or a Mesh, adds to a plan what every way to spread its attentions over these devices holds, sends and
    takes; what runs stays on one device.

    `allow` keeps only these candidates beside the original code, `deny` removes some; names are original, sdpa, flex,
    reattend. The original code stays where nothing else can run, denied or not. With `strict`, an attention that cannot be
    rewritten raises at the first capture instead of being left alone.

    `expect` says what to expect of run-time data that masks read, for the predictions of `plan` alone: texts such as
    "attention_mask=length:700" (cost_model/count/expect.py has the forms). It names the model's arguments, which the graphs
    of an optimised model do not know by these names.

    `check` says when what runs is held against the model's own code on the inputs at hand: "never", "first", where a graph
    first runs at sizes, types and masks of a kind, or an integer n, also in every n-th call. What differs goes back to the
    model's own code; with `strict` it raises.

    `tune`: a few of the first calls on a CPU also time what was chosen beside the model's own code, where predictions do not
    tell which is faster; what is slower there is not called again. Raises ValueError with one sentence.
    """

    approximate: bool = False
    max_error: float | None = None
    allow: Collection[str] = ()
    deny: Collection[str] = ()
    calibration: object = None
    mesh: Mesh | str | None = None
    strict: bool = False
    expect: Collection[str] = ()
    check: str | int = "first"
    tune: bool = True

    def __post_init__(self) -> None:
        for field in ("allow", "deny"):
            value = getattr(self, field)
            names = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, field, names)
            unknown = [n for n in names if n not in CANDIDATES]
            if unknown:
                raise ValueError(f"Policy({field}): unknown candidate {unknown[0]!r}; one of {', '.join(CANDIDATES)}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"Policy(max_error) must be above 0, not {self.max_error}")
        if self.calibration is not None:
            raise ValueError("Policy(calibration) is not in this version: all candidates are exact")
        wishes = (self.expect,) if isinstance(self.expect, str) else tuple(self.expect)
        object.__setattr__(self, "expect", wishes)
        for text in wishes:
            parse(text)
        often = isinstance(self.check, int) and not isinstance(self.check, bool) and self.check > 0
        if not often and self.check not in ("first", "never"):
            raise ValueError(f'Policy(check) must be "first", "never" or a number of calls above 0, not {self.check!r}')
        if self.mesh is not None:
            object.__setattr__(self, "mesh", mesh_of(self.mesh))

    @property
    def expectations(self) -> tuple[Expect, ...]:
        """What is expected of run-time data, read."""
        return tuple(map(parse, self.expect))

    def permits(self, candidate: Candidate) -> bool:
        """May this candidate be chosen?"""
        if candidate.name in self.deny:
            return False
        return candidate.is_original or not self.allow or candidate.name in self.allow

    def __str__(self) -> str:
        parts = [
            f"allow {', '.join(self.allow)}" if self.allow else "",
            f"deny {', '.join(self.deny)}" if self.deny else "",
        ]
        words = [p for p in parts if p] + (["strict"] if self.strict else [])
        return "; ".join(words + ([f"check {self.check}"] if self.check != "never" else [])) or "all exact candidates"


class StrictError(RuntimeError):
    """Raised under `Policy(strict=True)` where an attention would be left as it is; the message says which and why."""
