"""Row rules and scores in many spellings, for the tests of recognition and of one-pass forms."""

from typing import Any

import torch

from reattend.patterns import expr as ex
from reattend.patterns.library import papers
from reattend.patterns.library.papers import attention

INF = float("inf")
LOWEST = -3.4028234663852886e38
P, M = ex.index("p"), ex.index("m")
ROW = tuple(ex.index(r) for r in "bhp")


def scaled(b: Any, qk: Any) -> Any:
    return qk * 0.125


def causal(b: Any, qk: Any) -> Any:
    """The first three rows keep no key."""
    return ex.where(M <= P - 3, qk * 0.125, -INF)


def causal_lowest(b: Any, qk: Any) -> Any:
    return ex.where(M <= P - 3, qk * 0.125, LOWEST)


def padded(b: Any, qk: Any) -> Any:
    pad = b.given("pad", (b.extent("b"), b.extent("m")), (ex.index("b"), M), "b1")
    return qk * 0.125 + ex.where((M <= P) & pad, 0.0, LOWEST)


def padded_inf(b: Any, qk: Any) -> Any:
    pad = b.given("pad", (b.extent("b"), b.extent("m")), (ex.index("b"), M), "b1")
    return qk * 0.125 + ex.where((M <= P) & pad, 0.0, -INF)


def biased(b: Any, qk: Any) -> Any:
    bias = b.given("bias", (b.extent("h"), b.extent("p"), b.extent("m")), (ex.index("h"), P, M))
    return qk * 0.125 + bias


def capped(b: Any, qk: Any) -> Any:
    return ex.where(M > P - 7, ex.unary("tanh", qk / 3.0) * 3.0, -INF)


def checkerboard(b: Any, qk: Any) -> Any:
    return ex.where(ex.equal((P + M + ex.index("h")) % 2, 0), qk, -INF)


def late_keys(b: Any, qk: Any) -> Any:
    """Keys of the first tiles are masked for all rows: the running bound stays −∞ over several tiles."""
    return ex.where(M >= 20, qk - 1000.0, -INF)


SCORES = (scaled, causal, causal_lowest, padded, padded_inf, biased, capped, checkerboard, late_keys)


def shifted_softmax(b: Any, s: Any) -> Any:
    """gpt-oss: the maximum is subtracted once by hand and once by softmax."""
    return papers.softmax(b, b.put("T", "bhpm", s - b.put("RM", "bhp", s, "max", "m")))


def shifted_sink(b: Any, s: Any) -> Any:
    """The same over scores with a sink concatenated."""
    sink = b.input("sink", "h")
    top = b.put("RM", "bhp", ex.maximum(b.put("R0", "bhp", s, "max", "m"), sink))
    t, u = b.put("T", "bhpm", s - top), b.put("U", "bhp", sink - top)
    gm = b.put("GM", "bhp", ex.maximum(b.put("R1", "bhp", t, "max", "m"), u))
    sn = b.put("SN", "bhpm", ex.exp(t - gm))
    return sn / (b.put("SD", "bhp", sn, "add", "m") + ex.exp(u - gm))


def off_by_one(b: Any, s: Any) -> Any:
    """softmax with one more logit, 0, that has no value."""
    gm = ex.maximum(b.put("GM", "bhp", s, "max", "m"), 0.0)
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    return sn / (b.put("SD", "bhp", sn, "add", "m") + ex.exp(-gm))


def logsumexp(b: Any, s: Any) -> Any:
    gm = b.put("GM", "bhp", s, "max", "m")
    sd = b.put("SD", "bhp", ex.exp(s - gm), "add", "m")
    return ex.exp(s - (gm + ex.unary("log", sd)))


def logsumexp_finite(b: Any, s: Any) -> Any:
    """torch.logsumexp: an infinite maximum is replaced by 0."""
    gm = b.put("GM", "bhp", s, "max", "m")
    gm = ex.where(ex.unary("isinf", gm), 0.0, gm)
    sd = b.put("SD", "bhp", ex.exp(s - gm), "add", "m")
    return ex.exp(s - (ex.unary("log", sd) + gm))


def no_nan(b: Any, s: Any) -> Any:
    """softmax(…).nan_to_num(0)"""
    a = b.put("A0", "bhpm", papers.softmax(b, s))
    return ex.where(ex.unary("isnan", a), 0.0, ex.where(ex.equal(a, INF), 3e38, ex.where(ex.equal(a, -INF), -3e38, a)))


def no_nan_log(b: Any, s: Any) -> Any:
    a = b.put("A0", "bhpm", papers.log_softmax(b, s))
    return ex.where(ex.unary("isnan", a), 0.0, a)


def masked_after(b: Any, s: Any) -> Any:
    """The mask once more on the probabilities: a row without a key becomes 0."""
    return ex.where(M <= P - 3, papers.softmax(b, s), 0.0)


def all_masked(b: Any, s: Any) -> Any:
    """torch's safe softmax: rows whose scores are all −∞ become 0, found by a boolean reduction."""
    empty = b.put("E", "bhp", ex.equal(s, -INF), "and", "m")
    return ex.where(empty, 0.0, papers.softmax(b, s))


def any_kept(b: Any, s: Any) -> Any:
    """Rows that keep a key, found from the mask itself."""
    kept = b.put("E", "bhp", M <= P - 3, "or", "m")
    return ex.where(kept, papers.softmax(b, s), 0.0)


def renormalised(b: Any, s: Any) -> Any:
    """Probabilities times a keep-mask, divided by their sum again."""
    a = b.put("A0", "bhpm", papers.softmax(b, s) * ex.where(ex.equal(M % 3, 0), 0.0, 1.0))
    return a / b.put("S2", "bhp", a, "add", "m")


def sharpened(b: Any, s: Any) -> Any:
    """Squares of probabilities, normalised."""
    a = b.put("A0", "bhpm", papers.softmax(b, s))
    a = b.put("A1", "bhpm", a * a)
    return a / b.put("S2", "bhp", a, "add", "m")


def tempered(b: Any, s: Any) -> Any:
    """The bound is divided with the score."""
    gm = b.put("GM", "bhp", s, "max", "m")
    sn = b.put("SN", "bhpm", ex.exp((s - gm) / 1.5))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def base_two(b: Any, s: Any) -> Any:
    gm = b.put("GM", "bhp", s, "max", "m")
    sn = b.put("SN", "bhpm", ex.unary("exp2", s - gm))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def softmin(b: Any, s: Any) -> Any:
    """softmax(−s) by the minimum."""
    low = b.put("GM", "bhp", s, "min", "m")
    sn = b.put("SN", "bhpm", ex.exp(low - s))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def unit_length(b: Any, s: Any) -> Any:
    """x/‖x‖₂"""
    return s / ex.unary("sqrt", b.put("SD", "bhp", s * s, "add", "m"))


def over_largest(b: Any, s: Any) -> Any:
    """|x|/max|x|"""
    a = b.put("SN", "bhpm", ex.unary("abs", s))
    return a / b.put("SD", "bhp", a, "max", "m")


def centred(b: Any, s: Any) -> Any:
    """relu(x)/Σ minus the mean over all keys of that"""
    a = b.put("SN", "bhpm", ex.unary("relu", s))
    a = b.put("A0", "bhpm", a / b.put("SD", "bhp", a, "add", "m"))
    return a * b.put("MN", "bhp", a, "add", "m")


def variance(b: Any, s: Any) -> Any:
    """1/(1 + Σ(x − mean)²) times x: moments"""
    mean = b.put("MN", "bhp", s * 0.03, "add", "m")
    d = b.put("D", "bhpm", s - mean)
    return s / (b.put("VR", "bhp", d * d, "add", "m") + 1.0)


def cast_softmax(b: Any, s: Any) -> Any:
    """Probabilities in a narrower type, as a bf16 model has them."""
    return ex.cast(ex.cast(papers.softmax(b, s), "bf16"), "f32")


def gated(b: Any, s: Any) -> Any:
    """A gate on every row after the softmax."""
    gate = b.input("gate", "bhp")
    return papers.softmax(b, s) * ex.unary("sigmoid", gate)


def rooted(b: Any, s: Any) -> Any:
    """Roots of probabilities, normalised"""
    a = b.put("A0", "bhpm", papers.softmax(b, s))
    a = b.put("A1", "bhpm", ex.binary("pow", a, 0.7))
    return a / b.put("S2", "bhp", a, "add", "m")


def masked_exponentials(b: Any, s: Any) -> Any:
    """The mask is on the maximum and on the exponentials, not on the scores."""
    gm = b.put("GM", "bhp", ex.where(M <= P - 3, s, -INF), "max", "m")
    sn = b.put("SN", "bhpm", ex.where(M <= P - 3, ex.exp(s - gm), 0.0))
    return sn / b.put("SD", "bhp", sn, "add", "m")


def masked_with_epsilon(b: Any, s: Any) -> Any:
    """The same, and a small number below the line: a row without a key is 0, although its maximum is −∞."""
    gm = b.put("GM", "bhp", ex.where(M <= P - 3, s, -INF), "max", "m")
    sn = b.put("SN", "bhpm", ex.where(M <= P - 3, ex.exp(s - gm), 0.0))
    return sn / (b.put("SD", "bhp", sn, "add", "m") + 1e-6)


def with_epsilon(b: Any, s: Any) -> Any:
    """A small number below the line: a row whose scores are all −∞ is NaN."""
    gm = b.put("GM", "bhp", s, "max", "m")
    sn = b.put("SN", "bhpm", ex.exp(s - gm))
    return sn / (b.put("SD", "bhp", sn, "add", "m") + 1e-6)


def unnormalised(b: Any, s: Any) -> Any:
    return ex.exp(s - b.put("GM", "bhp", s, "max", "m"))


def _with_sink(b: Any, s: Any) -> tuple[Any, Any]:
    """Maximum and sum of the scores and a sink."""
    sink = b.input("sink", "h")
    gm = b.put("GM", "bhp", ex.maximum(b.put("RM", "bhp", s, "max", "m"), sink))
    return gm, b.put("SD", "bhp", b.put("RS", "bhp", ex.exp(s - gm), "add", "m") + ex.exp(sink - gm))


def sink_log(b: Any, s: Any) -> Any:
    """log_softmax(…).exp() over scores with a sink concatenated"""
    gm, sd = _with_sink(b, s)
    return ex.exp(s - gm - ex.unary("log", sd))


def sink_logsumexp(b: Any, s: Any) -> Any:
    """exp(s − logsumexp(…)) over scores with a sink concatenated"""
    gm, sd = _with_sink(b, s)
    return ex.exp(s - (gm + ex.unary("log", sd)))


SOFTMAX = (
    papers.softmax, papers.softmax_zero, papers.softmax_sink, papers.log_softmax, shifted_softmax, shifted_sink,
    off_by_one, sink_log, sink_logsumexp, logsumexp, logsumexp_finite, no_nan, no_nan_log, masked_after, all_masked, any_kept, renormalised,
    sharpened, tempered, masked_exponentials, masked_with_epsilon, with_epsilon, unnormalised, base_two, cast_softmax, gated, rooted,
)
OTHERS = (
    papers.sigmoid, papers.power, papers.softplus, papers.softmax_naive, softmin, unit_length, over_largest, centred,
    variance,
)

SIZES = {"B": 2, "H": 4, "P": 29, "M": 37, "E": 8, "F": 5}


def tensors(c: Any, seed: Any = 0, sizes: Any = SIZES) -> Any:
    """Random inputs in float64; the first batch element's padding keeps nothing."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for t in c.inputs:
        shape = [s if isinstance(s, int) else int(s.subs({x: sizes[str(x)] for x in s.free_symbols})) for s in t.shape]
        if t.dtype == "b1":
            out[t.name] = torch.rand(shape, generator=g) > 0.4
            out[t.name][0] = False
        elif t.dtype in ex.INTEGERS:
            out[t.name] = torch.randint(0, 4, shape, generator=g)
        else:
            out[t.name] = torch.randn(shape, generator=g, dtype=torch.float64)
    return out


def error(a: Any, b: Any) -> Any:
    """‖a − b‖∞/‖b‖∞ where b is a number; inf where one is NaN and the other is not."""
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    if b.isnan().all():
        return 0.0
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


__all__ = ["OTHERS", "SCORES", "SIZES", "SOFTMAX", "attention", "error", "tensors"]
