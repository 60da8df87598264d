"""Ways of generating text with transformers: caches of every kind, beams, its own compilation, requests in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reattend
from reattend.rewriter.run.bypass import COMPILED

from .ways import AS_WRITTEN, WORKS, llama, optimised, ran, tokens, way, went_round

slow = pytest.mark.slow


def generated(model: Any, **options: Any) -> Any:
    """An optimised copy that generated what the model does."""
    ours = optimised(model)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    given = {"input_ids": tokens(2, 12), "attention_mask": mask, "do_sample": False, "max_new_tokens": 6, **options}
    with torch.no_grad():
        assert torch.equal(ours.generate(**given), model.generate(**given))
    return ours


@way("`generate`, dynamic cache, padded batch", WORKS)
def test_dynamic_cache() -> None:
    assert ran(generated(llama()))


@way("`generate`, static cache", WORKS)
def test_static_cache() -> None:
    assert ran(generated(llama(), cache_implementation="static", disable_compile=True))


@pytest.mark.slow
@way("`generate`, sliding window", WORKS)
def test_sliding_window() -> None:
    assert ran(generated(llama("Mistral", sliding_window=8)))


@way("`generate`, layers with and without a window (hybrid cache)", WORKS, slow)
def test_hybrid_cache() -> None:
    assert ran(generated(llama("Gemma2", sliding_window=8)))


@way("`generate`, beams", WORKS, slow)
def test_beams() -> None:
    assert ran(generated(llama(), num_beams=3))


@way("`generate`, sampling: the same random numbers", WORKS, slow)
def test_sampling() -> None:
    out, model = [], llama()
    ours = optimised(model)
    for m in (ours, model):
        torch.manual_seed(4)
        with torch.no_grad():
            out.append(m.generate(tokens(1, 10), do_sample=True, max_new_tokens=6))
    assert torch.equal(*out)
    assert ran(ours)


@way("`generate`, its own compiled step (`CompileConfig`)", AS_WRITTEN, slow)
@pytest.mark.filterwarnings("ignore:reattend")
def test_compiled_step() -> None:
    """The prompt goes through us, the compiled steps do not."""
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    ours = generated(llama(), cache_implementation="static", compile_config=config)
    assert ran(ours)
    assert went_round(ours, COMPILED)


@way("continuous batching (`generate_batch`)", AS_WRITTEN, slow)
def test_continuous_batching() -> None:
    pytest.importorskip("psutil")
    model = llama()
    ours = optimised(model)
    prompts = [tokens(6).tolist(), tokens(9).tolist()]
    got, want = (m.generate_batch(prompts, max_new_tokens=4) for m in (ours, model))
    assert [x.generated_tokens for x in got.values()] == [x.generated_tokens for x in want.values()]
    assert "runs as written" in str(reattend.report(ours))
