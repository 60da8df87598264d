"""The cost model walks the calls that the printed CPU kernel makes: the same number, sizes, masks and triangles."""

import itertools
import re
from collections import Counter
from importlib.resources import files

import pytest
import torch

from reattend.codegen.cpu import kernel as cpu
from reattend.codegen.files import cache
from reattend.codegen.skeletons import cpu as skeleton
from reattend.cost_model.count.subject import Subject, plan_tiles, shape, subject
from reattend.cost_model.time import cpu_tiles, fused
from reattend.cost_model.time.body import blocks, calls, folds
from reattend.patterns import expr as ex
from reattend.patterns.cascade import Cascade
from reattend.patterns.library import papers
from reattend.patterns.mapping import TileMapping

pytestmark = pytest.mark.thin(3)

Shape = tuple[int, int, bool, bool]
P, M = ex.index("p"), ex.index("m")


def masked(keep: ex.Expr) -> Cascade:
    return papers.attention("masked", papers.softmax, lambda b, s: ex.where(keep, s * 0.125, -3e38))


def padded() -> Cascade:
    def score(b: papers.Builder, s: ex.Expr) -> ex.Expr:
        return ex.where(b.input("Kept", "bm", "b1"), s * 0.125, -3e38)

    return papers.attention("padded", papers.softmax, score)


def biased(keep: ex.Expr | None) -> Cascade:
    def score(b: papers.Builder, s: ex.Expr) -> ex.Expr:
        added = s * 0.125 + b.input("Bias", "hpm")
        return added if keep is None else ex.where(keep, added, -3e38)

    return papers.attention("biased", papers.softmax, score)


CASES = {
    "none": papers.attention("none", papers.softmax),
    "causal": masked(M <= P),
    "window": masked((M <= P) & (P - M < 200)),
    "prefix": masked((M <= P) | (M < 70)),
    "padding": padded(),
    "bias": biased(None),
    "causal bias": biased(M <= P),
    "window bias": biased((M <= P) & (P - M < 200)),
}


def made(c: Cascade, mapping: TileMapping, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> Counter[Shape]:
    """(queries, keys, masked, causal) of every call of torch's kernel, once a batch entry and head."""
    kernel = cpu.build(c, mapping)
    assert isinstance(kernel, cpu.CpuKernel), kernel
    module, seen = cache.load(kernel.source), Counter[Shape]()
    real = module.attend

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, causal: bool, *rest: object) -> object:
        seen[q.shape[2], k.shape[2], mask is not None, causal] += q.shape[0] * q.shape[1]
        return real(q, k, v, mask, causal, *rest)

    monkeypatch.setattr(module, "attend", attend)
    x = {n: torch.randn(2, 3, rows, 16) for n, rows in (("Q", queries), ("K", keys), ("V", keys))}
    if "Kept" in {t.name for t in c.inputs}:
        x["Kept"] = torch.ones(2, keys, dtype=torch.bool)
    if "Bias" in {t.name for t in c.inputs}:
        x["Bias"] = torch.randn(3, queries, keys)
    kernel.run(x, {})
    return seen


def planned(c: Cascade, mapping: TileMapping, queries: int, keys: int) -> Counter[Shape]:
    s = subject(c)
    assert isinstance(s, Subject)
    at = shape(s.cascade, s.attention, {"B": 2, "H": 3, "P": queries, "M": keys, "E": 16, "F": 16})
    seen = Counter[Shape]()
    found = blocks(s, plan_tiles(s, at, mapping), mapping, at)
    for call in calls(found, s, at, mapping, torch.get_num_threads()):
        seen[call.rows, call.keys, call.masked, call.triangle] += call.batch * call.tiles
    return seen


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("body", ["sdpa", "slices"])
@pytest.mark.parametrize(("tile_p", "tile_m"), [(32, 16), (64, 64), (128, 64)])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (700, 700)])
def test_the_model_walks_the_kernels_calls(
    name: str, body: str, tile_p: int, tile_m: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = TileMapping(tile_p, tile_m, body=body)
    kernel, model = made(CASES[name], mapping, queries, keys, monkeypatch), planned(CASES[name], mapping, queries, keys)
    if name == "padding":
        # every key is kept: the kernel finds out and masks nothing, the model cannot know
        kernel, model = (Counter({(*k[:2], False, False): n for k, n in c.items()}) for c in (kernel, model))
    assert kernel == model


@pytest.mark.parametrize(("body", "names"), [("sdpa", {"CALL_SCORES", "PIECES_PER_THREAD", "PIECE_ROWS", "FEW"}), ("product", {"SLICE", "SCORES", "FEW"})])
def test_a_printed_file_holds_the_models_numbers(body: str, names: set[str]) -> None:
    """And imports nothing of ours for them."""
    kernel = cpu.build(masked(ex.index("m") <= ex.index("p")), TileMapping(64, 64, body=body))
    assert isinstance(kernel, cpu.CpuKernel)
    assert "cpu_tiles" not in kernel.source
    there = vars(cache.load(kernel.source))
    assert {n: there.get(n) for n in names} == {n: getattr(cpu_tiles, n) for n in names}


def test_the_loops_fold_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for heads, rows, keys in itertools.product((1, 4, 32), (16, 64, 200), (1, 300, 5000)):
        assert skeleton.folds(heads, rows, keys) == folds(heads, rows, keys, 6)


def test_the_fused_loop_cuts_units_as_the_model_does() -> None:
    text = files("reattend.codegen.skeletons").joinpath("fused.hpp").read_text(encoding="utf-8")
    for name in ("ITEMS_BYTES", "UNITS_A_THREAD"):
        (written,) = re.findall(rf"constexpr int64_t .*\b{name} = ([\d< ]+);", text)
        assert eval(written) == getattr(fused, name)
