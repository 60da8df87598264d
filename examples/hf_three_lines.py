"""A Hugging Face model in three lines: build it, optimise it, use it as before. Its tokens do not change."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM

import reattend

CONFIG = MistralConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=1000, sliding_window=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)


def left_padded_batch() -> dict[str, torch.Tensor]:
    """Two prompts of 1500 and 1100 tokens, the shorter one padded on the left."""
    tokens = torch.randint(3, 1000, (2, 1500))
    keep = torch.ones_like(tokens)
    keep[1, :400] = 0
    return {"input_ids": tokens.masked_fill(keep == 0, 0), "attention_mask": keep}


def main() -> None:
    torch.manual_seed(0)
    batch = left_padded_batch()
    model = MistralForCausalLM(CONFIG).eval()
    before = model.generate(**batch, max_new_tokens=16, do_sample=False)

    model = reattend.optimize(model)
    after = model.generate(**batch, max_new_tokens=16, do_sample=False)

    report = reattend.report(model)
    print(report)
    ran = {name: n for name, n in report.kernels.items() if name != "original"}
    assert ran, "attention ran on another kernel than the model's own"
    assert report.given_up == 0
    assert torch.equal(before, after), "the optimised model generates the same tokens"

    model = reattend.restore(model)
    assert torch.equal(before, model.generate(**batch, max_new_tokens=16, do_sample=False))


if __name__ == "__main__":
    main()
