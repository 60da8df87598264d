"""Detection over the spellings of the field: what is found equals what the code computes, and refusals say why."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reattend.patterns.attention import recognise
from reattend.patterns.attention.attention import Attention
from reattend.patterns.attention.traits import no_key_rule
from reattend.rewriter.find import detect
from reattend.rewriter.find.twins import match
from reattend.rewriter.graph.aliases import Aliases
from reattend.rewriter.graph.node import op_name

from .helpers import error_of, graph_of, read, values_of

_spec = importlib.util.spec_from_file_location("spellings", Path(__file__).parents[1] / "cases" / "spellings.py")
assert _spec is not None
assert _spec.loader is not None
spellings = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(spellings)

# What has no form yet, with the words that the user reads.
REFUSED = {
    "talking_heads": "reduces scores over",
    "dropout_train": "live dropout",
    "linear_cumsum": "running sum of data",
}
LEFT_ALONE = {
    "slot_attention": "reduces scores over",
    "slot_attention_bias": "reduces scores over",
    "softmax_over_heads": "reduces scores over",
    "router": "router",
}


def capture(case: dict[str, Any]) -> tuple[Any, dict[Any, Any]]:
    torch.manual_seed(0)
    args = [a.detach().double() if a.is_floating_point() else a for a in case["args"]()]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        gm = graph_of(case["fn"], args)
        return gm, values_of(gm, args)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("name", [n for n in spellings.CASES if n not in REFUSED])
def test_spelling_is_found_and_lifted_exactly(name: str) -> None:
    gm, values = capture(spellings.CASES[name])
    found, _ = detect.find(gm)
    assert len(found) == (spellings.H if name == "head_loop" else 1)
    for f in found:
        narrower = "softmax, dtype" in str(f.cascade) or "f32(" in str(f.cascade)
        assert error_of(f, values) <= (1e-6 if narrower else 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    gm, _ = capture(spellings.CASES[name])
    found, missed = detect.find(gm)
    assert not found
    assert any(REFUSED[name] in m.reason for m in missed), [m.reason for m in missed]


@pytest.mark.parametrize("name", spellings.LEAVE_ALONE)
def test_look_alikes(name: str) -> None:
    """What is not attention is refused with its reason; what is found keeps its value."""
    gm, values = capture(spellings.LEAVE_ALONE[name])
    found, missed = detect.find(gm)
    if name in LEFT_ALONE:
        assert not found
        assert any(LEFT_ALONE[name] in m.reason for m in missed), [m.reason for m in missed]
    for f in found:
        assert error_of(f, values) <= 1e-12


def found_in(fn: Callable[..., torch.Tensor], *args: torch.Tensor) -> tuple[detect.Found, float]:
    gm = graph_of(fn, args)
    (found,), _ = detect.find(gm)
    return found, error_of(found, values_of(gm, args))


def qkv(h: int = 4, s: int = 24, m: int = 0, d: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sizes = (s, m or s, m or s)
    q, k, v = (torch.randn(2, h, n, d, dtype=torch.float64) for n in sizes)
    return q, k, v


def test_late_division_belongs_to_the_attention() -> None:
    def late(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        e = (q @ k.transpose(-2, -1) * 0.25).exp()
        return (e @ v) / e.sum(-1, keepdim=True)

    found, error = found_in(late, *qkv())
    assert found.output is not found.final
    assert error <= 1e-12


def test_mul_and_sum_are_products() -> None:
    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
        return (p[..., None] * v[:, :, None]).sum(-2)

    _, error = found_in(written_out, *qkv())
    assert error <= 1e-12


def test_row_rule_of_ones_own() -> None:
    def squares(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        w = (q @ k.transpose(-2, -1) * 0.25) ** 2
        return (w / w.sum(-1, keepdim=True)) @ v

    _, error = found_in(squares, *qkv())
    assert error <= 1e-12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "row"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_form_of_sdpa(causal: bool, mask: str, grouped: bool) -> None:
    if causal and mask != "none":
        pytest.skip("torch takes one or the other")
    q, k, v = qkv(m=30)
    if grouped:
        k, v = k[:, :2], v[:, :2]
    keep = torch.rand(2, 1, 24, 30) > 0.3
    masks = {"none": None, "bool": keep, "float": torch.randn(1, 4, 24, 30, dtype=torch.float64), "row": keep[:, :, :1]}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *m: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, m[0] if m else None, is_causal=causal, scale=0.3, enable_gqa=grouped
        )

    extra = [m for m in [masks[mask]] if m is not None]
    _, error = found_in(call, q, k, v, *extra)
    assert error <= 1e-12


def test_rule_for_rows_without_a_key_is_carried() -> None:
    q, k, v = qkv()
    keep = torch.ones(24, 24, dtype=torch.bool).tril(-1)

    def spelled(fill: float, safe: bool) -> Callable[..., torch.Tensor]:
        def fn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            if safe:
                return F.scaled_dot_product_attention(q, k, v, keep)
            return (q @ k.transpose(-2, -1)).masked_fill(~keep, fill).softmax(-1) @ v

        return fn

    for fill, safe, rule in ((-math.inf, False, "nan"), (-1e9, False, "uniform"), (0.0, True, "zero")):
        gm = graph_of(spelled(fill, safe), (q, k, v, keep))
        (found,), _ = detect.find(gm)
        view = recognise.attention(found.cascade)
        assert isinstance(view, Attention)
        assert no_key_rule(view) == rule


def test_writes_between_the_products_are_refused() -> None:
    """K is read for the scores, then overwritten: the operator would read the new K."""

    def overwrite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = torch.relu(k)
        s = q @ k.transpose(-2, -1)
        k.zero_()
        return s.softmax(-1) @ v + k

    gm = graph_of(overwrite, qkv())
    found, missed = detect.find(gm)
    assert not found
    assert any("written in place" in m.reason for m in missed)


def test_a_copy_that_is_written_is_not_its_source() -> None:
    def write_v(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        v = v.clone()
        v[:, :, 0] = 1.0
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    _, error = found_in(write_v, *qkv())
    assert error <= 1e-12


def test_identical_layers_share_one_cascade() -> None:
    def three(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            q = (q @ k.transpose(-2, -1) * 0.25 + mask).softmax(-1) @ v
        return q

    args = (*qkv(), torch.randn(24, 24, dtype=torch.float64))
    gm = graph_of(three, args)
    found, _ = detect.find(gm)
    values = values_of(gm, args)
    assert len(found) == 3
    assert found[0].cascade is found[1].cascade is found[2].cascade
    assert len({f.output for f in found}) == 3
    assert all(error_of(f, values) <= 1e-12 for f in found)


def test_a_leaf_behind_another_leaf_has_no_counterpart() -> None:
    def two(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sin().exp() * 2, y.sin().exp() * 2

    gm = graph_of(two, (torch.randn(3), torch.randn(3)))
    one, other = ([n for n in gm.graph.nodes if op_name(n) == name] for name in ("sin", "exp"))
    first, second = (n for n in gm.graph.nodes if op_name(n) == "mul")
    aliases = Aliases(gm.graph)
    assert match(first, [other[0]], [], second, aliases) == {other[0]: other[1]}
    assert match(first, [one[0]], [other[0]], second, aliases) == {one[0]: one[1]}
    assert match(first, [one[0], other[0]], [], second, aliases) is None


def test_a_leaf_behind_what_both_share_is_its_own_counterpart() -> None:
    def two(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shared = mask.exp()
        return x * shared, y * shared

    gm = graph_of(two, tuple(torch.randn(3) for _ in range(3)))
    x, y, mask, shared, first, second, *_ = gm.graph.nodes
    aliases = Aliases(gm.graph)
    assert match(first, [x, mask], [shared], second, aliases) == {x: y, mask: mask}


def test_a_term_is_rounded_once() -> None:
    """The weights read the scale that the maximum and the sum of their row read: the one that the model computed."""

    def learned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        a = q @ k.mT * (s.exp() * 0.35)
        e = (a - a.amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True) @ v

    args = tuple(x.bfloat16() for x in (*qkv(), torch.randn(4, 1, 1)))
    found, _ = detect.find(graph_of(learned, args))
    (scale,) = (t for t in found[0].cascade.inputs if t.name not in ("Q", "K", "V"))
    readers = [e.out.tensor for e in found[0].cascade.einsums if any(str(x.attr) == scale.name for x in e.reads)]
    assert len(readers) == 3


def test_twins_with_another_constant_are_not_twins() -> None:
    def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v
        return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v

    args = qkv()
    gm = graph_of(two, args)
    found, _ = detect.find(gm)
    values = values_of(gm, args)
    assert found[0].cascade != found[1].cascade
    assert all(error_of(f, values) <= 1e-12 for f in found)


@pytest.mark.parametrize("whole", [False, True])
def test_equal_layers_are_lifted_once(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            none = torch.empty(*k.shape[:2], 0, k.shape[3])
            keys, values = torch.cat([none, k], 2), torch.cat([torch.empty_like(none), v], 2)
            q = F.scaled_dot_product_attention(q, keys, values) if whole else (q @ keys.mT * 0.25).softmax(-1) @ values
        return q

    attempt, lifted = detect._attempt, list[str]()

    def counted(graph: Any, aliases: Aliases, final: Any) -> Any:
        lifted.append(final.node.name)
        return attempt(graph, aliases, final)

    monkeypatch.setattr(detect, "_attempt", counted)
    args = qkv()
    gm = graph_of(layers, args)
    found, _ = detect.find(gm)
    values = values_of(gm, args)
    assert len(found) == 3
    assert len({f.cascade for f in found}) == 1
    assert all(error_of(f, values) <= 1e-6 for f in found)
    assert [n for n in lifted if n in {f.final.name for f in found}] == [found[0].final.name]


# --- no silent miss ---------------------------------------------------------------------------------------------------


def _qkv(*more: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [*(torch.randn(2, 4, 24, 16) for _ in range(3)), *more]


def _columns(q: Any, k: Any, v: Any) -> Any:
    a = q @ k.mT * 0.25
    a[..., -5:] = -math.inf
    return a.softmax(-1) @ v


def _columns_of_the_product(q: Any, k: Any, v: Any) -> Any:
    a = q @ k.mT
    a[..., :3] = -1e4
    return (a * 0.25).softmax(-1) @ v


def _scattered(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.mT * 0.25).scatter(-1, torch.zeros(2, 4, 24, 1, dtype=torch.int64), v[..., :1]).softmax(-1) @ v


MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def _mixed_before(q: Any, k: Any, v: Any) -> Any:
    return F.linear((q @ k.mT).movedim(1, -1), MIX).movedim(-1, 1).softmax(-1) @ v


def _mixed_after(q: Any, k: Any, v: Any) -> Any:
    return F.linear((q @ k.mT).softmax(-1).movedim(1, -1), MIX).movedim(-1, 1) @ v


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (_columns, "mul is written in place (by fill_) before softmax reads it"),
        (_columns_of_the_product, "matmul is written in place (by fill_) before mul reads it"),
        (_scattered, "a scatter of several values"),
        (_mixed_before, "linear mixes them"), (_mixed_after, "linear mixes them"),
    ],
)
def test_what_stands_between_the_products_is_named(fn: Callable[..., torch.Tensor], words: str) -> None:
    args = _qkv()
    found, missed = detect.find(graph_of(fn, args))
    assert not found
    (miss,) = missed
    assert words in miss.reason
    assert miss.depth > 0


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        # a router: its gate and the next layer's projection are weights, and experts are no tokens
        (
            lambda x, q, gate, down, k: (
                F.linear((F.linear(x @ q.mT @ q, gate).softmax(-1).topk(2)[0].sum(-1, keepdim=True) * x), down) @ k.mT
            ),
            (torch.randn(2, 24, 16), torch.randn(2, 24, 16), torch.randn(8, 16), torch.randn(16, 16), torch.randn(2, 24, 16)),
        ),
        # a head over classes
        (lambda x, w: F.linear(x @ x.mT @ x, w).softmax(-1), (torch.randn(2, 24, 16), torch.randn(7, 16))),
    ],
)
def test_a_softmax_over_no_scores_is_no_miss(fn: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...]) -> None:
    _, missed = detect.find(graph_of(fn, list(args)))
    assert not [m for m in missed if "softmax stands between" in m.reason]


def test_a_bias_of_many_operators_hides_nothing() -> None:
    def fn(q: Any, k: Any, v: Any, b: Any, ids: Any) -> Any:
        for i in range(40):
            b = torch.where(ids > i, b * 1.01, b - 0.01)
        return (q @ k.mT * 0.25 + b).softmax(-1) @ v

    found, _ = detect.find(graph_of(fn, _qkv(torch.randn(4, 24, 24), torch.randint(0, 9, (24, 24)))))
    assert len(found) == 1


@pytest.mark.parametrize("extreme", [torch.max, torch.min])
def test_the_larger_of_two_is_a_term(extreme: Callable[..., torch.Tensor]) -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        return extreme(q @ k.mT * 0.25, torch.tensor(-0.5, dtype=torch.float64)).softmax(-1) @ v

    args = [x.double() for x in _qkv()]
    gm = graph_of(fn, args)
    (f,), _ = detect.find(gm)
    assert error_of(f, values_of(gm, args)) < 1e-12


def test_an_operator_that_holds_a_whole_attention_is_named() -> None:
    def fn(q: Any, k: Any, v: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)[0]

    found, missed = detect.find(graph_of(fn, _qkv()))
    assert not found
    assert [(m.what, "scaled_dot_product_attention" in m.hint) for m in missed] == [
        ("_scaled_dot_product_flash_attention_for_cpu", True)
    ]


def learned_query(x: Tensor, w: Tensor) -> Tensor:
    """Every token attends to what its own layers made, by one learned query; the keys are normalised."""
    s = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    q = w.view(-1, x.shape[-1]).expand(*x.shape[:-2], -1, -1)
    return ((q @ s.mT) * 0.25).softmax(-1) @ s


def one_step_of_normalised_keys(x: Tensor, q: Tensor) -> Tensor:
    s = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return ((q[:, :, :1] @ s.mT) * 0.25).softmax(-1) @ s


@pytest.mark.parametrize(("fn", "shape"), [(learned_query, (8,)), (one_step_of_normalised_keys, (2, 5, 3, 8))])
def test_one_query_before_normalised_keys_has_a_coordinate(fn: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    view = read(fn, torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64))
    assert view.query == "p"
    assert view.cascade.rank["p"].size == 1


def written_at_indices(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """What is written at run-time indices has no term, and is read after it."""
    s = torch.zeros_like(x).index_put_((at,), y)
    s = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (x @ s.mT).softmax(-1) @ s


def test_a_tensor_is_read_after_the_write_that_makes_it() -> None:
    x, y = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    view = read(written_at_indices, x, torch.tensor([2, 0]), y)
    assert view.key == "m"
