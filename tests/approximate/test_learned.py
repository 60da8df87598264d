"""Learned inputs: fitted in a calibration, kept in a file, read from it again, installed at their sites; else refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import reattend
from reattend.patterns.evaluate import evaluate
from reattend.patterns.methods.linear.based import TaylorWindow
from reattend.patterns.methods.linear.hedgehog import Hedgehog
from reattend.patterns.methods.linear.sla import SparseLinear
from reattend.patterns.methods.method import Method, Replacement
from reattend.patterns.methods.selected.seer_attention import SeerAttention
from reattend.patterns.methods.selecting.steps import Learned
from reattend.rewriter.approximate.data import CalibrationError
from reattend.rewriter.approximate.feature_maps import identity, load, save
from tests.methods.attentions import draw, view


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def drawn(n: int = 48, count: int = 4) -> list[tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(1, 2, n, 16, generator=g) for _ in range(3)) for _ in range(count)]


def test_learned_inputs_are_refused_without_a_file_and_a_polynomial_is_measured() -> None:
    methods: tuple[Method, ...] = (Hedgehog("", 8, 4), TaylorWindow(8))
    data = drawn()
    policy = reattend.Policy(approximate=True, methods=methods, max_error=0.5, calibration=data)
    (site,) = reattend.plan(Causal().eval(), data[0], policy=policy).sites
    found = {c.name: c for c in site.candidates}
    hedgehog, taylor = (found[str(m)] for m in methods)
    assert not hedgehog.feasible
    assert "needs a file" in hedgehog.why
    assert taylor.feasible
    assert taylor.error is not None
    # its rows weigh keys anew: there is no share of the weight that they keep
    assert taylor.error.mass is None
    # scores of about one: the polynomial is near the exponential, and not equal to it
    assert 1e-6 < taylor.error.mean < 0.2


@pytest.mark.parametrize(("rows", "keys", "window"), [(300, 300, 5), (300, 300, 150), (3, 70, 9), (1, 64, 64), (40, 40, 1)])
def test_chunks_give_what_the_cascade_says(rows: int, keys: int, window: int) -> None:
    a = view(P=rows, M=keys, H=2)
    g = torch.Generator().manual_seed(0)
    parts = {"query": torch.randn(2, 8, 5, generator=g), "key": torch.randn(2, 8, 5, generator=g), "gain": torch.tensor([0.4, -1.0])}
    a = view(P=rows, M=keys, H=2, E=8, F=8)
    made = Hedgehog("m", 5, window).with_parts(parts).replace(a)
    assert isinstance(made, Replacement), made
    assert made.direct is not None
    given, sizes = draw(a), {"B": 1, "H": 2, "E": 8, "F": 8}
    given |= made.make(torch, given, sizes)
    exact = evaluate(made.cascade, given, sizes, widen=True)["O"]
    assert (made.direct.run(torch, given, sizes) - exact).abs().max() < 2e-5


class Small(nn.Module):
    """An attention whose rows look at tokens of their own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.v = nn.Embedding(8, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.normalize(self.kinds(ids), dim=-1) * 2
        q = torch.einsum("bnc,hcf->bhnf", x, torch.eye(32).reshape(1, 32, 32).expand(2, 32, 32))
        v = self.v(x).unflatten(-1, (2, 16)).transpose(1, 2)
        return scaled_dot_product_attention(q, q, v, is_causal=True, scale=1.0).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def ids() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(8, (1, 96), generator=g) for _ in range(4)]


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def test_maps_are_fitted_kept_and_read_again(ids: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    method = Hedgehog(str(path), 32, 8)
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.9, calibration=ids)
    (site,) = reattend.plan(small(), (ids[0],), policy=policy).sites
    found = site.candidate(str(method))
    assert found.feasible, found
    assert found.error is not None
    assert list(load(path)) == [site.name]
    kept = path.read_bytes()
    (again,) = reattend.plan(small(), (ids[0],), policy=policy).sites
    assert again.candidate(str(method)).error == found.error
    assert path.read_bytes() == kept
    # maps as they are before they are fitted are worse
    other = tmp_path / "identity.safetensors"
    save(other, {site.name: identity(2, 32, 32)})
    plain = Hedgehog(str(other), 32, 8)
    policy = reattend.Policy(approximate=True, methods=(plain,), max_error=0.9, calibration=ids)
    (before,) = reattend.plan(small(), (ids[0],), policy=policy).sites
    error = before.candidate(str(plain)).error
    assert error is not None
    assert found.error.mean < 0.8 * error.mean


def test_a_file_for_others_is_refused_and_one_that_is_none_is_named(ids: list[Tensor], tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    save(path, {"another": identity(2, 32, 32)})
    for features, said in ((32, "has no query, key, gain for this attention; it has parts of another"),):
        method = Hedgehog(str(path), features, 8)
        policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.9, calibration=ids)
        (site,) = reattend.plan(small(), (ids[0],), policy=policy).sites
        assert said in site.candidate(str(method)).why
    path.write_bytes(b"no tensors")
    with pytest.raises(CalibrationError, match="cannot be read"):
        reattend.plan(small(), (ids[0],), policy=policy)
    no = Hedgehog("m", 5, 4).with_parts({"query": torch.zeros(3, 8, 5), "key": torch.zeros(3, 8, 5), "gain": torch.zeros(3)})
    assert "for 3 heads of 8, and this attention has 2 of 8" in str(no.replace(view(P=8, M=8, H=2, E=8, F=8)))
    with pytest.raises(ValueError, match="of 4 features, where 5"):
        Hedgehog("m", 5, 4).with_parts({"query": torch.zeros(3, 8, 4), "key": torch.zeros(3, 8, 4), "gain": torch.zeros(3)})


def test_gates_come_from_a_file(tmp_path: Path) -> None:
    path, g = tmp_path / "gates.safetensors", torch.Generator().manual_seed(0)
    data = drawn(512)
    method = SeerAttention(gates=str(path), count=2)
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.9, calibration=data)
    with pytest.raises(CalibrationError, match="there is no file"):
        reattend.plan(Causal().eval(), data[0], policy=policy)
    (name,) = (s.name for s in reattend.plan(Causal().eval(), data[0]).sites)
    gate = {"queries": torch.randn(2, 16, 8, generator=g), "keys": torch.randn(2, 48, 8, generator=g)}
    save_file({f"{name}.{n}": x for n, x in gate.items()}, path)
    (site,) = reattend.plan(Causal().eval(), data[0], policy=policy).sites
    found = site.candidate(str(method))
    assert found.feasible, found.why
    given = SeerAttention(Learned.of(gate["queries"]), Learned.of(gate["keys"]), count=2)
    policy = reattend.Policy(approximate=True, methods=(given,), max_error=0.9, calibration=data)
    (same,) = reattend.plan(Causal().eval(), data[0], policy=policy).sites
    assert same.candidate(str(given)).error == found.error
    assert "give queries and keys, or their file" in str(SeerAttention().replace(view(P=64, M=64, H=2)))


def test_what_no_kernel_computes_says_so() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v)

    for method, model, said in (
        (SparseLinear("p"), Plain(), "no kernel computes it: the output joins 2 products"),
        (Hedgehog("m", 8), Causal(), "no kernel computes it: the weights"),
        (Hedgehog("m", 8, 4), Causal(), "its inputs WQ, WK, GAIN are learned, and come with a calibration"),
    ):
        policy = reattend.Policy(approximate=True, methods=(method,))
        (site,) = reattend.plan(model.eval(), (torch.zeros(2, 2, 64, 16),) * 3, policy=policy).sites
        assert said in site.candidate(str(method)).why


@pytest.mark.slow
def test_a_model_runs_maps_that_were_fitted_to_it(tmp_path: Path) -> None:
    """Long enough that a state is predicted to be faster than pairs."""
    g = torch.Generator().manual_seed(0)
    data = [torch.randint(8, (1, 4096), generator=g) for _ in range(4)]
    method = Hedgehog(str(tmp_path / "maps.safetensors"), 16, 16)
    policy = reattend.Policy(approximate=True, methods=(method,), max_error=0.95, calibration=data)
    model, plain = small(), small()
    with torch.no_grad():
        reattend.optimize(model, policy=policy)
        out, exact = model(data[0]), plain(data[0])
    report = reattend.report(model)
    (site,) = report.sites
    assert site.kernel == str(method), report
    assert {c.verdict for c in report.checks} == {"same"}
    assert 0 < (out - exact).norm() / exact.norm() < 0.95
    reattend.restore(model)
