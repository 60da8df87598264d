"""A bug of ours at one attention: the attention keeps its own code and says so, and the others are rewritten."""

from __future__ import annotations

import warnings

_BUG = "a bug in reattend, please report it"


def reason(where: str, error: Exception) -> str:
    """Why an attention is left alone where our code raised. It is warned of, so that no bug goes unseen."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    why = f"{_BUG}: {said}"
    warnings.warn(f"reattend: {where} keeps the original code: {why}", stacklevel=3)
    return why


def is_one(why: str) -> bool:
    return why.startswith(_BUG)
