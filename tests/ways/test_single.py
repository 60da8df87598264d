"""Ways of running in one process: compiled, exported, traced, copied, saved, moved, changed, hooked, trained, in threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reattend
from reattend.rewriter.run.bypass import COMPILED, TRACED

from .ways import AS_WRITTEN, WORKS, Stack, equal, numbers, optimised, ran, stack, way, went_round

slow = pytest.mark.slow
quiet = pytest.mark.filterwarnings("ignore")


def x() -> Tensor:
    return numbers(2, 24, 32)


def same(ours: Callable[..., Any], model: Callable[..., Any]) -> None:
    with torch.no_grad():
        equal(ours(x()), model(x()))


# --- compiled, exported, traced, transformed ----------------------------------------------------------------------------


@way("`torch.compile` over an optimised model", AS_WRITTEN)
def test_compiled_over() -> None:
    model = stack()
    ours = optimised(model)
    compiled = torch.compile(ours, backend="eager")
    with pytest.warns(UserWarning, match='runs as written.*backend="reattend"') as said:
        same(compiled, model)
    same(compiled, model)
    assert len([w for w in said if "reattend" in str(w.message)]) == 1
    assert went_round(ours, COMPILED)


@way("`torch.compile` of a function that calls an optimised model", AS_WRITTEN)
def test_compiled_caller() -> None:
    """Dynamo inlines the model without asking us: what the report knows is that nothing came."""
    model = stack()
    ours = optimised(model)

    def caller(x: Tensor) -> Any:
        return ours(x)

    same(torch.compile(caller, backend="eager"), model)
    assert "calls inside another torch.compile, do not come here" in str(reattend.report(ours))


@way("`torch.compile` of layers inside an optimised model", WORKS, slow)
def test_compiled_inside() -> None:
    model = stack()
    ours = copy.deepcopy(model)
    for layer in ours.layers:
        layer.compile(backend="eager")
    same(reattend.optimize(ours), model)
    assert ran(ours)


@way("a model that was compiled in place (`model.compile()`), then optimised", WORKS, slow)
def test_compiled_before() -> None:
    model = stack()
    ours = copy.deepcopy(model)
    ours.compile(backend="eager")
    same(reattend.optimize(ours), model)
    assert ran(ours)


@way("`torch.compile(model, backend=\"reattend\")`", WORKS, slow)
def test_backend() -> None:
    model = stack()
    same(torch.compile(copy.deepcopy(model), backend="reattend", options={"rest": "eager"}), model)


@quiet
@way("`torch.export` of an optimised model", AS_WRITTEN, slow)
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = stack()
    ours = optimised(model)
    exported = torch.export.export(ours, (x(),), strict=strict).module()
    same(exported, model)
    # A strict export inlines the model without asking us.
    assert strict or went_round(ours, TRACED)
    same(ours, model)
    assert ran(ours)


@way("an exported program's module, optimised", WORKS, slow)
def test_exported_then_optimised() -> None:
    model = stack()
    ours = reattend.optimize(torch.export.export(model, (x(),)).module())
    same(ours, model)
    assert ran(ours)


@quiet
@way("AOTInductor", AS_WRITTEN, slow)
def test_aot_inductor(tmp_path: Path) -> None:
    model = stack()
    ours = optimised(model)
    with torch.no_grad():
        program = torch.export.export(ours, (x(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
        same(torch._inductor.aoti_load_package(path), model)
    assert went_round(ours, TRACED)


@quiet
@way("`torch.jit.trace`", AS_WRITTEN, slow)
def test_jit_trace() -> None:
    model = stack()
    ours = optimised(model)
    with torch.no_grad():
        traced = torch.jit.trace(ours, x())  # type: ignore[no-untyped-call]
    same(traced, model)
    assert went_round(ours, TRACED)


@way("`torch.func.functional_call`", WORKS)
def test_functional_call() -> None:
    model = stack()
    ours = optimised(model)
    other = {n: p * 1.5 for n, p in model.named_parameters()}
    same(lambda x: torch.func.functional_call(ours, other, x), lambda x: torch.func.functional_call(model, other, x))
    assert ran(ours)


@quiet
@way("`torch.func`: grad, vmap, jvp", AS_WRITTEN, slow)
def test_func() -> None:
    model = stack()
    ours = optimised(model)
    given = numbers(3, 2, 24, 32)
    grads = [torch.func.grad(lambda x, m=m: m(x).square().sum())(given[0]) for m in (ours, model)]
    equal(*grads)
    equal(torch.vmap(ours)(given), torch.vmap(model)(given))
    equal(*(torch.func.jvp(m, (given[0],), (given[1],))[1] for m in (ours, model)))
    assert went_round(ours, TRACED)


@way("calls of `.forward`", AS_WRITTEN, slow)
def test_forward() -> None:
    model = stack()
    ours = optimised(model)
    same(ours.forward, model)
    assert "calls of .forward" in str(reattend.report(ours))


# --- copied, saved, moved, changed --------------------------------------------------------------------------------------


@way("`copy.deepcopy` of an optimised model", AS_WRITTEN)
def test_deepcopy() -> None:
    model = stack()
    ours = copy.deepcopy(optimised(model))
    same(ours, model)
    assert "copies are not optimised" in str(reattend.report(ours))


@way("pickle and `torch.save` of an optimised model", AS_WRITTEN, slow)
def test_pickle() -> None:
    model = stack()
    ours = optimised(model)
    same(ours, model)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        same(again, model)
        assert "copies are not optimised" in str(reattend.report(again))


@way("`state_dict`, safetensors: saved from and loaded into an optimised model", WORKS, slow)
def test_state() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = stack()
    ours = optimised(model)
    same(ours, model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    ours.load_state_dict(safetensors.load(safetensors.save(model.state_dict())))
    same(ours, model)
    assert list(ours.state_dict()) == list(model.state_dict())
    assert ran(ours) == 4


@way("`.to(dtype)`, `.half()`, `.double()` after the first call", WORKS)
def test_types() -> None:
    model = stack()
    ours = optimised(model)
    bounds = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    with torch.no_grad():
        for dtype, bound in bounds.items():
            equal(ours.to(dtype)(x().to(dtype)), model.to(dtype)(x().to(dtype)), bound)
    assert ran(ours) == 2 * len(bounds)


@way("`meta`, then `to_empty` and a state dict", WORKS, slow)
def test_meta() -> None:
    model = stack()
    with torch.device("meta"):
        ours = reattend.optimize(Stack().eval())
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(model.state_dict())
    same(ours, model)
    assert ran(ours)


@way("parametrisations: weight norm, spectral norm", WORKS, slow)
def test_parametrised() -> None:
    from torch.nn.utils import parametrizations

    model: Any = stack()
    for layer in model.layers:
        parametrizations.weight_norm(layer.qkv)
        parametrizations.spectral_norm(layer.out)
    ours = optimised(model.eval())
    same(ours, model)
    assert ran(ours)


@quiet
@way("dynamic quantisation of linear layers (torch.ao)", WORKS, slow)
def test_quantised() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(stack(), {torch.nn.Linear}, dtype=torch.qint8)
    ours = optimised(model)
    same(ours, model)
    assert ran(ours)


@way("hooks on the model and inside it, before and after `optimize`", WORKS)
def test_hooks() -> None:
    model: Any = stack()
    seen: list[str] = []
    model.layers[0].register_forward_hook(lambda m, a, out: out * 2)
    ours = optimised(model)
    same(ours, model)
    for m in (ours, model):
        m.register_forward_pre_hook(lambda m, a: seen.append("pre"))
        m.layers[1].qkv.register_forward_hook(lambda m, a, out: out + 1)
    same(ours, model)
    assert seen == ["pre", "pre"]
    assert ran(ours)


# --- threads, training --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@way("eight threads at once", WORKS)
def test_threads() -> None:
    model = stack()
    ours = optimised(model)
    out: dict[int, Tensor] = {}

    def run(i: int) -> None:
        with torch.no_grad():
            out[i] = ours(numbers(1 + i % 3, 20 + i, 32))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with torch.no_grad():
        for i in range(8):
            equal(out[i], model(numbers(1 + i % 3, 20 + i, 32)))
    assert ran(ours) == 16


@quiet
@way("training, with and without gradient checkpointing, under bf16 autocast", WORKS, slow)
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training(checked: bool, autocast: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checked(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + (checkpoint(layer, x, use_reentrant=False) if checked else layer(x))
            return x

    torch.manual_seed(0)
    model = Checked().train()
    ours = optimised(model)
    for m in (ours, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = m(x())
        out.float().square().mean().backward()
    for a, b in zip(ours.parameters(), model.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() <= (5e-2 if autocast else 1e-4) * b.grad.abs().max()
    assert ran(ours)
    # what a checkpoint traces inside our capture did not go round us
    assert not reattend.report(ours).bypassed
