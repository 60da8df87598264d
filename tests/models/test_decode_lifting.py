"""Decoding with caches, eager sizes and then symbolic ones: every step's attention equals its cascade."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import fx

from reattend.patterns.evaluate import evaluate
from reattend.rewriter.capture.capture import from_dynamo
from reattend.rewriter.capture.models import cache_name
from reattend.rewriter.find import detect

from ..rewriter.helpers import recorded
from . import zoo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache"),
    [(n, c) for n in ("llama", "gpt2", "mistral", "gemma2") for c in ("dynamic", "static")],
)
def test_each_step_of_a_decode(name: str, cache: str) -> None:
    torch._dynamo.reset()
    # of llama one layer: the second is the same
    layers = 1 if name == "llama" else 2
    model = zoo.build(name, layers=layers)
    errors: list[float] = []

    def compare(gm: fx.GraphModule, example: list[Any]) -> Any:
        captured = from_dynamo(gm, example).graph
        found, _ = detect.find(captured)

        def run(*args: Any) -> Any:
            out, values = recorded(captured, args)
            for f in found:
                sizes = {k: values[v] for k, v in f.scalars.items()}
                got = evaluate(f.cascade, {k: values[v] for k, v in f.tensors.items()}, sizes)[f.cascade.outputs[0]]
                want = values[f.output].reshape(got.shape)
                errors.append(float((got - want).abs().max() / want.abs().max()))
            return out

        return run

    compiled: Any = torch.compile(model, backend=compare)
    cached = cache_name(model) or ""
    steps = 0
    with torch.no_grad():
        for length in (24, 17):
            given = zoo.inputs(name, length=length, pad="left")
            past: Any = (
                transformers.DynamicCache(config=model.config)
                if cache == "dynamic"
                else transformers.StaticCache(config=model.config, max_cache_len=64)
            )
            compiled(**given, **{cached: past}, use_cache=True)
            mask = given["attention_mask"]
            for _ in range(2):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                token = torch.full((2, 1), 5)
                compiled(input_ids=token, attention_mask=mask, **{cached: past}, use_cache=True)
            steps += 3
    assert len(errors) == layers * steps
    assert max(errors) <= 1e-5
