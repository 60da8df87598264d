"""`optimize` and `restore`: in place, undoable, exact, safe, and honest about what it did."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

import reattend
from reattend.rewriter.capture import backward, calls
from reattend.rewriter.choose import choose
from reattend.rewriter.choose.policy import StrictError
from reattend.rewriter.find import detect
from reattend.rewriter.find.place import Place
from reattend.rewriter.splice import splice


def close(a: Tensor, b: Tensor, limit: float = 1e-5) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.abs().max()).item() <= limit


def test_the_same_object_comes_back_and_computes_the_same(stack: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        before = stack(x)
        assert reattend.optimize(stack) is stack
        close(stack(x), before)
        report = reattend.report(stack)
        assert report.calls == 1
        assert [s.name for s in report.sites] == ["layers.0", "layers.1"]
        assert all(s.ran == 1 for s in report.sites)
        assert reattend.restore(stack) is stack
        assert torch.equal(stack(x), before)
    assert stack._compiled_call_impl is None
    assert not reattend.report(stack).installed


def test_nothing_is_captured_before_the_first_call(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack)
    report = reattend.report(stack)
    assert report.captures == 0
    assert "nothing is captured before the first call" in str(report)


def test_an_example_captures_at_once(stack: nn.Module, x: Tensor) -> None:
    examples: list[Any] = [x, (x,), {"x": x}, ((x,), {})]
    for example in examples:
        reattend.restore(stack)
        reattend.optimize(stack, example=example)
        assert reattend.report(stack).captures == 1


def test_twice_is_once(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack, example=x)
    entry = stack._compiled_call_impl
    reattend.optimize(stack)
    assert stack._compiled_call_impl is entry
    assert reattend.report(stack).captures == 1
    reattend.optimize(stack, policy=reattend.Policy(deny="reattend"))
    assert reattend.report(stack).captures == 0
    reattend.restore(stack)
    assert stack._compiled_call_impl is None


def test_a_model_that_was_compiled_before_is_compiled_again_after_restore(stack: nn.Module) -> None:
    stack.compile(backend="eager")
    before = stack._compiled_call_impl
    reattend.restore(reattend.optimize(stack))
    assert stack._compiled_call_impl is before


def test_an_optimised_model_can_be_copied_saved_and_loaded(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack, example=x)
    other = copy.deepcopy(stack)
    assert "copy of an optimised one" in str(reattend.report(other))
    assert other._compiled_call_impl is None
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    close(loaded(x), stack(x))
    assert sorted(stack.state_dict()) == sorted(loaded.state_dict())
    reattend.optimize(other, example=x)
    assert reattend.report(other).calls == 1


def test_calls_that_bypass_the_entry_are_not_counted(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack)
    stack.forward(x)
    assert "0 calls went through" in str(reattend.report(stack))
    torch.compile(stack, backend="eager")(x)
    assert "0 calls went through" in str(reattend.report(stack))


@pytest.mark.slow
def test_sub_modules_that_are_entered_directly_are_optimised(
    llama: Callable[..., Any], batch: dict[str, Tensor]
) -> None:
    model = reattend.optimize(llama())
    with torch.no_grad():
        expected = reattend.restore(copy.deepcopy(model)).model(**batch).last_hidden_state
        close(model.model(**batch).last_hidden_state, expected)
    report = reattend.report(model)
    assert report.calls == 1
    assert [s.name for s in report.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_an_optimised_model_can_be_planned_and_exported(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack)
    assert len(reattend.plan(stack, (x,)).sites) == 2
    program = torch.export.export(stack, (x,), strict=False)
    close(program.module()(x), stack.forward(x))
    assert reattend.report(stack).calls == 0


def test_two_threads_at_once(stack: nn.Module) -> None:
    inputs = [torch.randn(2, n, 16) for n in (24, 40)]
    with torch.no_grad():
        expected = [stack(x) for x in inputs]
    reattend.optimize(stack)
    failures: list[str] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                out = stack(inputs[i])
                if not torch.allclose(out, expected[i], atol=1e-5):
                    failures.append(f"thread {i}: {(out - expected[i]).abs().max()}")

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    report = reattend.report(stack)
    assert report.calls == 20
    assert sum(p.calls for p in report.pieces) + report.as_written == 20


def test_a_failed_rewrite_leaves_the_model_as_it_was(
    stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> object:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(choose, "rewrite", broken)
    expected = stack(x)
    reattend.optimize(stack)
    with pytest.warns(UserWarning, match="the rewrite failed, the graph runs as written: ZeroDivisionError: a defect"):
        assert torch.equal(stack(x), expected)
    assert "a defect" in str(reattend.report(stack))


@pytest.mark.parametrize("where", ["capture", "rewrite"])
def test_dynamo_begins_again_where_it_asks_to(
    stack: nn.Module, x: Tensor, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is no failure of ours, whatever is running when it comes."""
    owner, name = (calls, "trace") if where == "capture" else (choose, "rewrite")
    whole, asked = getattr(owner, name), list[int]()

    def once(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise TensorifyScalarRestartAnalysis
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, once)
    with torch.no_grad():
        expected = stack(x)
        close(reattend.optimize(stack)(x), expected)
    report = reattend.report(stack)
    assert len(asked) == 2
    assert [p.error for p in report.pieces] == [""]
    assert len(report.sites) == 2


STAGES: dict[str, tuple[Any, str]] = {
    "find": (detect, "canonical"), "decide": (choose, "decide_place"), "splice": (splice, "_fit"),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bug that the first attention meets, and no other."""
    owner, name = STAGES[request.param]
    whole = getattr(owner, name)
    met: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        met.append(1)
        if len(met) == 1:
            raise ZeroDivisionError("a defect\nand more")
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    return str(request.param)


def test_a_bug_at_one_attention_leaves_the_others_rewritten(stack: nn.Module, x: Tensor, stage: str) -> None:
    with torch.no_grad():
        expected = stack(x)
        reattend.optimize(stack, policy=reattend.Policy(deny=("original",)))
        with pytest.warns(UserWarning, match="keeps the original code: a bug in reattend, please report it: ZeroDiv"):
            close(stack(x), expected)
    report = reattend.report(stack)
    assert [s.kernel != "original" for s in report.sites] == [True]
    assert [m.reason for m in report.misses] == ["a bug in reattend, please report it: ZeroDivisionError: a defect"]
    assert not any(p.error for p in report.pieces)


def test_a_bug_at_one_attention_raises_where_strict(stack: nn.Module, x: Tensor, stage: str) -> None:
    reattend.optimize(stack, policy=reattend.Policy(strict=True))
    with pytest.warns(UserWarning, match="a bug in"), pytest.raises(StrictError, match="a bug in"), torch.no_grad():
        stack(x)


def test_a_bug_at_one_attention_is_named_by_the_plan(
    stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = choose.decide_place

    def broken(p: Place, *rest: Any) -> Any:
        if p.name == "layers.0":
            raise IndexError
        return whole(p, *rest)

    monkeypatch.setattr(choose, "decide_place", broken)
    with pytest.warns(UserWarning, match="a bug in reattend"):
        plan = reattend.plan(stack, x)
    assert [s.name for s in plan.sites] == ["layers.1"]
    assert [m.reason for m in plan.misses] == ["a bug in reattend, please report it: IndexError"]


def test_graph_breaks_are_said_and_the_pieces_optimised(x: Tensor, stack: nn.Module) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = stack.get_submodule("layers.0"), stack.get_submodule("layers.1")

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if x.sum().item() > 1e9:
                x = x * 2
            out: Tensor = self.second(x)
            return out

    model = Broken().eval()
    with torch.no_grad():
        expected = model(x)
        reattend.optimize(model)
        close(model(x), expected)
    report = reattend.report(model)
    assert [s.name for s in report.sites] == ["first", "second"]
    assert len(report.breaks) == 1
    assert "test_optimize.py" in report.breaks[0]
    assert "graph break at" in str(report)


def test_a_change_of_type_plans_again(stack: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        reattend.optimize(stack, example=x)
        stack.double()
        out = stack(x.double())
        assert out.dtype == torch.float64
        reattend.restore(stack)
        close(out, stack(x.double()), 1e-10)
        assert reattend.report(stack).captures == 0


def test_inputs_of_the_wrong_shape_raise_the_models_own_error(stack: nn.Module, x: Tensor) -> None:
    reattend.optimize(stack)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as error:
        stack(torch.randn(2, 40, 17))
    assert error.value.__cause__ is None
    close(stack(x), reattend.restore(stack)(x))


def test_a_model_without_attention_says_so() -> None:
    model = reattend.optimize(nn.Linear(4, 4), example=torch.randn(2, 4))
    assert "no attention was found" in str(reattend.report(model))


def test_strict_raises_at_the_first_capture_and_leaves_the_model(x: Tensor) -> None:
    class Slots(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return torch.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.5, True) @ q

    model = reattend.optimize(Slots(), policy=reattend.Policy(strict=True))
    with pytest.raises(reattend.StrictError, match="dropout"):
        model(x)
    assert model._compiled_call_impl is None
    model(x)


def test_training_is_exact_and_gradients_flow(stack: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(stack)
    reattend.optimize(stack)
    for model in (stack, twin):
        model(x).square().sum().backward()
    for (name, p), q in zip(stack.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        close(p.grad, q.grad, 1e-4)  # type: ignore[arg-type]
    assert not reattend.report(stack).kernels["reattend"]


def test_autocast(stack: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(stack)
    reattend.optimize(stack)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = stack(x), twin(x)
    assert a.dtype == b.dtype
    assert ((a - b).abs().max() / b.abs().max()).item() < 2e-2


def test_live_dropout_draws_the_same_numbers(x: Tensor) -> None:
    class Dropped(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.3, self.training) @ q

    model = Dropped().train()
    torch.manual_seed(1)
    expected = model(x)
    reattend.optimize(model)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)
    assert "live dropout" in str(reattend.report(model))


def test_writes_into_buffers_and_inputs_happen_once(x: Tensor) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.count: Tensor

        def forward(self, q: Tensor, seen: Tensor) -> Tensor:
            self.count.add_(1)
            seen.add_(1)
            return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    model = reattend.optimize(Counting())
    seen = torch.zeros(3)
    for _ in range(3):
        model(x, seen)
    assert model.count == 3
    assert torch.equal(seen, torch.full((3,), 3.0))


@pytest.mark.slow
def test_generation_with_left_padding(llama: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    model = llama()
    options = {"max_new_tokens": 32, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**batch, **options)
    reattend.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = model.generate(**batch, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        close(a, b)
    report = reattend.report(model)
    assert report.calls == 32
    assert report.given_up == 0
    assert report.captures <= 4


@pytest.mark.slow
def test_twelve_pairs_of_batch_and_length_need_few_graphs(llama: Callable[..., Any]) -> None:
    model = reattend.optimize(llama())
    for rows in (1, 2, 3):
        for length in (8, 16, 24, 33):
            ids = torch.randint(3, 256, (rows, length))
            keep = torch.ones_like(ids)
            keep[0, :3] = 0
            model.generate(ids, attention_mask=keep, max_new_tokens=4, do_sample=False)
    report = reattend.report(model)
    assert report.captures <= 8
    assert report.given_up == 0
    assert report.calls == 48


@pytest.mark.slow
def test_the_encoder_in_generate_goes_through_us() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=64, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    ids = torch.randint(1, 64, (2, 10))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    reattend.optimize(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    entered = {e.path: e.calls for e in reattend.report(model).entries}
    assert entered["encoder"] == 1
    assert any(s.name.startswith("encoder.block.0") for s in reattend.report(model).sites)


@pytest.mark.slow
def test_frames_that_dynamo_gives_up_are_named(stack: nn.Module, x: Tensor) -> None:
    class Quiet:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack.get_submodule("layers.0")

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                with Quiet():
                    x = self.inner(x)
                    print(end="")
                    x = self.inner(x)
            return x

    model = Loud().eval()
    with torch.no_grad():
        expected = model(x)
        reattend.optimize(model)
        close(model(x), expected)
    report = reattend.report(model)
    assert len(report.frames_given_up) == 1
    assert "test_optimize.py" in report.frames_given_up[0]
    assert "print" in report.frames_given_up[0]
    assert "runs as written:" in str(report)
    assert [s.name for s in report.sites] == ["inner"]
    assert report.sites[0].ran == 4


def test_a_call_that_nothing_was_captured_of_is_counted(x: Tensor) -> None:
    class Disabled(nn.Module):
        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def forward(self, q: Tensor) -> Tensor:
            return (q @ q.transpose(-1, -2)).softmax(-1) @ q

    model = reattend.optimize(Disabled())
    model(x)
    report = reattend.report(model)
    assert (report.calls, report.given_up) == (0, 1)
    assert "Dynamo captured no graph of it" in str(report)


def test_a_trace_in_another_thread_is_not_ours(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """fx has one flag for all threads: while we capture in one, calls of another go through all the same."""
    from reattend.rewriter.run import bypass

    reattend.optimize(stack, example=(x,))
    monkeypatch.setattr(torch.fx._symbolic_trace, "is_fx_symbolic_tracing", lambda: True)
    with torch.no_grad():
        before = reattend.report(stack).calls
        stack(x)
        assert reattend.report(stack).calls == before
        monkeypatch.setattr(bypass, "_capturing", {-1})
        stack(x)
        assert reattend.report(stack).calls == before + 1


def test_a_call_beside_a_capture_goes_through(stack: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread stands in the middle of a trace while another calls a model that was captured before."""
    with torch.no_grad():
        expected = stack(x)
    reattend.optimize(stack, example=x)
    other = reattend.optimize(copy.deepcopy(stack))
    tracing, called = threading.Event(), threading.Event()
    call = backward.GradientWatch.call

    def paused(*given: Any) -> Any:
        tracing.set()
        assert called.wait(60)
        return call(*given)

    monkeypatch.setattr(backward.GradientWatch, "call", paused)
    thread = threading.Thread(target=lambda: reattend.optimize(other, example=x))
    thread.start()
    try:
        assert tracing.wait(60)
        with torch.no_grad():
            close(stack(x), expected)
    finally:
        called.set()
        thread.join()
    assert reattend.report(stack).calls == 2
    assert reattend.report(other).calls == 1
