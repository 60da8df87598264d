"""What an error was measured with must still be there: weights, mode, types, the whole model, the attention itself."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.patterns.methods.static.sink_window import SinkWindow
from reattend.rewriter.choose.ground import CALLS, CHANGED, WEIGHTS, Ground
from tests.tiers import few

N, WIDTH = 512, 16


class Attention(nn.Module):
    """Causal; `far` reads keys the other way round in the same module, which no example asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.scale = 0.1

    def forward(self, x: Tensor, far: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1], device=x.device)
        later = at[None] > at[:, None]
        if far:
            y = ((q @ k.mT) * 4).masked_fill(later, float("-inf")).softmax(-1) @ v
        else:
            y = ((q @ k.mT) * self.scale).masked_fill(later, float("-inf")).softmax(-1) @ v
        out: Tensor = y.transpose(1, 2).flatten(2)
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: Tensor, far: bool = False) -> Tensor:
        out: Tensor = x + self.layer(x, far)
        return out


def data(count: int = 4, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(1, N, WIDTH, generator=rng) for _ in range(count)]


METHOD = SinkWindow(4, 32)
POLICY = reattend.Policy(approximate=True, methods=(METHOD,), max_error=0.5, calibration=data())


@pytest.fixture
def pair() -> Iterator[tuple[nn.Module, nn.Module]]:
    """A model with a method, and the same model as written. The method runs, and errs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().eval()
    written = copy.deepcopy(model)
    with torch.no_grad():
        reattend.optimize(model, policy=POLICY)
        assert not near(model, written)
        yield model, written


def near(model: Callable[..., Tensor], written: Callable[..., Tensor], *more: object) -> bool:
    x = data(1, seed=1)[0]
    made, want = model(x, *more), written(x, *more)
    return bool((made - want).norm() <= 1e-5 * want.norm())


def louder(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(4)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: p * 4 for n, p in model.state_dict().items()})


def swapped(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(2)
    other = Attention().eval()
    for p in other.parameters():
        p.copy_(torch.randn(p.shape, generator=rng))
    model.layer = other


def given_memory(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 4


@pytest.mark.parametrize("change", few([louder, loaded, swapped, given_memory], loaded))
def test_other_weights_run_the_models_own_code_and_say_so(
    change: Callable[[nn.Module], None], pair: tuple[nn.Module, nn.Module]
) -> None:
    model, written = pair
    for m in pair:
        change(m)
    with pytest.warns(UserWarning, match="other weights"):
        assert near(model, written)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert near(model, written)
    assert CHANGED.format(what=WEIGHTS) in str(reattend.report(model))


def hooked(model: nn.Module) -> None:
    model.get_submodule("layer").register_forward_hook(lambda module, given, out: out * 30)


def patched(model: nn.Module) -> None:
    layer = model.get_submodule("layer")
    own = layer.forward
    layer.forward = lambda *given: own(*given) * 30


def numbered(model: nn.Module) -> None:
    vars(model.get_submodule("layer"))["scale"] = 0.4


@pytest.mark.parametrize("change", few([hooked, patched, numbered], hooked))
def test_other_hooks_forwards_and_numbers_run_the_models_own_code(
    change: Callable[[nn.Module], None], pair: tuple[nn.Module, nn.Module]
) -> None:
    model, written = pair
    for m in pair:
        change(m)
    with pytest.warns(UserWarning, match="other hooks, forwards or numbers"):
        assert near(model, written)
    assert CHANGED.format(what=CALLS) in str(reattend.report(model))


def test_a_number_that_counts_calls_is_no_change() -> None:
    model = Model().eval()
    vars(model)["calls"] = 0
    ground = Ground(model)
    vars(model)["calls"] = 1
    assert not ground.stands()
    ground.settle()
    vars(model)["calls"] = 2
    assert ground.stands()
    model.get_submodule("layer").register_forward_pre_hook(lambda module, given: None)
    assert not ground.stands()


def test_weights_that_are_lent_to_one_call_are_not_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    model, written = pair
    lent = {n: p * 4 for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="other weights"):
        assert near(*(lambda *a, m=m: torch.func.functional_call(m, lent, a) for m in pair))
    assert not near(model, written)
    assert CHANGED.format(what=WEIGHTS) not in str(reattend.report(model))


def test_optimised_again_it_is_measured_anew(pair: tuple[nn.Module, nn.Module]) -> None:
    model, written = pair
    before = reattend.report(model).approximate
    for m in pair:
        louder(m)
    reattend.optimize(model, policy=POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(model, written)
    assert reattend.report(model).approximate != before


def test_the_type_that_was_measured_is_the_one_that_runs(pair: tuple[nn.Module, nn.Module]) -> None:
    model, written = pair
    with torch.autocast("cpu", torch.bfloat16):
        x = data(1, seed=1)[0]
        assert torch.allclose(model(x).float(), written(x).float(), atol=2e-2)
    assert any("was not measured of the attention at" in n for s in reattend.report(model).sites for n in s.site.notes)


def test_another_attention_of_the_same_module_is_exact(pair: tuple[nn.Module, nn.Module]) -> None:
    assert near(*pair, True)
    assert not near(*pair)


def test_a_part_that_is_called_by_itself_is_exact(pair: tuple[nn.Module, nn.Module]) -> None:
    model, written = (m.get_submodule("layer") for m in pair)
    assert near(model, written)
    assert not near(*pair)


def test_in_training_mode_it_is_exact(pair: tuple[nn.Module, nn.Module]) -> None:
    for m in pair:
        m.train()
    assert near(*pair)
    for m in pair:
        m.eval()
    assert not near(*pair)


def test_what_a_graph_keeps_does_not_keep_the_model_alive() -> None:
    model = Model()
    ground, there = Ground(model), weakref.ref(model)
    condition = ground.condition
    assert ground.stands()
    with ground.entered(model):
        pass
    assert ground.stands()
    del model, ground
    gc.collect()
    assert there() is None
    assert not condition.holds({}, {})
