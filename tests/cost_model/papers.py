"""FuseMax's cascades over heads and batch, as the cost model's known answers need them."""

import sympy

from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, Tensor, verify

B, H, P, M, E, F, M0 = (sympy.Symbol(n, integer=True, positive=True) for n in ("B", "H", "P", "M", "E", "F", "M0"))
M1 = sympy.floor((M + M0 - 1) / M0)


def _load(name, *at, dtype="f32"):
    return ex.load(name, tuple(ex.index(i) if isinstance(i, str) else i for i in at), dtype)


def _at(name, *at):
    return Access(name, tuple(ex.index(i) if isinstance(i, str) else i for i in at))


def three_pass(dtype="f32"):
    """Cascade 4: softmax in three passes over m."""
    q, k, v = _load("Q", "b", "h", "p", "e", dtype=dtype), _load("K", "b", "h", "m", "e", dtype=dtype), _load("V", "b", "h", "m", "f", dtype=dtype)
    row, all_ = ("b", "h", "p"), ("b", "h", "p", "m")
    einsums = (
        Einsum(_at("QK", *all_), q * k, "add", ("e",)),
        Einsum(_at("GM", *row), _load("QK", *all_, dtype=dtype), "max", ("m",)),
        Einsum(_at("SN", *all_), ex.exp(_load("QK", *all_, dtype=dtype) - _load("GM", *row, dtype=dtype))),
        Einsum(_at("SD", *row), _load("SN", *all_, dtype=dtype), "add", ("m",)),
        Einsum(_at("A", *all_), _load("SN", *all_, dtype=dtype) / _load("SD", *row, dtype=dtype)),
        Einsum(_at("AV", *row, "f"), _load("A", *all_, dtype=dtype) * v, "add", ("m",)),
    )
    ranks = (Rank("b", B), Rank("h", H), Rank("p", P), Rank("m", M), Rank("e", E), Rank("f", F))
    shapes = {"Q": (B, H, P, E), "K": (B, H, M, E), "V": (B, H, M, F), "QK": (B, H, P, M), "GM": (B, H, P),
              "SN": (B, H, P, M), "SD": (B, H, P), "A": (B, H, P, M), "AV": (B, H, P, F)}  # fmt: skip
    return verify(Cascade("cascade 4", ranks, tuple(Tensor(n, s, dtype) for n, s in shapes.items()), einsums, ("AV",)))


def deferred(dtype="f32"):
    """Cascade 4 with the division moved behind the product with V."""
    c = three_pass(dtype)
    row, all_ = ("b", "h", "p"), ("b", "h", "p", "m")
    v = _load("V", "b", "h", "m", "f", dtype=dtype)
    einsums = (
        *c.einsums[:4],
        Einsum(_at("SNV", *row, "f"), _load("SN", *all_, dtype=dtype) * v, "add", ("m",)),
        Einsum(_at("AV", *row, "f"), _load("SNV", *row, "f", dtype=dtype) / _load("SD", *row, dtype=dtype)),
    )
    tensors = tuple(t for t in c.tensors if t.name != "A") + (Tensor("SNV", (B, H, P, F), dtype),)
    return verify(Cascade("deferred", c.ranks, tensors, einsums, ("AV",)))


def one_pass(dtype="f32"):
    """Cascade 5: FlashAttention-2, iterative over key tiles m1."""
    row = ("b", "h", "p")
    tile, cell = ("b", "h", "m1", "p"), ("b", "h", "m1", "m0", "p")
    m1 = ex.index("m1")
    m = m1 * ex.symbol("M0") + ex.index("m0")

    def ld(name, *at):
        return _load(name, *at, dtype=dtype)

    zero, after = ex.const(0), m1 + 1
    einsums = (
        Einsum(_at("BK", "b", "h", "e", "m1", "m0"), ld("K", "b", "h", m, "e")),
        Einsum(_at("BV", "b", "h", "f", "m1", "m0"), ld("V", "b", "h", m, "f")),
        Einsum(_at("RM", "b", "h", zero, "p"), ex.const(-float("inf"), dtype)),
        Einsum(_at("RD", "b", "h", zero, "p"), ex.const(0.0, dtype)),
        Einsum(_at("RNV", "b", "h", "f", zero, "p"), ex.const(0.0, dtype)),
        Einsum(_at("BQK", *cell), ld("Q", "b", "h", "p", "e") * ld("BK", "b", "h", "e", "m1", "m0"), "add", ("e",)),
        Einsum(_at("LM", *tile), ld("BQK", *cell), "max", ("m0",)),
        Einsum(_at("RM", "b", "h", after, "p"), ex.maximum(ld("RM", *tile), ld("LM", *tile))),
        Einsum(_at("SLN", *cell), ex.exp(ld("BQK", *cell) - ld("RM", "b", "h", after, "p"))),
        Einsum(_at("SLD", *tile), ld("SLN", *cell), "add", ("m0",)),
        Einsum(_at("SLNV", "b", "h", "f", "m1", "p"), ld("SLN", *cell) * ld("BV", "b", "h", "f", "m1", "m0"), "add", ("m0",)),
        Einsum(_at("PRM", *tile), ex.exp(ld("RM", *tile) - ld("RM", "b", "h", after, "p"))),
        Einsum(_at("SPD", *tile), ld("RD", *tile) * ld("PRM", *tile)),
        Einsum(_at("RD", "b", "h", after, "p"), ld("SLD", *tile) + ld("SPD", *tile)),
        Einsum(_at("SPNV", "b", "h", "f", "m1", "p"), ld("RNV", "b", "h", "f", "m1", "p") * ld("PRM", *tile)),
        Einsum(_at("RNV", "b", "h", "f", after, "p"), ld("SLNV", "b", "h", "f", "m1", "p") + ld("SPNV", "b", "h", "f", "m1", "p")),
        Einsum(_at("AV", *row, "f"), ld("RNV", "b", "h", "f", ex.symbol("M1"), "p") / ld("RD", "b", "h", ex.symbol("M1"), "p")),
    )
    steps = sympy.Symbol("M1", integer=True, positive=True)
    ranks = (Rank("b", B), Rank("h", H), Rank("p", P), Rank("m1", steps, iterative=True), Rank("m0", M0), Rank("e", E), Rank("f", F))
    shapes = {
        "Q": (B, H, P, E), "K": (B, H, M, E), "V": (B, H, M, F), "BK": (B, H, E, steps, M0), "BV": (B, H, F, steps, M0),
        "RM": (B, H, steps + 1, P), "RD": (B, H, steps + 1, P), "RNV": (B, H, F, steps + 1, P), "BQK": (B, H, steps, M0, P),
        "LM": (B, H, steps, P), "SLN": (B, H, steps, M0, P), "SLD": (B, H, steps, P), "SLNV": (B, H, F, steps, P),
        "PRM": (B, H, steps, P), "SPD": (B, H, steps, P), "SPNV": (B, H, F, steps, P), "AV": (B, H, P, F),
    }  # fmt: skip
    tensors = tuple(Tensor(n, s, dtype) for n, s in shapes.items())
    return verify(Cascade("cascade 5", ranks, tensors, einsums, ("AV",)))
