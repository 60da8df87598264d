"""A captured graph computes what Dynamo's graph computes: values, gradients, random state, writes, types."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reattend.rewriter.capture import capture, export


class Recorder:
    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs.append(capture.from_dynamo(gm, inputs).graph)
        return self.graphs[-1].forward


def run(model: nn.Module, *args: Tensor, dynamic: bool | None = None, seed: int = 0) -> tuple[Any, Any, fx.GraphModule]:
    """Results of the model and of its captured form, from the same random state, and the captured graph."""
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    recorder = Recorder()
    compiled = torch.compile(twin, backend=recorder, dynamic=dynamic)
    torch.manual_seed(seed)
    expected = model(*args)
    torch.manual_seed(seed)
    got = compiled(*args)
    assert len(recorder.graphs) == 1
    for (name, a), (_, b) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    return expected, got, recorder.graphs[0]


def targets(graph: fx.GraphModule) -> list[str]:
    return [n.target._schema.name for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        made: Tensor = F.softmax(q @ k.transpose(-1, -2) * 8**-0.5, dim=-1) @ v
        return made


def test_softmax_and_products_stay_one_operator() -> None:
    a, b, graph = run(Plain(), torch.randn(2, 5, 8))
    assert torch.equal(a, b)
    names = targets(graph)
    assert names.count("aten::softmax") == 1
    assert names.count("aten::matmul") == 2
    assert names.count("aten::linear") == 3


def test_sdpa_stays_one_operator() -> None:
    class M(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    a, b, graph = run(M(), torch.randn(1, 2, 5, 8))
    assert torch.equal(a, b)
    assert targets(graph) == ["aten::scaled_dot_product_attention"]


def test_traces_and_module_paths_are_carried() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Plain(), Plain()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    _, _, graph = run(Outer(), torch.randn(2, 5, 8))
    softmax = [n for n in graph.graph.nodes if "softmax" in n.name]
    assert [next(reversed(n.meta["nn_module_stack"].values()))[0] for n in softmax] == ["layers.0", "layers.1"]
    assert all("test_capture.py" in n.meta["stack_trace"] for n in softmax)


def test_gradients_are_equal() -> None:
    model = Plain()
    x = torch.randn(2, 5, 8, requires_grad=True)
    a, b, graph = run(model, x)
    (ga,) = torch.autograd.grad(a.square().sum(), x)
    (gb,) = torch.autograd.grad(b.square().sum(), x)
    assert torch.equal(ga, gb)
    assert all(n.meta["val"].requires_grad for n in graph.graph.nodes if n.op == "call_function")


def test_grad_mode_regions_are_kept() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                y = x * 2
            return x * 3 + y, y

    x = torch.randn(3, requires_grad=True)
    a, b, graph = run(M(), x)
    assert a[0].requires_grad
    assert b[0].requires_grad
    assert not b[1].requires_grad
    values = {n.name: n.meta.get("val") for n in graph.graph.nodes}
    wants = {name: v.requires_grad for name, v in values.items() if isinstance(v, Tensor)}
    assert wants["mul"] is False
    assert wants["mul_1"] is True
    assert wants["add"] is True
    del a


def test_no_gradient_is_marked_under_no_grad() -> None:
    with torch.no_grad():
        _, _, graph = run(Plain(), torch.randn(2, 5, 8))
    assert not any(n.meta["val"].requires_grad for n in graph.graph.nodes if n.op == "call_function")


def test_dropout_draws_the_same_numbers() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True) + torch.rand_like(x)

    a, b, _ = run(M(), torch.randn(64))
    assert torch.equal(a, b)


def test_writes_happen_once_and_in_order() -> None:
    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))
            self.count: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            y = x * self.count
            self.count.mul_(2)
            y[0] = self.count[0]
            return y.masked_fill_(y > 1, torch.tensor(-1.0))

    x = torch.randn(3)
    a, b, graph = run(M(), x)
    assert torch.equal(a, b)
    names = targets(graph)
    assert names.index("aten::add_") < names.index("aten::mul") < names.index("aten::mul_")


def test_a_failed_export_leaves_no_hook() -> None:
    """One that stays sees every assignment of a buffer in the process, and Dynamo breaks graphs there."""

    class Unexportable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    before = list(torch.nn.modules.module._global_buffer_registration_hooks)
    with pytest.raises(capture.CaptureError):
        export.from_export(Unexportable(), (torch.randn(3),), {})
    assert list(torch.nn.modules.module._global_buffer_registration_hooks) == before


def test_symbolic_sizes_stay_symbolic() -> None:
    a, b, graph = run(Plain(), torch.randn(2, 5, 8), dynamic=True)
    assert torch.equal(a, b)
    softmax = next(n for n in graph.graph.nodes if "softmax" in n.name)
    assert all(isinstance(s, torch.SymInt) for s in softmax.meta["val"].shape)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ x.transpose(-1, -2)
        made: Tensor = F.softmax(y @ x.transpose(-1, -2), dim=-1) @ torch.cat([x, y.float()], -1) + z.sum()
        return made


def test_autocast_is_made_explicit() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        a, b, graph = run(Mixed(), torch.randn(2, 5, 8))
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    for n in graph.graph.nodes:
        if n.op == "call_function" and n.target in (torch.ops.aten.matmul.default, torch.ops.aten.linear.default):
            types = {i.meta["val"].dtype for i in n.all_input_nodes}
            assert types == {n.meta["val"].dtype}, n.format_node()
    made = [n for n in graph.graph.nodes if "autocast_for" in n.meta]
    assert made
    from reattend.rewriter.capture import autocast

    autocast.remove_unused_casts(graph)
    graph.graph.lint()
    assert not [n for n in graph.graph.nodes if "autocast_for" in n.meta]


def test_autocast_inside_an_einsum_is_made_explicit() -> None:
    """What it casts are its operands as it has permuted them."""

    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.einsum("bpe,bme->bpm", x, y.softmax(-1)) + torch.einsum("ij,bj->bi", x[0], y[:, 0])[..., None]

    with torch.autocast("cpu", torch.bfloat16):
        a, b, graph = run(Product(), torch.randn(2, 2, 8), torch.randn(2, 5, 8))
    assert torch.equal(a, b)
    products = [n for n in graph.graph.nodes if n.op == "call_function" and "einsum" in str(n.target)]
    assert products
    for n in products:
        assert {i.meta["val"].dtype for i in n.all_input_nodes} == {torch.bfloat16}, n.format_node()


def test_an_operator_that_is_tried_on_mixed_types_logs_nothing() -> None:
    """Weights in float32 beside values in bfloat16, which only autocast lets a product take: asking is no error."""

    class Weighted(nn.Module):
        def forward(self, s: Tensor, v: Tensor) -> Tensor:
            return s.softmax(-1) @ v

    said: list[logging.LogRecord] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record)

    noting = Noting()
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(noting)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            a, b, _ = run(Weighted(), torch.randn(2, 5, 7), torch.randn(2, 7, 4).bfloat16())
    finally:
        log.removeHandler(noting)
    assert torch.equal(a, b)
    assert not said, said[0].getMessage()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_what_an_operator_converts_by_itself_is_no_cast_of_autocast(dtype: torch.dtype, masked: bool) -> None:
    """SDPA as matrix products computes 16 bits in float32, with autocast and without."""

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if masked else None)

    q, k, v = (torch.randn(2, 2, n, 4).to(dtype) for n in (3, 33, 33))
    with torch.autocast("cpu", dtype), sdpa_kernel(SDPBackend.MATH):
        a, b, graph = run(Attend(), q, k, v, torch.randn(3, 33))
    assert torch.equal(a, b)
    casts = [n.meta["val"].dtype for n in graph.graph.nodes if "autocast_for" in n.meta]
    assert set(casts) <= {dtype}, casts


def test_a_graph_without_autocast_is_left_as_it_is() -> None:
    _, _, graph = run(Mixed(), torch.randn(2, 5, 8))
    assert not [n for n in graph.graph.nodes if "autocast_for" in n.meta]


def test_checkpointed_layers_are_captured_with_their_bodies() -> None:
    from torch.utils.checkpoint import checkpoint

    class M(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, x: Tensor) -> Tensor:
            out = checkpoint(self.inner, x, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out

    x = torch.randn(2, 5, 8, requires_grad=True)
    a, b, graph = run(M(), x)
    assert torch.equal(a, b)
    (outer, body) = capture.regions(graph)
    assert outer is graph
    assert "aten::softmax" in targets(body)
    assert next(n for n in body.graph.nodes if "softmax" in n.name).meta["val"].requires_grad
    (ga,) = torch.autograd.grad(a.square().sum(), x)
    (gb,) = torch.autograd.grad(b.square().sum(), x)
    assert torch.equal(ga, gb)


def test_export_gives_one_graph_without_computing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Plain(), Plain())
    captured = export.from_export(model, (torch.empty(4, 1 << 16, 8, device="meta"),), None)
    assert targets(captured.graph).count("aten::softmax") == 2
    softmax = [n for n in captured.graph.graph.nodes if "softmax" in n.name]
    assert [next(reversed(n.meta["nn_module_stack"].values()))[0] for n in softmax] == ["0", "1"]


def test_export_with_symbolic_sizes() -> None:
    captured = export.from_export(Plain(), (torch.randn(4, 16, 8),), None, dynamic=True)
    softmax = next(n for n in captured.graph.graph.nodes if "softmax" in n.name)
    assert isinstance(softmax.meta["val"].shape[1], torch.SymInt)


def test_export_regions_are_put_in_line() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x @ x
            with torch.autocast("cpu", torch.bfloat16):
                return x @ y

    x = torch.randn(4, 4, requires_grad=True)
    captured = export.from_export(M(), (x,), None)
    matmuls = [n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.matmul.default]
    assert len(matmuls) == 2
    assert {i.meta["val"].dtype for i in matmuls[1].all_input_nodes} == {torch.bfloat16}
    assert torch.equal(captured.graph(x), M()(x))


def test_a_model_that_cannot_be_exported_says_why() -> None:
    class M(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(capture.CaptureError, match="data-dependent"):
        export.from_export(M(), (torch.randn(3),), None)
