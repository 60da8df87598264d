"""Planning for a GPU that is not there: an 8-billion-parameter Llama at 128k tokens on an H200, without weights."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

import reattend

CONFIG = Path(__file__).parent / "configs" / "llama-3-8b.json"
TOKENS = 131072


def main() -> None:
    config = AutoConfig.for_model(**json.loads(CONFIG.read_text()))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)

    start = time.perf_counter()
    plan = reattend.plan(model, (tokens,), {"use_cache": False}, target="h200")
    print(plan)
    print(f"planned in {time.perf_counter() - start:.1f} s, capture included")

    assert len(plan.sites) == config.num_hidden_layers
    for site in plan.sites:
        assert {"causal", "gqa"} <= site.traits
        cost = site.chosen.cost
        assert cost is not None
        # Half of the products are masked away: 4·P·M·E FLOP a head, over the lower triangle of tiles.
        whole = 4 * TOKENS**2 * 128 * config.num_attention_heads
        assert 0.45 * whole < cost.flops < 0.6 * whole
        assert cost.bound == "matrix"
    print(f"attention of the whole prefill: {plan.seconds:.2f} s; why: {plan.sites[0].chosen.why}")
    assert reattend.Plan.from_json(plan.to_json()) == plan, "a plan is plain data"


if __name__ == "__main__":
    main()
