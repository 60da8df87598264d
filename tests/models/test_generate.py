"""`generate` through optimised models: equal tokens, and each step's logits, on a left-padded batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reattend
from reattend.rewriter.capture.models import cache_name

from . import zoo

OURS = reattend.Policy(allow=("reattend",), deny=("original",))
TOKENS = 32


def generate(model: Any, name: str, tokens: int = TOKENS) -> Any:
    given = zoo.inputs(name, pad="left")
    given.pop("decoder_input_ids", None)
    return model.generate(
        **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.CAUSAL, *zoo.PAIRS])
def test_greedy_generation_is_the_same(name: str) -> None:
    """32 tokens, fp32: equal tokens, logits within 1e-5 of their maximum (random weights repeat a token: logits tell)."""
    torch._dynamo.reset()
    original = zoo.build_generating(name)
    model = copy.deepcopy(original)
    reattend.optimize(model, policy=OURS)
    with torch.no_grad():
        want, got = generate(original, name), generate(model, name)
    assert torch.equal(want.sequences, got.sequences)
    for a, b in zip(want.logits, got.logits, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
    report = reattend.report(model)
    assert report.given_up == 0, str(report)
    assert set(report.kernels) == {"reattend"}, str(report)
    if name in zoo.PAIRS:
        assert any(e.path.endswith("encoder") and e.calls > e.missed for e in report.entries), str(report)


@pytest.mark.slow
def test_bf16_logits_teacher_forced() -> None:
    torch._dynamo.reset()
    original = zoo.build_generating("llama", dtype=torch.bfloat16)
    model = copy.deepcopy(original)
    reattend.optimize(model, policy=OURS)
    given = zoo.inputs("llama", pad="left", length=48)
    keep = given["attention_mask"].bool()
    with torch.no_grad():
        want, got = original(**given).logits.float()[keep], model(**given).logits.float()[keep]
    assert float((want - got).abs().max() / want.abs().max()) <= 3e-2


@pytest.mark.slow
def test_twelve_shapes_make_at_most_eight_graphs() -> None:
    """Prefill and decode over 12 pairs of batch and length: sizes become symbolic, and no frame is given up."""
    torch._dynamo.reset()
    model = zoo.build_generating("llama")
    original = copy.deepcopy(model)
    cached = cache_name(model) or ""
    reattend.optimize(model, policy=OURS)
    with torch.no_grad():
        for batch in (1, 2, 3, 5):
            for length in (16, 24, 37):
                given = zoo.inputs("llama", pad="none", batch=batch, length=length)
                want = original(**given, use_cache=True)
                got = model(**given, use_cache=True)
                step = {"input_ids": given["input_ids"][:, :1], "attention_mask": torch.ones(batch, length + 1, dtype=torch.long)}
                a = original(**step, **{cached: want[cached]}).logits
                b = model(**step, **{cached: got[cached]}).logits
                assert float((a - b).abs().max() / a.abs().max()) <= 1e-5
    report = reattend.report(model)
    assert report.captures <= 8, str(report)
    assert report.given_up == 0, str(report)
