"""The fused loop around programs written by hand, against PyTorch in float64; what lies past the end of memory is NaN."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reattend.codegen.files import native
from tests.tiers import few, one_in

NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
# Largest error over that of the same arithmetic by PyTorch in the same type.
ALLOWED = {torch.float32: 1.2, torch.bfloat16: 2.5, torch.float16: 2.5}

# exp(S - max S) with carried maximum and sum; keys of the causal window only where the tile is partial
SOFTMAX = """
  int64_t window;
  static Program load(const void* const*, const int64_t* sizes) { return {sizes[0]}; }
  struct Row { int64_t p; };
  Row row(int64_t, int64_t, int64_t p) const { return {p}; }
  void fetch(const Row&, int64_t, int) const {}
  static void start(float* state) { state[0] = -INF; state[1] = 0.0f; }
  template <bool PARTIAL> INLINE float step(const Row& r, float* const* x, float* w, float* state, int64_t m0, int n) const {
    float* s = x[0];
    const float scale = 1.44269504f / std::sqrt(float(E[0]));
    const int distance = int(r.p - m0), size = int(window);
#pragma omp simd
    for (int i = 0; i < n; i++) {
      const int d = distance - i;
      s[i] = !PARTIAL | ((d >= 0) & (d < size)) ? s[i] * scale : -INF;
    }
    const float top = row_max(s, n, state[0]), safe = top == -INF ? 0.0f : top;
#pragma omp simd
    for (int i = 0; i < n; i++) w[i] = exp2_(s[i] - safe);
    const float c = exp2_(state[0] - safe);
    state[0] = top;
    state[1] = state[1] * c + row_sum(w, n);
    return c;
  }
  void finish(const Row&, const float* acc, const float* state, OUT* out) const {
    const float r = 1.0f / (state[1] == 0.0f ? 1.0f : state[1]);
    for (int f = 0; f < F; f++) out[f] = OUT(acc[f] * r);
  }
"""
# a weight of its own for each key, no row state; keys of the causal window as above
SIGMOID = """
  int64_t window;
  static Program load(const void* const*, const int64_t* sizes) { return {sizes[0]}; }
  struct Row { int64_t p; };
  Row row(int64_t, int64_t, int64_t p) const { return {p}; }
  void fetch(const Row&, int64_t, int) const {}
  static void start(float*) {}
  template <bool PARTIAL> INLINE float step(const Row& r, float* const* x, float* w, float*, int64_t m0, int n) const {
    const float* s = x[0];
    const int distance = int(r.p - m0), size = int(window);
#pragma omp simd
    for (int i = 0; i < n; i++) {
      const int d = distance - i;
      w[i] = !PARTIAL | ((d >= 0) & (d < size)) ? sigmoid_(s[i]) : 0.0f;
    }
    return 1.0f;
  }
  void finish(const Row&, const float* acc, const float*, OUT* out) const {
    for (int f = 0; f < F; f++) out[f] = OUT(acc[f]);
  }
"""
# two products, a bias table over heads and keys, and the row's weight sum: Σ (a + tanh b + t)² V / Σ (…)²
TWO = """
  const float* table; int64_t keys;
  static Program load(const void* const* tensors, const int64_t* sizes) { return {static_cast<const float*>(tensors[0]), sizes[0]}; }
  struct Row { const float* table; };
  Row row(int64_t, int64_t h, int64_t) const { return {table + h * keys}; }
  void fetch(const Row&, int64_t, int) const {}
  static void start(float* state) { state[0] = 0.0f; }
  template <bool PARTIAL> INLINE float step(const Row& r, float* const* x, float* w, float* state, int64_t m0, int n) const {
    const float *a = x[0], *b = x[1], *t = r.table + m0;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
      const float y = a[i] + tanh_(b[i]) + t[i], y2 = y * y;
      w[i] = y2;
      sum += y2;
    }
    state[0] += sum;
    return 1.0f;
  }
  void finish(const Row&, const float* acc, const float* state, OUT* out) const {
    for (int f = 0; f < F; f++) out[f] = OUT(acc[f] / state[0]);
  }
"""


@dataclass(frozen=True)
class Case:
    """Sizes of a call. `layout`: how dimensions lie in memory; rows are always followed by NaN."""

    z: int = 2
    heads: int = 4
    group: int = 2
    p: int = 70
    m: int = 70
    e: tuple[int, ...] = (64,)
    f: int = 64
    tile: tuple[int, int] = (32, 32)
    dtype: torch.dtype = torch.float32
    window: int = 1 << 30
    threads: int = 2
    layout: str = "zhne"


def text(body: str, c: Case, carried: int) -> str:
    """The whole C++ of a program."""
    name = NAMES[c.dtype]
    return native.source(
        f"constexpr int PRODUCTS = {len(c.e)}, TILE_P = {c.tile[0]}, TILE_M = {c.tile[1]}, CARRIED = {carried};\n"
        f"constexpr int E[PRODUCTS] = {{{', '.join(map(str, c.e))}}}, F = {c.f};\n"
        f"using T = {name};\nusing OUT = {name};\nstruct Program {{{body}}};\n"
    )


def tensor(c: Case, heads: int, rows: int, size: int, seed: int) -> Tensor:
    """A [Z, heads, rows, size] in the case's layout; memory after each row, and after the last row, is NaN."""
    g = torch.Generator().manual_seed(seed)
    shape = {"z": c.z, "h": heads, "n": rows + 1, "e": size + 3}
    whole = torch.full([shape[x] for x in c.layout], float("nan"), dtype=c.dtype)
    view = whole.permute([c.layout.index(x) for x in "zhne"])[:, :, :rows, :size]
    view.copy_(torch.randn(c.z, heads, rows, size, generator=g))
    return view


def kept(c: Case) -> Tensor:
    """[P, M]: the causal window."""
    d = torch.arange(c.p)[:, None] - torch.arange(c.m)
    return (d >= 0) & (d < c.window)


def classes(c: Case, keep: Tensor) -> Tensor:
    """[query tiles, key tiles]: 0 empty, 1 partial, 2 full."""
    tp, tm = c.tile
    rows, columns = -(-c.p // tp), -(-c.m // tm)
    out = torch.zeros(rows, columns, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            part = keep[i * tp : i * tp + tp, j * tm : j * tm + tm]
            out[i, j] = int(part.any()) + int(part.all())
    return out


def call(
    kernel: Callable[..., int], c: Case, q: Sequence[Tensor], k: Sequence[Tensor], v: Tensor, seen: Tensor | None,
    sizes: Sequence[int] = (), tensors: Sequence[Tensor] = (),
) -> Tensor:
    """Run a kernel. `seen`: classes [query tiles, key tiles], for all heads or after [Z, H]."""
    out = torch.full((c.z, c.p, c.heads, c.f + 1), float("nan"), dtype=c.dtype).transpose(1, 2)[..., : c.f]
    packed = native.call_type(len(q))()

    def operand(x: Tensor) -> native.Operand:
        return native.Operand(x.data_ptr(), *x.stride()[:3])

    for i, (a, b) in enumerate(zip(q, k)):
        packed.q[i], packed.k[i] = operand(a), operand(b)
    packed.v, packed.out = operand(v), out.data_ptr()
    packed.out_z, packed.out_h, packed.out_p = out.stride()[:3]
    packed.Z, packed.H, packed.HKV, packed.P, packed.M = c.z, c.heads, c.heads // c.group, c.p, c.m
    if seen is not None:
        seen = seen.expand(c.z, c.heads, *seen.shape[-2:])
        packed.classes = seen.data_ptr()
        packed.class_z, packed.class_h, packed.class_p = seen.stride()[:3]
    packed.threads = c.threads
    numbers = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
    pointers = (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
    packed.sizes, packed.tensors = ctypes.addressof(numbers), ctypes.addressof(pointers)
    assert kernel(ctypes.addressof(packed)) == 0
    return out


def operands(c: Case) -> tuple[list[Tensor], list[Tensor], Tensor]:
    q = [tensor(c, c.heads, c.p, e, 2 * i) for i, e in enumerate(c.e)]
    k = [tensor(c, c.heads // c.group, c.m, e, 2 * i + 1) for i, e in enumerate(c.e)]
    return q, k, tensor(c, c.heads // c.group, c.m, c.f, 99)


def scores(c: Case, q: Tensor, k: Tensor, real: torch.dtype) -> Tensor:
    return q.to(real) @ k.to(real).repeat_interleave(c.group, 1).mT


def softmax(c: Case, keep: Tensor, real: torch.dtype) -> Tensor:
    """SDPA's result, 0 in rows that keep no key."""
    (q,), (k,), v = operands(c)
    k, v = (x.to(real).repeat_interleave(c.group, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.to(real), k, v, attn_mask=keep).nan_to_num(0.0)


def sigmoid(c: Case, keep: Tensor, real: torch.dtype) -> Tensor:
    (q,), (k,), v = operands(c)
    return scores(c, q, k, real).sigmoid().masked_fill(~keep, 0.0) @ v.to(real).repeat_interleave(c.group, 1)


def two(c: Case, table: Tensor, real: torch.dtype) -> Tensor:
    q, k, v = operands(c)
    y = scores(c, q[0], k[0], real) + scores(c, q[1], k[1], real).tanh() + table.to(real)[:, None]
    return y.square() @ v.to(real).repeat_interleave(c.group, 1) / y.square().sum(-1, keepdim=True)


def check(c: Case, out: Tensor, oracle: Tensor, torchs: Tensor) -> None:
    assert not out.isnan().any()
    allowed = (torchs.double() - oracle).pow(2).mean().sqrt() * ALLOWED[c.dtype]
    # in tiny calls the same rounding may fall on either side
    assert (out.double() - oracle).pow(2).mean().sqrt() <= allowed + torch.finfo(c.dtype).eps * oracle.abs().max() / 8


def run_softmax(c: Case, flags: Sequence[str] | None = None) -> None:
    (q,), (k,), v = operands(c)
    keep = kept(c)
    kernel = native.attention(text(SOFTMAX, c, 2), flags)
    out = call(kernel, c, [q], [k], v, classes(c, keep), sizes=[c.window])
    check(c, out, softmax(c, keep, torch.float64), softmax(c, keep, c.dtype))


DTYPES = pytest.mark.parametrize("dtype", few(NAMES, torch.float32, torch.bfloat16), ids=NAMES.values())
# A compilation for each: one type is tried always.
SOME_DTYPES = pytest.mark.parametrize("dtype", few(NAMES, torch.bfloat16), ids=NAMES.values())


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case(p=330, m=330, window=64),
        Case(p=330, m=330, window=1000),
        Case(p=1, m=1),
        Case(p=3, m=50),
        Case(p=67, m=129, window=40, group=4),
        Case(p=64, m=64, heads=3, group=1, threads=1),
        Case(p=90, m=90, layout="znhe"),
        Case(p=90, m=90, layout="nhze"),
        # more keys than a chunk has
        Case(p=700, m=5000, z=1, heads=1, group=1),
    ],
    ids=str,
)
def test_softmax_over_a_causal_window(case: Case, dtype: torch.dtype) -> None:
    run_softmax(replace(case, dtype=dtype))


@SOME_DTYPES
@pytest.mark.parametrize(
    ("e", "f"), [(40, 80), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 1), (80, 96), (128, 128), (33, 256)))]
)
def test_head_sizes(e: int, f: int, dtype: torch.dtype) -> None:
    run_softmax(Case(p=75, m=75, window=50, e=(e,), f=f, dtype=dtype))


@pytest.mark.slow
def test_tiles_of_other_sizes() -> None:
    run_softmax(Case(p=100, m=100, tile=(64, 96), window=70, e=(96,), dtype=torch.bfloat16))
    run_softmax(Case(p=100, m=100, tile=(16, 64), window=70))


@SOME_DTYPES
@pytest.mark.parametrize("case", one_in(2, [Case(p=50, m=211, e=(24,), f=40), Case(p=95, m=95)]), ids=str)
def test_weights_without_row_state(case: Case, dtype: torch.dtype) -> None:
    c = replace(case, dtype=dtype, window=60)
    (q,), (k,), v = operands(c)
    out = call(native.attention(text(SIGMOID, c, 0)), c, [q], [k], v, classes(c, kept(c)), sizes=[c.window])
    check(c, out, sigmoid(c, kept(c), torch.float64), sigmoid(c, kept(c), dtype))


@SOME_DTYPES
@pytest.mark.parametrize("group", few([1, 4], 4))
def test_two_products_of_different_sizes(group: int, dtype: torch.dtype) -> None:
    c = Case(p=45, m=77, e=(64, 20), f=48, group=group, dtype=dtype)
    q, k, v = operands(c)
    table = torch.randn(c.heads, c.m, generator=torch.Generator().manual_seed(5))
    out = call(native.attention(text(TWO, c, 1)), c, q, k, v, None, sizes=[c.m], tensors=[table])
    check(c, out, two(c, table, torch.float64), two(c, table, dtype))


def test_no_classes_means_that_every_tile_is_full() -> None:
    c = Case(p=40, m=128)
    (q,), (k,), v = operands(c)
    out = call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, None, sizes=[1])
    every = torch.ones(c.p, c.m, dtype=torch.bool)
    check(c, out, softmax(c, every, torch.float64), softmax(c, every, c.dtype))


@pytest.mark.parametrize("seen", [torch.zeros(3, 3, dtype=torch.uint8), None], ids=["empty classes", "no keys"])
def test_rows_without_keys_end_with_the_state_they_began_with(seen: Tensor | None) -> None:
    c = Case(p=70, m=0 if seen is None else 70)
    (q,), (k,), v = operands(c)
    out = call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, seen, sizes=[c.window])
    assert (out == 0).all()


def test_no_queries_is_no_work() -> None:
    c = Case(p=0)
    (q,), (k,), v = operands(c)
    assert call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, None, sizes=[1]).numel() == 0


@DTYPES
def test_what_lies_in_empty_tiles_is_not_read(dtype: torch.dtype) -> None:
    c = Case(p=128, m=128, window=32, dtype=dtype, z=1)
    (q,), (k,), v = operands(c)
    keep = kept(c) & (torch.arange(c.p)[:, None] >= 64)
    q[:, :, 64:], before = q[:, :, 64:].clone(), softmax(c, keep, torch.float64)[:, :, 64:]
    k[:, :, :32], v[:, :, :32] = float("nan"), float("inf")
    out = call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, classes(c, keep), sizes=[c.window])
    assert (out[:, :, :64] == 0).all()
    assert (out[:, :, 64:].double() - before).abs().max() < 0.05


def test_a_value_that_is_not_finite_is_multiplied_by_weights_of_zero_as_in_pytorch() -> None:
    c = Case(p=32, m=32, z=1)
    (q,), (k,), v = operands(c)
    v[:, :, 31] = float("inf")
    out = call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, classes(c, kept(c)), sizes=[c.window])
    assert out[:, :, :31].isnan().all()
    assert (out[:, :, 31] == float("inf")).all()


@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "head"])
def test_classes_differ_over_the_batch_or_the_heads(axis: int) -> None:
    c = Case(z=2, heads=2, group=2, p=64, m=96)
    (q,), (k,), v = operands(c)
    maps = torch.tensor([[[2, 0, 0], [2, 0, 0]], [[0, 2, 0], [0, 0, 2]]], dtype=torch.uint8).unsqueeze(1 - axis)
    out = call(native.attention(text(SOFTMAX, c, 2)), c, [q], [k], v, maps, sizes=[c.window])
    keep = maps.bool().repeat_interleave(32, 2).repeat_interleave(32, 3)
    check(c, out, softmax(c, keep, torch.float64), softmax(c, keep, c.dtype))


def test_threads_give_the_same_bits() -> None:
    c = Case(p=333, m=333, z=1, window=200)
    (q,), (k,), v = operands(c)
    kernel, seen = native.attention(text(SOFTMAX, c, 2)), classes(c, kept(c))
    one, many = (call(kernel, replace(c, threads=n), [q], [k], v, seen, sizes=[c.window]) for n in (1, 7))
    assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_from_several_threads_at_once(dtype: torch.dtype) -> None:
    c = Case(p=300, m=300, window=100, dtype=dtype)
    (q,), (k,), v = operands(c)
    kernel, seen = native.attention(text(SOFTMAX, c, 2)), classes(c, kept(c))
    expected = call(kernel, c, [q], [k], v, seen, sizes=[c.window])
    results: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(call(kernel, c, [q], [k], v, seen, sizes=[c.window])))
        for _ in range(6)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 6
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes() -> None:
    """Its parent's threads are not there: the child works alone instead of waiting for them."""
    c = Case(p=200, m=200, window=100)
    (q,), (k,), v = operands(c)
    kernel, seen = native.attention(text(SOFTMAX, c, 2)), classes(c, kept(c))
    expected = call(kernel, c, [q], [k], v, seen, sizes=[c.window])
    torch_threads = torch.get_num_threads()
    # PyTorch's own loops would wait for threads in the child
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(int(not torch.equal(call(kernel, c, [q], [k], v, seen, sizes=[c.window]), expected)))
    torch.set_num_threads(torch_threads)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors of one family")
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
@SOME_DTYPES
def test_other_vector_lengths(processor: str, dtype: torch.dtype) -> None:
    run_softmax(Case(p=100, m=100, window=50, e=(40,), f=72, dtype=dtype), (f"-march={processor}",))


# ---- scalar functions

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
    # torch's function, range, units in the last place
    "exp_": (torch.exp, -87.0, 88.7, 3),
    "exp2_": (torch.exp2, -125.9, 127.9, 3),
    "log_": (torch.log, 1e-30, 1e30, 3),
    "log1p_": (torch.log1p, -0.999, 100.0, 4),
    "tanh_": (torch.tanh, -12.0, 12.0, 4),
    "sigmoid_": (torch.sigmoid, -80.0, 80.0, 5),
    "softplus_": (torch.nn.functional.softplus, -80.0, 80.0, 5),
    "erf_": (torch.erf, -4.0, 4.0, 3),
    "sin_": (torch.sin, -50.0, 50.0, 3),
    "cos_": (torch.cos, -50.0, 50.0, 3),
    "rsqrt_": (torch.rsqrt, 1e-20, 1e20, 3),
    "floor_": (torch.floor, -1e6, 1e6, 0),
}


@cache
def functions() -> ctypes.CDLL:
    entries = "".join(
        f'extern "C" __attribute__((visibility("default"))) void {n}all(const float* x, float* y, long n) '
        f"{{ for (long i = 0; i < n; i++) y[i] = {n}(x[i]); }}\n"
        for n in FUNCTIONS
    )
    scalar = files("reattend.codegen").joinpath("skeletons/fused_scalar.hpp").read_text(encoding="utf-8")
    return native.load(scalar + entries + CONVERSIONS)


CONVERSIONS = "".join(
    f"""
extern "C" __attribute__((visibility("default"))) void to_{n}(const float* x, {n}* y, long n) {{ for (long i = 0; i < n; i++) y[i] = {n}(x[i]); }}
extern "C" __attribute__((visibility("default"))) void from_{n}(const {n}* x, float* y, long n) {{ for (long i = 0; i < n; i++) y[i] = float(x[i]); }}
"""
    for n in ("bf16", "f16")
)


def apply(name: str, x: Tensor, out: Tensor) -> Tensor:
    getattr(functions(), name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_long(x.numel()))
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalar_function(name: str) -> None:
    reference, low, high, ulps = FUNCTIONS[name]
    x = torch.linspace(low, high, 200_001)
    if low > 0:
        x = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 200_001)
    if name == "log_":
        x = torch.cat([x, torch.linspace(0.5, 2.0, 50_001)])
    got, expected = apply(f"{name}all", x, torch.empty_like(x)), reference(x.double())
    unit = torch.maximum(expected.abs(), torch.tensor(1.2e-38, dtype=torch.float64)).log2().floor().exp2() * 2**-23
    slack = 1e-7 if name in ("sin_", "cos_") else 2.4e-38
    assert (((got.double() - expected).abs() - slack) / unit).max() <= ulps


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("sin_", "cos_")])
def test_scalar_function_at_its_ends(name: str) -> None:
    """±∞ give what PyTorch gives, NaN stays NaN."""
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1e38, -1e38, 3.4e38, -3.4e38])
    got, expected = apply(f"{name}all", x, torch.empty_like(x)), FUNCTIONS[name][0](x)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_rounds_as_pytorch_does(dtype: torch.dtype) -> None:
    name = NAMES[dtype]
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert torch.equal(
        apply(f"from_{name}", every, torch.empty(every.shape)).nan_to_num(7.0), every.float().nan_to_num(7.0)
    )
    g = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(100_000, generator=g) * 10 ** torch.empty(100_000).uniform_(-9, 5, generator=g), every.float()]
    )
    got = apply(f"to_{name}", x, torch.empty(x.shape, dtype=dtype))
    assert torch.equal(got.float().nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))


# ---- the compiler


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    c = Case()
    kernel = text(SOFTMAX, c, 2)
    path = Path(native.load(kernel)._name)
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(native, "build", None)
    assert native.load(kernel) is native.load(kernel)
    assert path.stat().st_mtime_ns == before


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.compiler.cache_clear()
    try:
        with pytest.raises(
            native.CompilerError, match=r"needs a C\+\+ compiler: install g\+\+ or clang\+\+, or set CXX"
        ):
            native.load("int x;")
    finally:
        monkeypatch.undo()
        native.compiler.cache_clear()


def test_a_compiler_that_fails_says_why() -> None:
    with pytest.raises(native.CompilerError, match=r"could not compile the kernel.*nonsense"):
        native.load("nonsense;")


@pytest.mark.parametrize("damage", ["shortened", "other bytes", "no sum"])
def test_a_damaged_library_is_compiled_anew(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "directory", lambda: tmp_path)
    program = 'extern "C" __attribute__((visibility("default"))) int attention(void*) { return 7; }'
    path = native.library(program)
    native.build(program, path, ())
    if damage == "no sum":
        path.with_suffix(".sha256").unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage == "shortened" else b"\0" * len(whole))
    assert not native.is_whole(path)
    assert native.attention(program)(None) == 7
    assert native.is_whole(path)


def test_a_compiler_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what it has started, which would keep its output open."""
    stuck = tmp_path / "stuck"
    stuck.write_text("#!/bin/sh\nsleep 60 &\nwait\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(native, "PATIENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(native.CompilerError, match=r"did not compile the kernel within 0.2 s; set CXX to another"):
        native.run_compiler([str(stuck)])
    assert time.monotonic() - start < 20
