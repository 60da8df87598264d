"""The operator as torch sees it: opcheck, compile, export and reload, autocast, threads, and no silent detach."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from reattend.codegen import operator as ours
from reattend.codegen.cpu.kernel import CpuKernel
from reattend.codegen.files import cache
from reattend.codegen.forms.program import loose, program_text, read_program
from reattend.patterns.cascade import CascadeError
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from tests.codegen.attentions import VARIANTS, Case

TILES = TileMapping(16, 16, body="sdpa")
op = torch.ops.reattend.cascade.default


def arguments(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[torch.Tensor], list[int], str]:
    x = case.inputs(dtype, seed)
    c = case.cascade
    return [x[t.name] for t in c.inputs], [case.sizes[s] for s in loose(c)], program_text(c, TILES)


class Layer(torch.nn.Module):
    """The operator inside a model, with something before and after it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.sizes, self.text = arguments(case)[1:]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = op([tensors[0] * 1.0, *tensors[1:]], self.sizes, self.text)
        return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], out.shape[1] * out.shape[3])


@pytest.mark.parametrize("name", ["causal", "decode", "gqa", "causal_padding"])
def test_opcheck(name: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments(VARIANTS[name]()), test_utils=tests)


@pytest.mark.parametrize("name", ["window", "decode", "causal_padding"])
def test_call_by_name(name: str) -> None:
    case = VARIANTS[name]()
    x = case.inputs()
    out = ours.call(case.cascade, TILES, x, case.sizes)
    torch.testing.assert_close(out.double(), evaluate(case.cascade, x, case.sizes, widen=True)["O"], rtol=0, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    case, longer = VARIANTS["window"](), VARIANTS["window"](p=50)
    layer = Layer(case)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for c in (case, longer):
        x = arguments(c)[0]
        torch.testing.assert_close(compiled(*x), layer(*x))


@pytest.mark.slow
def test_exports_and_reloads(tmp_path: Path) -> None:
    """In a process that never saw the program the exported graph runs: its text is all it needs."""
    case = VARIANTS["causal"]()
    layer, x = Layer(case), arguments(case)[0]
    n, s = torch.export.Dim("n", min=1, max=64), torch.export.Dim("s", min=2, max=4096)
    shapes = {"tensors": tuple({0: n, 2: s} for _ in x)}
    exported = torch.export.export(layer, tuple(x), dynamic_shapes=shapes)
    longer = arguments(VARIANTS["causal"](p=61))[0]
    torch.export.save(exported, tmp_path / "m.pt2")
    torch.save((longer, layer(*longer)), tmp_path / "x.pt")
    code = (
        "import torch, reattend.codegen.operator; x, want = torch.load('x.pt');"
        "m = torch.export.load('m.pt2').module(); torch.testing.assert_close(m(*x), want)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


def test_gradients_are_refused() -> None:
    tensors, sizes, text = arguments(VARIANTS["plain"]())
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no backward"):
        op(tensors, sizes, text)
    with torch.no_grad():
        assert not op(tensors, sizes, text).requires_grad


@pytest.mark.slow
def test_gradients_are_refused_when_compiled() -> None:
    tensors, sizes, text = arguments(VARIANTS["plain"]())
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no backward"):
        torch.compile(lambda *t: op(list(t), sizes, text).sum(), fullgraph=True)(*tensors)


def test_autocast_changes_nothing() -> None:
    """The program says in which type each step is computed."""
    for name in ("window", "causal_padding"):
        args = arguments(VARIANTS[name]())
        with torch.autocast("cpu", torch.bfloat16):
            out = op(*args)
        assert out.dtype == torch.float32
        assert torch.equal(out, op(*args))


def test_two_threads_at_once() -> None:
    """First calls of the same and of different programs from two threads give what one thread gives."""
    cases = [VARIANTS[n](p=33 + i) for i, n in enumerate(("window", "gqa", "alibi", "padding"))]
    work = [arguments(c, seed=i) for i, c in enumerate(cases)]
    ours._runners.clear()
    results: dict[tuple[int, int], torch.Tensor] = {}
    start = threading.Barrier(2)

    def run(me: int) -> None:
        start.wait()
        for i in range(len(work)):
            results[me, i] = op(*work[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, args in enumerate(work):
        want = op(*args)
        assert torch.equal(results[0, i], want)
        assert torch.equal(results[1, i], want)


def test_strides_are_the_fake_ones() -> None:
    for name in ("causal", "decode", "gqa"):
        args = arguments(VARIANTS[name]())
        real, fake = op(*args), ours._fake(*args)
        assert real.stride() == fake.stride()


def test_program_text() -> None:
    case = VARIANTS["decode"]()
    p = read_program(program_text(case.cascade, TILES))
    assert (p.cascade, p.mapping, p.loose) == (case.cascade, TILES, ("past",))
    with pytest.raises(CascadeError, match="schema 99"):
        read_program(program_text(case.cascade, TILES).replace('"schema":1}', '"schema":99}'))


def test_the_program_survives_pickling() -> None:
    case = VARIANTS["window"]()
    buffer = io.BytesIO()
    torch.save(Layer(case), buffer)
    buffer.seek(0)
    x = arguments(case)[0]
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(*x), Layer(case)(*x))


@pytest.mark.parametrize("name", ["causal", "sigmoid"])
def test_where_a_kernel_cannot_be_compiled_another_body_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, with a warning, and for good."""
    case = VARIANTS[name]()
    tensors, sizes, _ = arguments(case)
    tiling = TileMapping(16, 32, body="fused")
    made = ours.build(case.cascade, tiling)
    assert isinstance(made, CpuKernel)
    module = sys.modules[f"reattend_generated_{cache.key(made.source)}"]

    def failing(*_: object) -> None:
        raise module.CompilerError("no compiler today")

    monkeypatch.setattr(module, "load", failing)
    module.compiled.cache_clear()
    text = program_text(case.cascade, tiling)
    ours._runners.pop((text, "cpu"), None)
    try:
        with pytest.warns(UserWarning, match=r"runs as .* instead of fused 16×32.*: no compiler today"):
            first = op(tensors, sizes, text)
        expected = evaluate(case.cascade, dict(zip((t.name for t in case.cascade.inputs), tensors)), case.sizes)["O"]
        torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(op(tensors, sizes, text), first)
    finally:
        ours._runners.pop((text, "cpu"), None)
