"""transformers' door against the models' own eager attention: outputs, padding, types, gradients, generation, caches."""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils
from transformers.models.llama import modeling_llama as llama

import reattend
from reattend.rewriter.doors.mask import PositionMask
from tests.tiers import few, one_in

from . import zoo

pytestmark = pytest.mark.thin(3)

NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "t5")
OTHERS = ("gpt2", "bert", "modernbert", "bart", "whisper", "vit", "clip")
OURS = reattend.Policy(allow=("reattend",), deny=("original",))


def pair(name: str, policy: reattend.Policy | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model with its own eager attention, and one with the same weights that goes through the door."""
    reattend.register(policy=policy)
    own = zoo.build(name).to(dtype)
    torch.manual_seed(3)
    for p in own.parameters():
        p.requires_grad_(True)
        # no parameter near zero: nothing hides behind a bias or a gain that does nothing
        small = p.detach().abs() < 0.02
        p.data[small] = torch.empty_like(p)[small].uniform_(0.02, 0.1)
    door = copy.deepcopy(own)
    door.set_attn_implementation("reattend")
    return own.eval(), door.eval()


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("policy", [pytest.param(OURS, id="ours"), pytest.param(None, id="cheapest", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", few([*NAMES, *OTHERS], *NAMES))
def test_outputs_on_valid_tokens(name: str, policy: reattend.Policy | None) -> None:
    own, door = pair(name, policy)
    for pad in ("right", "left", "none"):
        given = zoo.inputs(name, pad=pad)
        with torch.no_grad():
            want, got = zoo.output_of(own(**given)), zoo.output_of(door(**given))
        assert relative(zoo.valid(name, given, got), zoo.valid(name, given, want)) <= 2e-5, pad
    report = reattend.report(door)
    assert all(c.ok for c in report.checks), str(report)
    assert not report.misses, str(report)
    assert not report.notes, str(report)
    if policy is OURS:
        assert report.checks
        assert set(report.kernels) == {"reattend"}, str(report)


@pytest.mark.parametrize(("name", "options"), [("gemma2", {}), ("llama", {"output_attentions": True})])
def test_a_static_cache_where_the_models_own_function_runs(name: str, options: dict[str, Any]) -> None:
    """The cache counts in the tensor that says where queries stand, and a dense mask is made after it has."""
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        pieces = ((0, 6), (6, 10), (10, 11), (11, 12))
        with torch.no_grad():
            outs = [model(input_ids=ids[:, a:e], past_key_values=cache, **options) for a, e in pieces]
        return torch.cat([zoo.output_of(out) for out in outs], 1)

    own, door = pair(name, reattend.Policy(allow=("original",), deny=("reattend", "sdpa", "flex")))
    assert relative(logits(door), logits(own)) <= 2e-5


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.abs().max())


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("name", one_in(2, NAMES))
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    """Whole models against the same code in float64: no farther from it than their own code is."""
    own, door = pair(name, OURS, dtype)
    with torch.no_grad():
        # rows without a key; the net holds them, as float64 in the model's code makes them NaN
        door(**zoo.inputs(name, pad="left", dtype=dtype))
    given = zoo.inputs(name, pad="right", dtype=dtype)
    wide = copy.deepcopy(own).double()
    if name == "gpt_oss":
        # the grouped product of experts takes no float64
        wide.config._experts_implementation = "eager"
    with torch.no_grad():
        exact, want, got = (zoo.valid(name, given, zoo.output_of(m(**given))) for m in (wide, own, door))
    assert got.dtype == dtype
    assert error(got, exact) <= 1.2 * error(want, exact) + torch.finfo(dtype).eps
    assert all(c.ok for c in reattend.report(door).checks)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    own, door = pair(name)
    given = zoo.inputs(name, pad="left")
    for m in (own, door):
        m.train()
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        out = zoo.valid(name, given, zoo.output_of(m(**given)))
        torch.autograd.backward((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum())
    for (path, p), (_, q) in zip(door.named_parameters(), own.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None and q.grad is not None and q.grad.abs().max() > 1e-5:
            assert relative(p.grad, q.grad) <= 1e-3, path
    assert all(c.ok for c in reattend.report(door).checks)


def generating(name: str, policy: reattend.Policy | None = None) -> tuple[Any, Any]:
    reattend.register(policy=policy)
    own = zoo.build_generating(name)
    for p in own.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.1)
    door = copy.deepcopy(own)
    door.set_attn_implementation("reattend")
    return own, door


@pytest.mark.parametrize(
    ("name", "pad", "cache"),
    few(
        [(n, p, c) for n in NAMES for p, c in (("none", "dynamic"), ("left", "static"))],
        ("llama", "none", "dynamic"), ("mistral", "left", "static"),
    ),
)
def test_generation(name: str, pad: str, cache: str) -> None:
    """The same tokens and the same logits, window caches included: the models with windows slide."""
    own, door = generating(name, OURS)
    given = {k: v for k, v in zoo.inputs(name, pad=pad, length=11).items() if not k.startswith("decoder")}
    said = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = own.generate(**given, **said, cache_implementation=cache)
    got = door.generate(**given, **said, cache_implementation=cache)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert relative(a, b) <= 2e-5
    report = reattend.report(door)
    assert set(report.kernels) == {"reattend"}, str(report)
    assert not report.notes, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(["llama", "mistral", "gpt_oss"], "mistral"))
def test_prompts_in_pieces(name: str) -> None:
    """A cache that is continued by several tokens at once, beyond the window, left-padded."""
    own, door = pair(name, OURS)
    given = zoo.inputs(name, pad="left")
    outs = []
    with torch.no_grad():
        for m in (own, door):
            cache, parts = None, []
            for begin, end in ((0, 13), (13, 20), (20, 23), (23, 24)):
                out = m(
                    input_ids=given["input_ids"][:, begin:end], attention_mask=given["attention_mask"][:, :end],
                    past_key_values=cache, use_cache=True,
                )
                cache = out.past_key_values
                parts.append(zoo.output_of(out))
            outs.append(zoo.valid(name, given, torch.cat(parts, 1)))
    assert relative(outs[1], outs[0]) <= 1e-5
    assert set(reattend.report(door).kernels) == {"reattend"}


@pytest.mark.parametrize("name", few(["llama", "gemma2", "t5"], "t5"))
def test_beams_and_one_token_prompts(name: str) -> None:
    own, door = generating(name)
    given = {k: v[:, :1] for k, v in zoo.inputs(name, pad="none").items() if not k.startswith("decoder")}
    said = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    assert torch.equal(own.generate(**given, **said), door.generate(**given, **said))


def test_autocast() -> None:
    own, door = pair("gemma2", OURS)
    given = zoo.inputs("gemma2", pad="left")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = (zoo.valid("gemma2", given, zoo.output_of(m(**given))) for m in (door, own))
    assert relative(got.float(), want.float()) <= 3e-2
    assert set(reattend.report(door).kernels) == {"reattend"}


def test_packed_sequences_are_a_predicate_of_their_positions() -> None:
    own, door = pair("mistral", OURS)
    given = {"input_ids": zoo.inputs("mistral", pad="none")["input_ids"], "use_cache": False}
    given["position_ids"] = torch.cat([torch.arange(10), torch.arange(14)])[None].expand(2, -1)
    with torch.no_grad():
        assert relative(zoo.output_of(door(**given)), zoo.output_of(own(**given))) <= 1e-5
    report = reattend.report(door)
    assert set(report.kernels) == {"reattend"}
    assert not report.notes


def test_masks_of_the_caller() -> None:
    """Four dimensions, added or boolean: read as they are."""
    own, door = pair("llama", OURS)
    ids = zoo.inputs("llama", pad="none")["input_ids"]
    keep = (torch.rand(2, 1, 24, 24) > 0.3) | torch.eye(24, dtype=torch.bool)
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = zoo.output_of(own(input_ids=ids, attention_mask=added))
        for mask in (added, keep):
            assert relative(zoo.output_of(door(input_ids=ids, attention_mask=mask)), want) <= 1e-5
    assert set(reattend.report(door).kernels) == {"reattend"}


def test_attention_weights_and_live_dropout_are_left_to_the_model() -> None:
    own, door = pair("llama")
    given = zoo.inputs("llama")
    with torch.no_grad():
        pairs = zip(door(**given, output_attentions=True).attentions, own(**given, output_attentions=True).attentions)
        assert all(torch.equal(a, b) for a, b in pairs)
    for m in (own, door):
        m.train()
        for layer in m.layers:
            layer.self_attn.attention_dropout = 0.5
    outs = []
    for m in (own, door):
        torch.manual_seed(0)
        outs.append(zoo.output_of(m(**given)))
    assert torch.equal(*outs)
    notes = "\n".join(reattend.report(door).notes)
    assert "the weights are asked for" in notes
    assert "live dropout" in notes


def test_checkpointed_layers_train() -> None:
    own, door = pair("mistral")
    given = zoo.inputs("mistral", pad="left")
    for m in (own, door):
        m.train()
        m.gradient_checkpointing_enable()
        out = zoo.valid("mistral", given, zoo.output_of(m(**given)))
        torch.autograd.backward((out * torch.arange(out.numel()).reshape(out.shape).sin()).sum())
    for p, q in zip(door.parameters(), own.parameters(), strict=True):
        if q.grad is not None and q.grad.abs().max() > 1e-5:
            assert p.grad is not None
            assert relative(p.grad, q.grad) <= 1e-3


@pytest.mark.parametrize("way", ["compile", "export", "vmap", "jvp"])
def test_inside_a_trace_the_model_is_its_own(way: str) -> None:
    own, door = pair("llama")
    torch.manual_seed(1)
    x = torch.randn(2, 1, 9, 64)

    def run(m: Any) -> Any:
        def call(e: torch.Tensor) -> torch.Tensor:
            return m(inputs_embeds=e, use_cache=False)[0]  # type: ignore[no-any-return]

        match way:
            case "compile":
                torch._dynamo.reset()
                return torch.compile(call, backend="eager")(x[0])
            case "export":
                return torch.export.export(m, (), {"inputs_embeds": x[0], "use_cache": False}, strict=False).module()(
                    inputs_embeds=x[0], use_cache=False
                )[0]
            case "vmap":
                return torch.vmap(call)(x)
        return torch.func.jvp(call, (x[0],), (x[0].sin(),))[1]

    with torch.no_grad():
        assert relative(run(door), run(own)) <= 1e-6


def test_optimize_finds_what_the_door_would_do() -> None:
    torch._dynamo.reset()
    own, door = pair("llama")
    given = zoo.inputs("llama")
    reattend.optimize(door, policy=OURS)
    with torch.no_grad():
        assert relative(zoo.output_of(door(**given)), zoo.output_of(own(**given))) <= 1e-5
    report = reattend.report(door)
    assert set(report.kernels) == {"reattend"}
    assert not report.doors


def test_a_copy_starts_anew_and_types_may_change() -> None:
    _, door = pair("llama", OURS)
    given = zoo.inputs("llama")
    with torch.no_grad():
        door(**given)
        other = copy.deepcopy(door)
        assert not reattend.report(other).doors
        assert zoo.output_of(other.to(torch.bfloat16)(**given)).dtype == torch.bfloat16
    assert {s.site.shape.dtype for s in reattend.report(other).sites} == {"bfloat16"}
    assert len(reattend.report(door).doors) == 2


def test_a_model_that_is_gone_leaves_nothing() -> None:
    _, door = pair("mistral", OURS)
    with torch.no_grad():
        door(**zoo.inputs("mistral", pad="left"))
    layer = weakref.ref(door.layers[0].self_attn)
    del door
    gc.collect()
    assert layer() is None


def test_on_the_meta_device_the_model_is_its_own() -> None:
    _, door = pair("llama")
    given = {k: v.to("meta") for k, v in zoo.inputs("llama").items()}
    door.to("meta")
    assert zoo.output_of(door(**given)).shape == (2, 24, 64)


def test_the_report_says_what_ran_where() -> None:
    _, door = pair("gemma2", OURS)
    with torch.no_grad():
        door(**zoo.inputs("gemma2", pad="left"))
    report = reattend.report(door)
    assert [(s.name, s.ran, s.kernel) for s in report.sites] == [(f"layers.{i}.self_attn", 1, "reattend") for i in (0, 1)]
    assert {"causal", "softcap", "mask"} <= report.sites[0].site.traits
    assert "modeling_gemma2.py" in report.sites[0].site.where
    assert "through a door: 2 calls of 2 attentions, 0 of them left" in str(report)
    assert not reattend.report(torch.nn.Linear(2, 2)).installed


# --- masks of transformers ----------------------------------------------------------------------------------------------


def made(implementation: str, **given: Any) -> Any:
    reattend.register()
    config = zoo.CONFIGS["mistral"]()
    config._attn_implementation = implementation
    make = masking_utils.create_sliding_window_causal_mask if given.pop("window", False) else masking_utils.create_causal_mask
    return make(config=config, inputs_embeds=torch.zeros(2, 24, 8), attention_mask=given.pop("attention_mask", None), cache=None, **given)


FIRST = torch.tensor([3, 7])


@pytest.mark.parametrize(
    ("function", "lifts"),
    [
        (lambda b, h, q, k: (q < 4) & (k < 4), True),
        (lambda b, h, q, k: k < FIRST[b], True),
        (lambda b, h, q, k: (q // 4 == k // 4) | (k % 5 == 0), True),
        (lambda b, h, q, k: FIRST.sum() > k, False),
    ],
    ids=["prefix", "data", "blocks", "sum"],
)
def test_functions_of_the_caller_are_lifted_or_said(function: Callable[..., Any], lifts: bool) -> None:
    mask = made("reattend", or_mask_function=function)
    assert isinstance(mask, PositionMask)
    assert isinstance(mask.positions.lifted, str) != lifts
    want = made("sdpa", or_mask_function=function)
    assert torch.equal(mask.positions.dense == 0, want)
    if lifts:
        q, leaves = torch.zeros(2, 4, 24, 8), mask.positions.leaves
        assert torch.equal(mask.positions.reading(q, q, leaves) == 0, want)


def test_a_mask_that_cannot_be_lifted_is_dense_and_said() -> None:
    _, door = pair("llama", OURS)
    mask = made("reattend", or_mask_function=lambda b, h, q, k: FIRST.sum() > k)
    q, k = torch.randn(2, 4, 24, 16), torch.randn(2, 2, 24, 16)
    layer = door.layers[0].self_attn
    out = transformers.AttentionInterface()["reattend"](layer, q, k, k, mask, scaling=0.25)[0]
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, k, attn_mask=mask.positions.dense, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    assert relative(out, want) <= 1e-5
    assert "the mask is dense" in str(reattend.report(door))


@pytest.mark.parametrize("pad", ["right", "left", "none"])
@pytest.mark.parametrize("window", [False, True])
def test_masks_are_those_of_eager_attention(pad: str, window: bool) -> None:
    given = zoo.inputs("mistral", pad=pad)["attention_mask"]
    mask = made("reattend", attention_mask=given, window=window)
    want = made("eager", attention_mask=given, window=window)
    assert torch.equal(mask.positions.dense.expand(2, -1, -1, -1), want)


class Sparse(llama.LlamaAttention):  # type: ignore[misc]
    """Leaves a selection of keys to implementations other than eager and SDPA, as sparse models do."""

    indices: torch.Tensor | None = torch.zeros(1, 3, 2, dtype=torch.long)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (p(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        function = transformers.AttentionInterface().get_interface("reattend", llama.eager_attention_forward)
        return function(self, q, k, v, None, scaling=self.scaling, indices=self.indices)


def test_what_eager_attention_does_not_read_is_refused() -> None:
    reattend.register()
    layer = Sparse(zoo.CONFIGS["llama"](), 0).eval()
    with pytest.raises(ValueError, match="Sparse hands over indices, which its eager attention does not read"):
        layer(torch.randn(1, 3, 64))
    with pytest.raises(Exception, match="Sparse hands over indices"):
        torch.compile(layer, backend="eager")(torch.randn(1, 3, 64))  # type: ignore[no-untyped-call]


def test_what_is_refused_is_refused_after_calls_that_were_not() -> None:
    reattend.register()
    layer = Sparse(zoo.CONFIGS["llama"](), 0).eval()
    layer.indices, indices = None, layer.indices
    for _ in range(2):
        layer(torch.randn(1, 3, 64))
    layer.indices = indices
    with pytest.raises(ValueError, match="Sparse hands over indices"):
        layer(torch.randn(1, 3, 64))


def test_models_that_add_the_mask_themselves_add_that_of_eager_attention() -> None:
    mask = made("reattend", attention_mask=zoo.inputs("mistral", pad="right")["attention_mask"])
    want = made("eager", attention_mask=zoo.inputs("mistral", pad="right")["attention_mask"])
    assert torch.equal(torch.zeros(1) + mask, want)
    assert torch.equal(mask[:, :, :3, -2:], want[:, :, :3, -2:])


# --- the door itself ----------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^reattend.register: transformers is not installed: pip install 'reattend\[models\]'$"):
        reattend.register()
    with pytest.raises(ValueError, match="unknown library 'jax'; one of transformers, diffusers"):
        reattend.register("jax")  # type: ignore[arg-type]


@pytest.mark.slow
def test_nothing_is_imported_before_a_door_is_opened() -> None:
    code = "import reattend, reattend.api, sys; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_patched_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function, what it calls, a method, and the forward of one module: as eager attention does, so the door."""
    own, door = pair("llama", OURS)
    given = zoo.inputs("llama", pad="left")
    eager, heads = llama.eager_attention_forward, llama.repeat_kv

    def twice(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float,
        dropout: float = 0.0, **more: Any,
    ) -> Any:
        return eager(module, query * 2, key, value, attention_mask, scaling, dropout, **more)

    forward = inspect.unwrap(llama.LlamaAttention.forward)
    named = {**forward.__globals__, "eager_attention_forward": twice}
    other = types.FunctionType(forward.__code__, named, "forward", forward.__defaults__, forward.__closure__)

    def held(what: str) -> torch.Tensor:
        with torch.no_grad():
            got, want = (zoo.valid("llama", given, zoo.output_of(m(**given))) for m in (door, own))
        assert relative(got, want) <= 2e-5, what
        return want

    seen = [held("as it is")]
    for owner, name, new in (
        (llama, "eager_attention_forward", twice), (llama, "repeat_kv", lambda x, n: heads(x, n) * 2),
        (llama.LlamaAttention, "forward", other),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, new)
            seen.append(held(name))
        assert torch.equal(held(f"{name} given back"), seen[0])
    for m in (own, door):
        m.layers[0].self_attn.forward = types.MethodType(other, m.layers[0].self_attn)
    seen.append(held("one module"))
    changes = [relative(x, seen[0]) for x in seen[1:]]
    assert min(changes) > 1e-4, changes
    assert set(reattend.report(door).kernels) == {"reattend"}
