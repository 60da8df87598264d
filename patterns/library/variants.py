"""Cascades of what the field writes around one attention core, beyond FuseMax's: as written, before any rewrite.

    softmax with a cap, cosine, two differential maps, returned probabilities, mixed heads, entmax, keys split over programs
    layer norms over their own rank;  causal linear and gated linear attention as iterative ranks
Each docstring states the passes of the form as written; the tests count them. Letters as in `papers`.
"""

from __future__ import annotations

from .. import expr as ex
from ..cascade import Cascade, size_term
from ..expr import Expr
from .papers import Builder, Rule, attention, size, softmax


def softcap(cap: float) -> Cascade:
    """S = c·tanh(QK/c), softmax: Gemma 2 (Riviere et al., 2024)                                    three passes"""
    return attention("soft-cap", softmax, lambda b, qk: ex.unary("tanh", qk * 0.125 / cap) * cap)


def cosine_softmax(scale: float = 10.0) -> Cascade:
    """S = τ·q̂·k̂ with q̂ = q/‖q‖, softmax: query-key normalisation (Henry et al., 2020)             three passes"""
    b = Builder()
    q, k, v = b.input("Q", "pe"), b.input("K", "me"), b.input("V", "mf")
    qh = b.put("QH", "pe", q * ex.unary("rsqrt", b.put("QN", "p", q * q, "add", "e") + 1e-6))
    kh = b.put("KH", "me", k * ex.unary("rsqrt", b.put("KN", "m", k * k, "add", "e") + 1e-6))
    s = b.put("S", "pm", b.put("QK", "pm", qh * kh, "add", "e") * scale)
    gm = b.put("GM", "p", s, "max", "m")
    sn = b.put("SN", "pm", ex.exp(s - gm))
    a = b.put("A", "pm", sn / b.put("SD", "p", sn, "add", "m"))
    b.put("AV", "pf", a * v, "add", "m")
    return b.cascade("cosine softmax", "AV")


def _probabilities(b: Builder, mark: str, q: Expr, k: Expr, ranks: str) -> Expr:
    """Softmax of one product of queries and keys: the weights A, over `ranks` with the key last."""
    row = ranks[:-1]
    qk = b.put(f"QK{mark}", ranks, q * k, "add", "e")
    gm = b.put(f"GM{mark}", row, qk, "max", ranks[-1])
    sn = b.put(f"SN{mark}", ranks, ex.exp(qk - gm))
    return b.put(f"A{mark}", ranks, sn / b.put(f"SD{mark}", row, sn, "add", ranks[-1]))


def differential() -> Cascade:
    """O = Σ_m (A1 − λ·A2)·V with two pairs of queries and keys: Ye et al. (2024)                   three passes"""
    b = Builder()
    first = _probabilities(b, "1", b.input("Q1", "hpe"), b.input("K1", "hme"), "hpm")
    second = _probabilities(b, "2", b.input("Q2", "hpe"), b.input("K2", "hme"), "hpm")
    weights = b.put("D", "hpm", first - b.input("lam", "h") * second)
    b.put("O", "hpf", weights * b.input("V", "hmf"), "add", "m")
    return b.cascade("differential", "O")


def returned() -> Cascade:
    """The probabilities are an output beside their product with V                                   three passes"""
    b = Builder()
    a = _probabilities(b, "", b.input("Q", "pe"), b.input("K", "me"), "pm")
    b.put("O", "pf", a * b.input("V", "mf"), "add", "m")
    return b.cascade("returned probabilities", "O", "A")


def talking_heads() -> Cascade:
    """B_g = Σ_h W[g,h]·A_h after the softmax: Shazeer et al. (2020)                                 three passes"""
    b = Builder({"g": size("H")})
    a = _probabilities(b, "", b.input("Q", "hpe"), b.input("K", "hme"), "hpm")
    mixed = b.put("MX", "gpm", b.input("W", "gh") * a, "add", "h")
    b.put("O", "gpf", mixed * b.input("V", "gmf"), "add", "m")
    return b.cascade("talking heads", "O")


def entmax(steps: int) -> Rule:
    """Root steps for τ with Σ relu(S/2 − τ)² = 1 (1.5-entmax), by Newton from τ = max S/2 − 1; each sweeps all keys."""

    def rule(b: Builder, s: Expr) -> Expr:
        half = b.put("HS", "bhpm", s * 0.5)
        tau = b.put("GM", "bhp", half, "max", "m") - 1.0
        for i in range(steps):
            over = b.put(f"X{i}", "bhpm", ex.unary("relu", half - tau))
            square, slope = b.put(f"F{i}", "bhp", over * over, "add", "m"), b.put(f"N{i}", "bhp", over, "add", "m")
            tau = b.put(f"T{i}", "bhp", tau + (square - 1.0) / (2.0 * slope))
        last = b.put("X", "bhpm", ex.unary("relu", half - tau))
        return last * last

    return rule


def split_keys() -> Cascade:
    """Maxima, sums and products of each part of the keys, merged over the parts: Flash-Decoding    one pass over (m1, m0)"""
    b = Builder()
    m1, m0 = size("M1"), size("M0")
    b.sizes.update({"m1": m1, "m0": m0})
    key = ex.index("m1") * ex.symbol("M0") + ex.index("m0")
    q = b.input("Q", "pe")
    k = b.given("K", (m1 * m0, b.extent("e")), (key, ex.index("e")))
    v = b.given("V", (m1 * m0, b.extent("f")), (key, ex.index("f")))
    qk = b.put("BQK", "p.m1.m0", q * k, "add", "e")
    lm = b.put("LM", "p.m1", qk, "max", "m0.")
    sln = b.put("SLN", "p.m1.m0", ex.exp(qk - lm))
    sld, slnv = b.put("SLD", "p.m1", sln, "add", "m0."), b.put("SLNV", "p.f.m1", sln * v, "add", "m0.")
    plm = b.put("PLM", "p.m1", ex.exp(lm - b.put("GM", "p", lm, "max", "m1.")))
    sd, snv = b.put("SD", "p", sld * plm, "add", "m1."), b.put("SNV", "pf", slnv * plm, "add", "m1.")
    b.put("AV", "pf", snv / sd)
    return b.cascade("split keys", "AV")


# --- layer norms --------------------------------------------------------------------------------------------------


def layer_norm() -> Cascade:
    """μ = Σ x/E;  σ² = Σ (x − μ)²/E;  y = (x − μ)/√(σ² + ε)                              three passes over e"""
    b = Builder()
    x, n = b.input("X", "pe"), ex.cast(ex.symbol("E"), "f32")
    mean = b.put("MN", "p", b.put("SX", "p", x, "add", "e") / n)
    apart = b.put("D", "pe", x - mean)
    b.put("Y", "pe", apart * ex.unary("rsqrt", b.put("VR", "p", apart * apart, "add", "e") / n + 1e-5))
    return b.cascade("layer norm", "Y")


def layer_norm_moments() -> Cascade:
    """σ² = Σ x²/E − μ²                                                                     two passes over e"""
    b = Builder()
    x, n = b.input("X", "pe"), ex.cast(ex.symbol("E"), "f32")
    mean = b.put("MN", "p", b.put("SX", "p", x, "add", "e") / n)
    variance = b.put("VR", "p", b.put("SXX", "p", x * x, "add", "e") / n - mean * mean)
    b.put("Y", "pe", (x - mean) * ex.unary("rsqrt", variance + 1e-5))
    return b.cascade("layer norm by moments", "Y")


def layer_norm_welford() -> Cascade:
    """μ ← μ + (x − μ)/n;  M2 ← M2 + (x − μ_old)·(x − μ_new): Welford (1962)                two passes over e"""
    b = Builder(iterative=("e",))
    e, p, width, rows = ex.index("e"), ex.index("p"), b.extent("e"), b.extent("p")
    x, n = b.input("X", "pe"), ex.cast(ex.symbol("E"), "f32")
    start, one = ex.const(0), ex.const(1)
    b.write("RM", (rows, width + 1), (p, start), ex.const(0.0))
    b.write("RV", (rows, width + 1), (p, start), ex.const(0.0))
    old, square = ex.load("RM", (p, e), "f32"), ex.load("RV", (p, e), "f32")
    new = b.write("RM", (rows, width + 1), (p, e + one), old + (x - old) / (ex.cast(e, "f32") + 1.0))
    b.write("RV", (rows, width + 1), (p, e + one), square + (x - old) * (x - new))
    last = size_term(width)
    mean = b.put("MN", "p", ex.load("RM", (p, last), "f32"))
    variance = b.put("VR", "p", ex.load("RV", (p, last), "f32") / n)
    b.put("Y", "pe", (x - mean) * ex.unary("rsqrt", variance + 1e-5))
    return b.cascade("layer norm by Welford", "Y")


# --- causal linear attention: the token is an iterative rank ------------------------------------------------------


def causal_linear() -> Cascade:
    """KV[i+1] = KV[i] + K_i·V_i;  O_i = Q_i·KV[i+1]: Katharopoulos et al. (2020)                   one pass over i"""
    return _recurrent("causal linear", None)


def gated_linear() -> Cascade:
    """KV[i+1] = G_i·KV[i] + K_i·V_i with a gate for every channel: Yang et al. (2023)              one pass over i"""
    return _recurrent("gated linear", "ie")


def decayed_linear() -> Cascade:
    """KV[i+1] = g_i·KV[i] + K_i·V_i with one gate a token: RetNet, Mamba 2                          one pass over i"""
    return _recurrent("decayed linear", "i")


def _recurrent(name: str, gate: str | None) -> Cascade:
    b = Builder(iterative=("i",))
    i, e, f = (ex.index(r) for r in "ief")
    shape = (b.extent("e"), b.extent("f"), b.extent("i") + 1)
    q, k, v = b.input("Q", "ie"), b.input("K", "ie"), b.input("V", "if")
    b.write("KV", shape, (e, f, ex.const(0)), ex.const(0.0))
    old = ex.load("KV", (e, f, i), "f32")
    new = b.write("KV", shape, (e, f, i + ex.const(1)), (old if gate is None else b.input("G", gate) * old) + k * v)
    b.put("O", "if", q * new, "add", "e")
    return b.cascade(name, "O")
