"""How a "no" is said: a value with its reason, so that whoever asks can print it, compare it or try something else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Obstacle:
    """What keeps a thing from having the form that was asked for. `depth` is how far the attempt got."""

    reason: str
    einsum: str = ""
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.reason} [{self.einsum}]" if self.einsum else self.reason


@dataclass(frozen=True)
class Refusal:
    """Why a candidate cannot compute an attention."""

    candidate: str
    reason: str

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason}"
