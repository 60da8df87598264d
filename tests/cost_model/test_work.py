"""Work: FuseMax's operation counts, traffic and latencies, exactly; properties of counting."""

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from reattend.cost_model.count.subject import Subject, plan_tiles, shape, subject, work
from reattend.cost_model.count.work import count, key_tile
from reattend.cost_model.devices.device import device
from reattend.cost_model.operations import Work
from reattend.cost_model.time import fusemax
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

E, F, M, P, M0 = 64, 64, 4096, 4096, 128
M1 = M // M0
SIZES = {"E": E, "F": F, "M": M, "P": P, "M0": M0, "M1": M1}
K = 1024
LENGTHS = (K, 4 * K, 16 * K, 64 * K, 256 * K, 1024 * K)
# batch · heads, head size: BERT, TrXL, T5, XLM, batch 64
MODELS = {"bert": (64 * 12, 64), "trxl": (64 * 16, 64), "t5": (64 * 8, 64), "xlm": (64 * 16, 128)}
CASCADE4, CASCADE5 = papers.cascade4(), papers.cascade5()


def test_a9_exponentials() -> None:
    assert count(CASCADE4, sizes=SIZES).exps == 16_777_216
    assert count(CASCADE5, sizes=SIZES).exps == 16_908_288


def test_a10_divisions() -> None:
    assert count(CASCADE4, sizes=SIZES).divisions == 16_777_216
    assert count(papers.cascade4(deferred=True), sizes=SIZES).divisions == 262_144
    assert count(CASCADE5, sizes=SIZES).divisions == 262_144


def test_a11_extra_multiplications_of_one_pass() -> None:
    assert count(CASCADE5, sizes=SIZES).ops["mul"] == 8_519_680
    assert "mul" not in count(CASCADE4, sizes=SIZES).ops


@pytest.mark.parametrize(
    ("cascade", "exp", "div", "maxima", "add", "mul"),
    [
        (CASCADE4, M * P, M * P, M * P, M * P, 0),
        (papers.cascade4(deferred=True), M * P, F * P, M * P, M * P, 0),
        (papers.local_max(deferred=True), M * P + M1 * P, F * P, M * P + M1 * P, M * P + M1 * P, M * P + M1 * P),
        (CASCADE5, M * P + M1 * P, F * P, M * P + M1 * P, M * P + (1 + F) * M1 * P, (1 + F) * M1 * P),
    ],
)
def test_a7_operation_table(cascade: Cascade, exp: int, div: int, maxima: int, add: int, mul: int) -> None:
    w = count(cascade, sizes=SIZES)
    assert w.flops == 2 * M * P * (E + F)
    assert (w.exps, w.divisions, w.maxima) == (exp, div, maxima)
    assert (w.ops.get("add", 0), w.ops.get("mul", 0)) == (add, mul)


def test_counts_are_symbolic_without_sizes() -> None:
    p, m = (sympy.Symbol(n, integer=True, positive=True) for n in "PM")
    assert count(CASCADE4).exps == m * p


# --- FuseMax's accelerator --------------------------------------------------------------------------------------

ARRAY = device("fusemax")


def fused_bytes(model: str, n: int, scores_on_chip: bool = False) -> int:
    heads, d = MODELS[model]
    tile = fusemax.query_tile(n, d, d, ARRAY, scores_on_chip=scores_on_chip)
    return heads * fusemax.moved_bytes(count(CASCADE5, TileMapping(tile, 256), sizes(n, d), query="p"), CASCADE5)


def sizes(n: int, d: int) -> dict[str, int]:
    return {"P": n, "M": n, "E": d, "F": d, "M1": n // 256, "M0": 256}


def test_a12_one_pass_traffic() -> None:
    expected = (402653184, 1610612736, 6442450944, 38654705664, 463856467968, 6803228196864)
    assert tuple(fused_bytes("bert", n) for n in LENGTHS) == expected


def test_a15_traffic_with_scores_on_chip() -> None:
    assert fused_bytes("bert", 16 * K, scores_on_chip=True) == 9663676416
    assert fused_bytes("bert", 1024 * K, scores_on_chip=True) == 26594437496832


@pytest.mark.parametrize(
    ("model", "n", "expected"),
    [("bert", K, 6845104128), ("bert", 4 * K, 104689827840), ("bert", 64 * K, 26414048870400), ("xlm", K, 9663676416)],
)
def test_a16_unfused_traffic(model: str, n: int, expected: int) -> None:
    heads, d = MODELS[model]
    w = count(CASCADE4, sizes=sizes(n, d), groups=fusemax.UNFUSED)
    assert heads * fusemax.moved_bytes(w, CASCADE4) == expected


def latency(model: str, n: int) -> float:
    heads, d = MODELS[model]
    tile = fusemax.query_tile(n, d, d, ARRAY, scores_on_chip=False)
    return fusemax.latency_seconds(CASCADE5, TileMapping(tile, 256), sizes(n, d), ARRAY, heads)


@pytest.mark.parametrize(
    ("model", "n", "expected"),
    [("bert", K, 0.002013140425531915), ("bert", 64 * K, 7.402500357446808), ("xlm", 1024 * K, 4862.10858920851)],
)
def test_a17_latency(model: str, n: int, expected: float) -> None:
    assert latency(model, n) == pytest.approx(expected, rel=1e-14)


def test_a19_mean_speedup_over_unfused() -> None:
    ratios = []
    for model, (heads, d) in MODELS.items():
        for n in LENGTHS:
            ratios.append(fusemax.unfused_seconds(CASCADE4, sizes(n, d), ARRAY, heads) / latency(model, n))
    assert len(ratios) == 24
    assert sum(ratios) / 24 == pytest.approx(10.05, abs=5e-3)


# Bytes of attn-flat.csv in FuseMax's artifact. XLM's shorter lengths keep other operands on chip there; it is the
# lanes that bound them.
FLAT_BYTES = [("bert", K, 1308622848), ("bert", 4 * K, 21128367461.209305), ("bert", 16 * K, 333222041171.3489),
              ("bert", 64 * K, 5312225305909.582), ("bert", 256 * K, 435458144206848), ("bert", 1024 * K, 6966711832018944),
              ("t5", 256 * K, 290305429471232), ("xlm", 256 * K, 598271764463616), ("xlm", 1024 * K, 9570698963976192)]


@pytest.mark.parametrize(("model", "n", "expected"), FLAT_BYTES)
def test_a19_traffic_of_flat(model: str, n: int, expected: float) -> None:
    heads, d = MODELS[model]
    assert heads * fusemax.flat_bytes(CASCADE4, sizes(n, d)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("model", "n", "expected"),
    [("bert", K, 0.013386076595744681), ("bert", 64 * K, 54.829369736170214), ("bert", 256 * K, 1013.8800000000001),
     ("trxl", 1024 * K, 21627.52), ("xlm", 16 * K, 4.569114144680851), ("xlm", 1024 * K, 22283.52)],
)
def test_a19_latency_of_flat(model: str, n: int, expected: float) -> None:
    heads, d = MODELS[model]
    assert fusemax.flat_seconds(CASCADE4, sizes(n, d), ARRAY, heads) == pytest.approx(expected, rel=1e-12)


def test_a19_mean_speedup_over_flat() -> None:
    """The paper says 6.7."""
    ratios = [
        fusemax.flat_seconds(CASCADE4, sizes(n, d), ARRAY, heads) / latency(model, n)
        for model, (heads, d) in MODELS.items()
        for n in LENGTHS
    ]
    assert len(ratios) == 24
    assert sum(ratios) / 24 == pytest.approx(6.723, abs=5e-4)


# --- properties -------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 6), st.integers(1, 6))
def test_bytes_grow_with_each_size(p: int, m1: int, e: int, more: int) -> None:
    def moved(p: int, m1: int) -> Work:
        known = {"P": p * 16, "M": m1 * 16, "M1": m1, "M0": 16, "E": 8 * e, "F": 8 * e}
        return count(CASCADE5, TileMapping(16, 16), known, query="p")

    assert moved(p, m1).bytes < moved(p + more, m1).bytes
    assert moved(p, m1).bytes < moved(p, m1 + more).bytes
    assert moved(p, m1).unique_bytes <= moved(p, m1).bytes


@given(st.integers(1, 8), st.integers(1, 64))
def test_larger_query_tiles_never_move_more(k: int, m1: int) -> None:
    known = {"P": 1024, "M1": m1, "M0": 16, "E": 64, "F": 64}
    small, large = (count(CASCADE5, TileMapping(t, 16), known, query="p").bytes for t in (16 * k, 32 * k))
    assert large <= small


def test_whole_is_tiles_and_programs() -> None:
    w = count(CASCADE5, TileMapping(128, 128), SIZES, query="p")
    assert w.tiles
    assert w.full_tile
    assert w.program
    for op, n in w.ops.items():
        if op != "index":
            per = w.full_tile.ops.get(op, 0) * w.tiles.visited + w.program.ops.get(op, 0) * w.programs
            assert per == n, op
    assert w.full_tile.flops * w.tiles.visited == w.flops


def test_key_tile_is_found_by_structure() -> None:
    assert key_tile(CASCADE5) == "m0"
    assert key_tile(CASCADE4) is None


def test_a_mapping_needs_a_cascade_that_streams() -> None:
    with pytest.raises(ValueError, match="does not stream"):
        count(CASCADE4, TileMapping(128, 128), SIZES)
    with pytest.raises(ValueError, match="no query rank z"):
        count(CASCADE5, TileMapping(128, 128), SIZES, query="z")


@pytest.mark.parametrize(("value", "width"), [(512, 576), (576, 576)])
def test_values_that_are_columns_of_the_keys_are_read_once(value: int, width: int) -> None:
    """Absorbed latents: one tensor holds keys and values, and a tile of it serves both."""
    b = papers.Builder()
    at = ex.index("b"), ex.index("m")
    key = b.given("C", (b.extent("b"), b.extent("m"), b.extent("e")), (*at, ex.index("e")))
    qk = b.put("QK", "bhpm", b.input("Q", "bhpe") * key, "add", "e")
    w = b.put("A", "bhpm", papers.softmax(b, b.put("S", "bhpm", qk * 0.125)))
    b.put("O", "bhpf", w * ex.load("C", (*at, ex.index("f")), "f32"), "add", "m")
    s = subject(b.cascade("latent", "O"))
    assert isinstance(s, Subject)
    at_ = shape(s.cascade, s.attention, {"B": 2, "H": 16, "P": 1, "M": 256, "E": width, "F": value})
    found = work(s, at_, TileMapping(1, 64), at_.symbols, plan_tiles(s, at_, TileMapping(1, 64)))
    assert sum(t.once for t in found.traffic if t.tensor == "C") == 4 * 2 * 256 * width


def test_queries_and_keys_of_one_tensor_are_other_rows() -> None:
    b = papers.Builder()
    h, e = ex.index("h"), ex.index("e")
    shape_ = b.extent("b"), b.extent("h"), b.extent("m"), b.extent("e")
    x = [b.given("X", shape_, (ex.index("b"), h, ex.index(r), e)) for r in "pm"]
    qk = b.put("QK", "bhpm", x[0] * x[1], "add", "e")
    w = b.put("A", "bhpm", papers.softmax(b, b.put("S", "bhpm", qk * 0.125)))
    b.put("O", "bhpf", w * b.input("V", "bhmf"), "add", "m")
    s = subject(b.cascade("self", "O"))
    assert isinstance(s, Subject)
    at = shape(s.cascade, s.attention, {"B": 1, "H": 1, "P": 256, "M": 256, "E": 64, "F": 64})
    found = work(s, at, TileMapping(64, 64), at.symbols, plan_tiles(s, at, TileMapping(64, 64)))
    assert len([t for t in found.traffic if t.tensor == "X"]) == 2


def test_values_that_are_widened_move_no_more() -> None:
    """A cast of the values is one of what a tile has read."""

    def moved(dtype: str, cast: bool) -> int:
        b = papers.Builder()
        qk = b.put("QK", "bhpm", b.input("Q", "bhpe") * b.input("K", "bhme"), "add", "e")
        w = b.put("A", "bhpm", papers.softmax(b, b.put("S", "bhpm", qk * 0.125)))
        v = b.input("V", "bhmf", dtype)
        b.put("O", "bhpf", w * (ex.cast(v, "f32") if cast else v), "add", "m")
        s = subject(b.cascade("cast", "O"))
        assert isinstance(s, Subject)
        at = shape(s.cascade, s.attention, {"B": 1, "H": 4, "P": 512, "M": 512, "E": 64, "F": 64})
        found = work(s, at, TileMapping(64, 64), at.symbols, plan_tiles(s, at, TileMapping(64, 64)))
        (own,) = (t.moved for t in found.traffic if t.tensor == "V")
        return own

    assert 2 * moved("bf16", cast=True) == moved("f32", cast=False)
