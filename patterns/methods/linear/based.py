"""BASED: the exponential's Taylor polynomial of second degree for far keys, the exponential itself in a window.

    w(s) = exp(s) where the key is among the last `window`, else 1 + s + s²/2 = φ(q)·φ(k) = exp(log(1 + s + s²/2))
    φ(x) = [1, x̃, vec(x̃ x̃ᵀ)/√2], x̃ = x·√scale:  1 + E + E² numbers a token, 1 + E + E(E + 1)/2 when equal ones are joined

The polynomial is at least 1/2 and grows again below -1 (w(-4) = 5 > w(0)): it stands for the exponential where scores are
small alone, relative error at most |s|³·e^|s| / 6. A model's own scores of ten or more are not small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import expr as ex
from ...attention.attention import Attention
from ...masks.split import split
from ...verdict import Refusal
from ..method import Method, Replacement, positions
from .rows import RowBuilder, is_softmax


@dataclass(frozen=True)
class TaylorWindow(Method):
    """Far keys by a polynomial, the last `window` keys by the softmax, one sum for both.

    In the paper layers of either kind alternate in a model that is trained with them; here both are one row, as when a
    softmax is replaced (LoLCATs, arXiv 2410.10254, section 3.2). `window=0`: the polynomial alone.
    """

    name: ClassVar[str] = "taylor-window"
    source: ClassVar[str] = "Arora et al., Simple linear attention language models … (BASED, 2402.18668), section 3.1"
    needs: ClassVar[tuple[str, ...]] = ("scores of at most about 1 outside of the window",)

    window: int = 64

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"TaylorWindow needs window ≥ 0, not {self.window}")

    def replace(self, a: Attention) -> Replacement | Refusal:
        at = positions(a)
        if isinstance(at, Refusal):
            return self.refuse(at.reason)
        if not is_softmax(a):
            return self.refuse("its rows are no softmax of their scores")
        if self.window and not at.causal:
            return self.refuse("it needs a causal attention: nothing says where the window of a row ends")
        mask, rows = split(a.score, a.key), RowBuilder(a)
        s, near = mask.full, at.row - at.key < self.window
        # at least 1/2, so that it has a logarithm: the row is a softmax of another score, and keeps its bound
        far = ex.unary("log", 1.0 + s + 0.5 * s * s)
        score = ex.where(mask.keep, ex.where(near, s, far) if self.window else far, float("-inf"))
        top = rows.put("TM", rows.row, score, "max", (a.key,))
        return Replacement(rows.cascade(rows.mean(ex.exp(score - top), "T"), str(self)), masks=False)
