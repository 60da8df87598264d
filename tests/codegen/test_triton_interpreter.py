"""Our Triton kernels in the interpreter against `evaluate` in float64; outputs are poisoned with NaN first."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reattend.codegen.files import cache
from reattend.codegen.triton.kernel import TritonKernel, build
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Access, Cascade, Einsum, Rank, verify
from reattend.patterns.cascade import Tensor as Shape
from reattend.patterns.evaluate import DTYPE, evaluate
from reattend.patterns.mapping import TileMapping

from .. import strategies
from ..strategies import INF, LOWEST, B, E, F, H, M, P, Program, attention, programs
from . import attentions
from .nearness import ULP, close

pytestmark = [pytest.mark.interpreter, pytest.mark.thin(4)]

PROGRAMS = int(os.environ.get("REATTEND_PROGRAMS", "40"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("generated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "directory", lambda: folder)
        yield


def kernel(c: Cascade, tile: tuple[int, int] = (16, 16), split: int = 1) -> TritonKernel:
    made = build(c, TileMapping(*tile, split_m=split))
    assert isinstance(made, TritonKernel), made
    return made


def run(made: TritonKernel, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """The kernel's output, written over NaN."""
    c = made.cascade.with_sizes(sizes)
    shape = [int(n) for n in c.tensor[c.outputs[0]].shape]
    out = torch.full(shape, math.nan, dtype=DTYPE[c.tensor[c.outputs[0]].dtype])
    return made.run(tensors, sizes, out=out)


def alone(made: TritonKernel, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """The emitted file by itself: it finds sizes and tiles on its own."""
    keywords = inspect.signature(made.module.attention).parameters
    named = {n: v for n, v in sizes.items() if n in keywords}
    result: Tensor = made.module.attention(*(tensors[n] for n in made.streaming.inputs), **named)
    return result


def check(c: Cascade, tensors: Mapping[str, Tensor], sizes: Mapping[str, int], tile: tuple[int, int] = (16, 16)) -> None:
    close(run(kernel(c, tile), tensors, sizes), c, tensors, sizes)


# --- variants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", attentions.VARIANTS)
def test_variants(name: str) -> None:
    case = attentions.VARIANTS[name]()
    check(case.cascade, case.inputs(), case.sizes)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["causal", "causal_padding", "softcap", "sinks", "gqa", "decode", "square", "sigmoid"])
def test_half_precision(name: str, dtype: str) -> None:
    case = attentions.VARIANTS[name](dtype=dtype)
    check(case.cascade, case.inputs(DTYPE[dtype]), case.sizes)


@pytest.mark.parametrize("name", ["alibi", "bias", "cosine_cap", "nan_padding"])
def test_scores_in_base_2(name: str) -> None:
    case = attentions.VARIANTS[name](dtype="bf16")
    check(case.cascade, case.inputs(torch.bfloat16), case.sizes)


@pytest.mark.parametrize("score", ["table", "distance", "logarithm"])
def test_distances_are_converted_apart(score: str) -> None:
    p = attention(strategies.SCORES[score], strategies.ROWS["softmax"], h=1, dtype="bf16")
    check(p.cascade, p.inputs(), p.sizes)


@pytest.mark.parametrize("name", ["padding", "segments", "causal_padding", "decode", "checkerboard", "alibi", "window"])
def test_the_emitted_file_finds_its_own_tiles(name: str) -> None:
    case = attentions.VARIANTS[name]()
    made, tensors = kernel(case.cascade), case.inputs()
    close(alone(made, tensors, case.sizes), case.cascade, tensors, case.sizes)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (37, 1), (63, 63), (63, 111), (111, 63)])
def test_odd_sizes(queries: int, keys: int) -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"], p=queries, m=keys, h=1)
    check(p.cascade, p.inputs(), p.sizes, (32, 32))


@pytest.mark.parametrize(("b", "h", "p", "m", "f"), [(1, 1, 1, 1, 1), (1, 2, 1, 33, 16), (2, 1, 33, 1, 16), (1, 1, 32, 32, 1)])
def test_sizes_that_are_numbers(b: int, h: int, p: int, m: int, f: int) -> None:
    drawn = attention(lambda s: ex.where(M <= P + 3, s, -INF), strategies.ROWS["softmax"], b=b, h=h, p=p, m=m, f=f)
    check(drawn.cascade.with_sizes(drawn.sizes), drawn.inputs(), {})


@pytest.mark.parametrize("size", [8, 16, 24, 40, 80, 192])
def test_head_sizes_that_are_no_power_of_two(size: int) -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"], e=size, f=size, h=1)
    check(p.cascade, p.inputs(), p.sizes)


@pytest.mark.parametrize("odd", ["", "Q", "V"])
def test_strides_that_are_no_multiples_of_8(odd: str) -> None:
    """Heads of 24 are read 8 at a time, unless a tensor lies otherwise."""
    p = attention(lambda s: s, strategies.ROWS["softmax"], e=24, f=24, h=1, p=17, m=17)
    tensors = p.inputs()
    if odd:
        wide = torch.zeros(1, 1, 17, 27)
        wide[..., 1:25] = tensors[odd]
        tensors[odd] = wide[..., 1:25]
    made = kernel(p.cascade)
    assert made.streaming.eights == (0, 1, 2)
    given = tuple(tensors[n] for n in "QKV")
    assert made.module.in_eights(torch.empty(1, 1, 17, 24), given, made.streaming.eights) == (not odd)
    check(p.cascade, tensors, p.sizes)
    close(alone(made, tensors, p.sizes), p.cascade, tensors, p.sizes)


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 64)])
def test_tiles_of_other_shapes(tile: tuple[int, int]) -> None:
    case = attentions.VARIANTS["window"]()
    check(case.cascade, case.inputs(), case.sizes, tile)


def test_strided_inputs() -> None:
    p = attention(lambda s: ex.where(M <= P, s, -INF), strategies.ROWS["softmax"], h=2)
    tensors = p.inputs()
    swapped = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for n, t in tensors.items()}
    assert not swapped["Q"].is_contiguous()
    check(p.cascade, swapped, p.sizes)


# --- accuracy against SDPA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
def test_errors_beside_sdpa(dtype: str, causal: bool) -> None:
    """RMS at most 1.2 times and maximum at most 2.5 times SDPA's in the same type, mean over five seeds."""
    keep = M <= P if causal else ex.TRUE
    p = attention(lambda s: ex.where(keep, s, -INF), strategies.ROWS["softmax"], h=2, p=63, m=63, dtype=dtype)
    made = kernel(p.cascade, (32, 32))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for seed in range(5):
        tensors = p.inputs(seed)
        want = evaluate(p.cascade, tensors, p.sizes, widen=True)["O"]
        q, k, v = (tensors[n] for n in "QKV")
        other = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.25)
        for errors, out in ((ours, run(made, tensors, p.sizes)), (theirs, other)):
            difference = out.double() - want
            errors.append((difference.square().mean().sqrt().item(), difference.abs().max().item()))
    rms, largest = (sum(x) / 5 for x in zip(*ours))
    rms_theirs, largest_theirs = (sum(x) / 5 for x in zip(*theirs))
    assert rms <= 1.2 * rms_theirs
    assert largest <= max(2.5 * largest_theirs, ULP[dtype])


# --- rows without a key -----------------------------------------------------------------------------------------

NO_KEY: dict[str, tuple[float, str]] = {"nan": (-INF, "softmax"), "uniform": (LOWEST, "softmax"), "zero": (-INF, "zero")}


@pytest.mark.parametrize("rule", NO_KEY)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_a_key(rule: str, causal: bool) -> None:
    fill, row = NO_KEY[rule]
    pad = strategies.MASKS["padding"]
    keep = pad & (M <= P) if causal else pad
    p = attention(lambda s: ex.where(keep, s, fill), strategies.ROWS[row], b=3, p=37, m=37)
    tensors = p.inputs()
    tensors["pad"][0] = False
    tensors["pad"][1, :20] = False
    tensors["pad"][2] = True
    made = kernel(p.cascade)
    out = run(made, tensors, p.sizes)
    close(out, p.cascade, tensors, p.sizes)
    first = out[0]
    assert {"nan": first.isnan().all(), "zero": (first == 0).all(), "uniform": torch.isfinite(first).all()}[rule]
    close(alone(made, tensors, p.sizes), p.cascade, tensors, p.sizes)


def test_nan_beyond_the_keys_is_not_read() -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"], h=1, p=5, m=21)
    tensors = p.inputs()
    wide = torch.full((1, 1, 64, 16), math.nan)
    wide[:, :, :21] = tensors["V"]
    tensors["V"] = wide[:, :, :21]
    check(p.cascade, tensors, p.sizes)


def test_values_whose_length_has_a_symbol_of_its_own_are_not_read_past_their_end() -> None:
    """Two caches that grow apart: as many values as keys, by no proof. What lies behind them in memory is NaN."""
    case = attentions.build(lambda qk: qk, p=3, m=23)
    own = case.cascade.tensor["V"]
    values = replace(own, shape=(*own.shape[:2], attentions.size("t2"), own.shape[3]))
    c = replace(case.cascade, tensors=tuple(values if t is own else t for t in case.cascade.tensors))
    tensors = case.inputs()
    wide = torch.full((*tensors["V"].shape[:2], 64, 16), math.nan)
    wide[:, :, :23] = tensors["V"]
    tensors["V"] = wide[:, :, :23]
    got = run(kernel(c), tensors, {**case.sizes, "t2": 23})
    want = scaled_dot_product_attention(tensors["Q"], tensors["K"], tensors["V"], scale=0.25)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# --- decode, grouped heads, several products ---------------------------------------------------------------------


def decode(heads: int, group: int, queries: int = 1, keys: int = 41, batch: int = 2, keep: ex.Expr = ex.TRUE) -> Program:
    """Static query rows: heads that share keys are packed into one row block."""
    p = attention(
        lambda s: ex.where(keep, s, LOWEST), strategies.ROWS["softmax"], b=batch, h=heads, group=group, p=queries, m=keys
    )
    return Program(p.cascade.with_sizes({"s": queries}), {"t": keys}, "decode")


@pytest.mark.parametrize(("heads", "group", "queries"), [(8, 4, 1), (4, 4, 1), (4, 1, 1), (6, 2, 3), (72, 72, 1)])
def test_decode_packs_the_heads_of_a_group(heads: int, group: int, queries: int) -> None:
    p = decode(heads, group, queries, keep=strategies.MASKS["padding"])
    made = kernel(p.cascade)
    assert math.prod(int(made.streaming.extent[r]) for r in made.streaming.rows) == (group if group > 1 else 1) * queries
    close(run(made, p.inputs(), p.sizes), p.cascade, p.inputs(), p.sizes)


def test_keys_shared_by_all_heads() -> None:
    p = decode(4, 4)
    loose = ex.load("K", (B, ex.const(0), M, E), "f32")
    table = {ex.load("K", (B, H // 4, M, E), "f32"): loose,
             ex.load("V", (B, H // 4, M, F), "f32"): ex.load("V", (B, ex.const(0), M, F), "f32")}
    einsums = tuple(Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in p.cascade.einsums)
    c = verify(Cascade("shared", p.cascade.ranks, p.cascade.tensors, einsums, ("O",)))
    made = kernel(c)
    assert [made.streaming.extent[r] for r in made.streaming.rows] == [4]
    close(run(made, p.inputs(), p.sizes), c, p.inputs(), p.sizes)


def test_two_products_and_a_flattened_sum() -> None:
    """Scores from a latent and a position part, as absorbed latents have them; the position part sums over two ranks."""
    r, t = ex.index("r"), ex.index("t")
    n, m = 33, 40
    qr, kr = ex.load("QR", (B, H, P, r, t), "f32"), ex.load("KR", (B, M, r, t), "f32")
    base = attention(lambda s: s, strategies.ROWS["softmax"], p=n, m=m)
    qk = ex.load("QK", (B, H, P, M), "f32")
    extra = Einsum(Access("QP", (B, H, P, M)), qr * kr * 0.5, "add", ("r", "t"))
    table = {qk: qk + ex.load("QP", (B, H, P, M), "f32")}
    einsums = [extra, *(Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums)]
    c = verify(Cascade(
        "latent", (*base.cascade.ranks, Rank("r", 2), Rank("t", 12)),
        (*base.cascade.tensors, Shape("QR", (1, 2, strategies.QUERIES, 2, 12)), Shape("KR", (1, strategies.KEYS, 2, 12)),
         Shape("QP", base.cascade.tensor["QK"].shape)),
        tuple(einsums), ("O",),
    ))
    g = torch.Generator().manual_seed(1)
    tensors = {**base.inputs(), "QR": torch.randn(1, 2, n, 2, 12, generator=g), "KR": torch.randn(1, m, 2, 12, generator=g)}
    assert len(kernel(c).streaming.products) == 2
    check(c, tensors, base.sizes)


def test_an_operand_that_is_computed() -> None:
    """A rotation in the query, a scale in the keys and values held as integers."""
    angle, half = ex.cast(P, "f32") * 0.1, (E + 8) % 16
    q, turned = ex.load("Q", (B, H, P, E), "f32"), ex.load("Q", (B, H, P, half), "f32")
    rotated = q * ex.unary("cos", angle) + ex.where(E < 8, -turned, turned) * ex.unary("sin", angle)
    values = ex.cast(ex.load("V", (B, H, M, F), "i8"), "f32") * ex.load("scale", (M,), "f32")
    base = attention(lambda s: s, strategies.ROWS["softmax"])
    table = {q: rotated, ex.load("V", (B, H, M, F), "f32"): values}
    einsums = tuple(Einsum(e.out, ex.substitute(e.body, table), e.op, e.over) for e in base.cascade.einsums)
    shapes = [t if t.name != "V" else Shape("V", t.shape, "i8") for t in base.cascade.tensors]
    c = verify(Cascade("computed", base.cascade.ranks, (*shapes, Shape("scale", (strategies.QUERIES,))), einsums, ("O",)))
    g = torch.Generator().manual_seed(2)
    tensors = {**base.inputs(), "V": torch.randint(-9, 9, (1, 2, 33, 16), generator=g, dtype=torch.int8),
               "scale": torch.rand(33, generator=g)}
    check(c, tensors, base.sizes)


def test_other_batch_ranks() -> None:
    """One batch rank, and three with the output in another order."""
    x, y, z = (ex.index(r) for r in "xyz")
    n = 20
    for batch, order in (((x,), (x, P, F)), ((x, y, z), (x, P, y, F, z))):
        sizes = {"x": 2, "y": 3, "z": 2, "p": n, "m": n, "e": 16, "f": 16}

        def shape(at: tuple[ex.Expr, ...], sizes: Mapping[str, int] = sizes) -> tuple[int, ...]:
            return tuple(sizes[str(i.attr)] for i in at)

        q, k, v, qk, row, a = (*batch, P, E), (*batch, M, E), (*batch, M, F), (*batch, P, M), (*batch, P), (*batch, P, M)
        s = ex.load("QK", qk, "f32")
        top, total = ex.load("GM", row, "f32"), ex.load("SD", row, "f32")
        einsums = (
            Einsum(Access("QK", qk), ex.load("Q", q, "f32") * ex.load("K", k, "f32"), "add", ("e",)),
            Einsum(Access("GM", row), s, "max", ("m",)),
            Einsum(Access("SD", row), ex.exp(s - top), "add", ("m",)),
            Einsum(Access("A", a), ex.exp(s - top) / total),
            Einsum(Access("O", order), ex.load("A", a, "f32") * ex.load("V", v, "f32"), "add", ("m",)),
        )
        tensors = [Shape(t, shape(at)) for t, at in
                   (("Q", q), ("K", k), ("V", v), ("QK", qk), ("GM", row), ("SD", row), ("A", a), ("O", order))]
        used = {str(i.attr) for at in (q, k, v, order) for i in at}
        c = verify(Cascade("batch", tuple(Rank(r, sizes[r]) for r in sizes if r in used), tuple(tensors), einsums, ("O",)))
        g = torch.Generator().manual_seed(3)
        check(c, {t: torch.randn(shape(at), generator=g) for t, at in (("Q", q), ("K", k), ("V", v))}, {})


# --- key ranges -----------------------------------------------------------------------------------------------------

LENGTH = ex.load("length", (B,), "i64")
RANGES = {
    "causal": M <= P, "window": (M <= P) & (P - M < 9), "later": M >= P, "blocks": ex.equal(P // 8, M // 8),
    "lengths": (M < LENGTH) & (M <= P), "shifted": M <= P - 5, "rows": (P < 30) & (M <= P + 2),
}


def ranged(name: str, fill: float, row: str = "softmax") -> Program:
    batch = 2 if name == "lengths" else 1
    return attention(lambda s: ex.where(RANGES[name], s, fill), strategies.ROWS[row], b=batch, h=1, p=37, m=53)


@pytest.mark.parametrize("fill", [-INF, LOWEST])
@pytest.mark.parametrize("name", RANGES)
def test_row_blocks_walk_a_range(name: str, fill: float) -> None:
    p, split = ranged(name, fill), 2 if name in ("window", "shifted") else 1
    tensors = {**p.inputs(), **({"length": torch.tensor([0, 21])} if name == "lengths" else {})}
    made = kernel(p.cascade, split=split)
    # where a masked key may count, blocks whose bounds jump are listed
    assert (made.streaming.span is None) == (name == "blocks" and fill == LOWEST)
    close(run(made, tensors, p.sizes), p.cascade, tensors, p.sizes)
    close(alone(made, tensors, p.sizes), p.cascade, tensors, p.sizes)


@pytest.mark.parametrize(("name", "unread"), [("causal", slice(48, None)), ("later", slice(0, 0)), ("lengths", slice(32, None))])
def test_tiles_outside_a_range_are_not_read(name: str, unread: slice) -> None:
    p = ranged(name, -INF, row="zero")
    tensors = {**p.inputs(), **({"length": torch.tensor([7, 21])} if name == "lengths" else {})}
    want = run(kernel(p.cascade), tensors, p.sizes)
    for n in ("K", "V"):
        tensors[n][:, :, unread] = math.nan
    torch.testing.assert_close(run(kernel(p.cascade), tensors, p.sizes), want, rtol=0, atol=0)


@pytest.mark.parametrize("split", [1, 2])
def test_decode_reads_its_window_alone(split: int) -> None:
    """One query at the end of a cache that was not trimmed, 4 heads to a key head."""
    keep = (M <= P + 60) & (P + 60 - M < 12)
    p = decode(8, 4, keys=61, keep=keep)
    tensors = p.inputs()
    want = evaluate(p.cascade, tensors, p.sizes, widen=True)["O"]
    for n in ("K", "V"):
        tensors[n][:, :, :48] = math.nan
    out = run(kernel(p.cascade, split=split), tensors, p.sizes)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


# --- split keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [2, 3, 8])
def test_split_keys_in_decode(split: int) -> None:
    p = decode(8, 4, keep=strategies.MASKS["padding"])
    tensors = p.inputs()
    tensors["pad"][0] = False
    made = kernel(p.cascade, split=split)
    close(run(made, tensors, p.sizes), p.cascade, tensors, p.sizes)
    close(alone(made, tensors, p.sizes), p.cascade, tensors, p.sizes)


def test_keys_are_split_for_the_keys_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as keep 132 units busy twice, none shorter than four tiles; as planned where no units are known."""
    made = kernel(decode(8, 4).cascade, split=4).module
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    found = {keys: made.parts_of(4, 8, keys // 64, cuda) for keys in (64, 1024, 32768, 131072)}
    assert found == {64: 1, 1024: 4, 32768: 33, 131072: 33}
    assert made.parts_of(4, 1000, 2048, cuda) == 1
    assert made.parts_of(4, 8, 1, cpu) == 4


@pytest.mark.parametrize("rule", sorted(strategies.ROWS))
def test_split_keys_merge_any_row_state(rule: str) -> None:
    fill = -INF if rule in strategies.FILLED else 0.0
    p = attention(lambda s: ex.where(M <= P, s, fill), strategies.ROWS[rule], p=37, m=37, dtype="f16")
    made = kernel(p.cascade, split=2)
    close(run(made, p.inputs(), p.sizes), p.cascade, p.inputs(), p.sizes)


# --- anything -----------------------------------------------------------------------------------------------------


@settings(max_examples=PROGRAMS, deadline=None)
@given(programs())
def test_drawn_programs(p: Program) -> None:
    made = kernel(p.cascade)
    tensors = p.inputs()
    close(run(made, tensors, p.sizes), p.cascade, tensors, p.sizes, most=3.0)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_named() -> None:
    p = attention(lambda s: s, strategies.ROWS["softmax"])
    made, tensors = kernel(p.cascade), p.inputs()
    with pytest.raises(ValueError, match="needs K; given Q, V"):
        made.run({n: tensors[n] for n in "QV"}, p.sizes)
    with pytest.raises(ValueError, match=r"K is torch\.float16; the kernel was built for f32"):
        made.run({**tensors, "K": tensors["K"].half()}, p.sizes)
    with pytest.raises(ValueError, match=r"K has shape \(1, 2, 40, 16\), the others make it \(1, 2, 33, 16\)"):
        made.run({**tensors, "K": torch.randn(1, 2, 40, 16)}, p.sizes)


def test_a_size_that_no_shape_shows_is_asked_for() -> None:
    case = attentions.VARIANTS["decode"]()
    made, tensors = kernel(case.cascade), case.inputs()
    with pytest.raises(ValueError, match="no value for size past"):
        made.run(tensors)
    check(case.cascade, tensors, case.sizes)


@pytest.mark.parametrize("name", ["padding", "segments", "causal_padding", "sdpa_padding", "prefix", "small_padding"])
def test_listed_tiles_are_those_of_the_mask(name: str) -> None:
    """Full ones from the front, partial ones from the back; what the rule says of rows without a key is kept."""
    case = attentions.VARIANTS[name]()
    made, tensors = kernel(case.cascade), case.inputs()
    if "pad" in tensors:
        tensors["pad"][0, :20] = False
    s, bound = made.streaming, tuple(case.sizes[n] for n in case.cascade.free_symbols)
    rows, full, every, found, _ = made.module.walk_of(tuple(tensors[n] for n in s.inputs), bound)
    at = {"p": torch.arange(37)[:, None], "m": torch.arange(37)[None, :]}
    for b in range(full.shape[0]):
        kept = MASKED[name](tensors, b, **at).expand(37, 37)
        assert sorted(rows[b].tolist()) == [0, 1, 2]
        assert (every[b][rows[b]].diff() <= 0).all()
        for i in range(3):
            block = kept[16 * i : 16 * i + 16]
            tiles = [block[:, 16 * j : 16 * j + 16] for j in range(3)]
            whole = [j for j, t in enumerate(tiles) if t.all() and t.shape[1] == 16]
            every_row = bool(block.any(1).all())
            skipped = s.skipping == "always" or (s.skipping == "guarded" and every_row)
            rest = [j for j, t in enumerate(tiles) if j not in whole and (t.any() or not skipped)]
            n_full, n_all = int(full[b, i]), int(every[b, i])
            assert found[b, i, :n_full].tolist() == whole
            assert found[b, i].flip(0)[: n_all - n_full].tolist() == rest


MASKED: Mapping[str, Callable[..., Tensor]] = {
    "padding": lambda t, b, p, m: t["pad"][b][m], "sdpa_padding": lambda t, b, p, m: t["pad"][b][m],
    "segments": lambda t, b, p, m: (m <= p) & (t["seg"][b][p] == t["seg"][b][m]),
    "causal_padding": lambda t, b, p, m: (m <= p) & t["pad"][b][m],
    "small_padding": lambda t, b, p, m: (m <= p) & t["pad"][b][m], "prefix": lambda t, b, p, m: (m <= p) | (m < 11),
}


def test_lists_that_sizes_decide_are_made_once() -> None:
    case = attentions.VARIANTS["prefix"]()
    made, tensors = kernel(case.cascade), case.inputs()
    given, sizes = tuple(tensors[n] for n in "QKV"), tuple(case.sizes[n] for n in case.cascade.free_symbols)
    first, again = (made.module.walk_of(given, sizes) for _ in range(2))
    assert first[3] is again[3]
    padded = attentions.VARIANTS["padding"]()
    made, tensors = kernel(padded.cascade), padded.inputs()
    given = tuple(tensors[n] for n in made.streaming.inputs)
    sizes = tuple(padded.sizes[n] for n in padded.cascade.free_symbols)
    assert made.module.walk_of(given, sizes)[3] is not made.module.walk_of(given, sizes)[3]


def test_lists_are_not_kept_across_streams_nor_out_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    made = kernel(attentions.VARIANTS["prefix"]().cascade).module
    here = SimpleNamespace(stream=1, capturing=False)
    count = 0

    def make() -> tuple[Tensor, ...]:
        nonlocal count
        count += 1
        return (torch.zeros(count),)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=here.stream))
    cuda = torch.device("cuda", 0)
    sizes = []
    for here.stream, here.capturing in ((1, True), (1, False), (1, False), (2, False), (1, False), (1, True)):
        sizes.append(len(made.kept_lists(make, ("here",), cuda)[0]))
    assert sizes == [1, 2, 2, 3, 2, 4]


def test_a_number_on_the_host() -> None:
    """A float64 without dimensions, as Dynamo passes a module's floats."""
    factor = ex.cast(ex.load("factor", (), "f64"), "f32")
    p = attention(lambda s: s, strategies.ROWS["softmax"])
    einsums = tuple(
        Einsum(e.out, ex.substitute(e.body, {ex.const(0.25, "f32"): factor}), e.op, e.over) for e in p.cascade.einsums
    )
    c = verify(Cascade("scaled", p.cascade.ranks, (*p.cascade.tensors, Shape("factor", (), "f64")), einsums, ("O",)))
    tensors = {**p.inputs(), "factor": torch.tensor(0.3, dtype=torch.float64)}
    made = kernel(c)
    close(run(made, tensors, p.sizes), c, tensors, p.sizes)
    close(alone(made, tensors, p.sizes), c, tensors, p.sizes)


