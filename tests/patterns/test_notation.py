"""The papers' notation is read back as it is printed, and as a keyboard has it; what is wrong is named with its line."""

from __future__ import annotations

import inspect

import pytest

from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.recognise import attention
from reattend.patterns.cascade import Cascade, CascadeError, show
from reattend.patterns.library import papers, variants
from reattend.patterns.notation import read


def library() -> dict[str, Cascade]:
    """Every cascade of the library that needs nothing to be made."""
    out = {}
    for module in (papers, variants):
        for name, made in vars(module).items():
            own = inspect.isfunction(made) and made.__module__ == module.__name__ and not name.startswith("_")
            if own and all(p.default is not p.empty for p in inspect.signature(made).parameters.values()):
                c = made()
                if isinstance(c, Cascade):
                    out[f"{module.__name__.rpartition('.')[2]}.{name}"] = c
    return out


LIBRARY = library()
WINDOW = """
# a comment
windowed attention   H=32, P=4096, M=M, E=128, F=128
  inputs  Q: bf16[H,4096,E], K: bf16[8,M,128], V: bf16[8,M,128]
  QK[h,p,m] = sum_e f32(Q[h,p,e]) * f32(K[h // 4,m,e])
  S[h,p,m] = where(m <= p and not (m <= p - 512), QK[h,p,m] * 0.125, -inf)
  GM[h,p] = max_m S[h,p,m]
  SN[h,p,m] = exp(S[h,p,m] - GM[h,p])
  SD[h,p] = sum_m SN[h,p,m]
  O[h,p,f] = sum_m SN[h,p,m] / SD[h,p] * f32(V[h // 4,m,f])
"""


def test_the_library_has_cascades_to_read() -> None:
    assert len(LIBRARY) >= 20


@pytest.mark.parametrize("name", LIBRARY)
def test_what_is_printed_is_read_back(name: str) -> None:
    c = LIBRARY[name]
    made = read(show(c))
    assert show(made) == show(c)
    assert made.einsums == c.einsums
    assert set(made.tensors) == set(c.tensors)
    assert made.rank == c.rank


def test_a_keyboard_is_enough() -> None:
    c = read(WINDOW)
    assert c.name == "windowed attention"
    assert c.outputs == ("O",)
    assert c.tensor["Q"].shape == (32, 4096, 128)
    assert c.free_symbols == ("M",)
    view = attention(c)
    assert isinstance(view, Attention)
    assert (view.query, view.key) == ("p", "m")
    assert "  S[h,p,m] = where(m ≤ p ∧ ¬(m ≤ p − 512), QK[h,p,m] · 0.125, −∞)" in show(c)
    assert read(show(c)).einsums == c.einsums


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there is no cascade"),
        ("a   P", "line 1, 'a   P': 'P' is no size"),
        ("a   P=4\n  inputs Q: bf17[P]", "bf17 is no type"),
        ("a   P=4\n  inputs Q bf16[P]", "'Q bf16[P]' is no input"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] is Q[p]", "line 3, 'O[p] is Q[p]': an Einsum is"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = Q[p] +", "'a term' is missing at the end"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = (Q[p]", "')' is missing at the end"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = Q[p] Q[p]", "'Q' stands where a term has ended"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = frob(Q[p])", "no operator frob takes 1 terms"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = Q[p,p]", "Q has 1 dimensions and is accessed with 2 terms"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = sum_m Q[m]", "rank m is not declared"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p // 2] = Q[p]", "is no place to write at"),
        ("a   P=4\n  inputs Q: f32[P]\n  O[p] = Z[p]", "tensor Z is not declared"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(CascadeError) as no:
        read(text)
    assert said in str(no.value)
