"""Steps of training with dropout on the attention's weights: the model as it is, and `Policy(dropout="own")`, on this CPU.

    python benchmarks/dropout.py [--length 1024] [--dtypes f32,bf16] [--steps 40] [--rounds 7] [--threads 1]

Models of two layers from configurations of transformers (GPT-2 and BERT, eager and SDPA, width 256, 4 heads, rate 0.1),
random weights. A step is forward and backward, in turn, counted in processor time; medians and their ratio. Beside it the
loss of both after so many steps of AdamW from one start, over four seeds: other elements are dropped, as many of them.
Writes benchmarks/results/dropout_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import timing
import torch
from torch import Tensor, nn

import reattend

KINDS = {"f32": torch.float32, "bf16": torch.bfloat16}
RATE, WORDS, WIDTH, LAYERS, HEADS = 0.1, 500, 256, 2, 4
WARM, SEEDS = 8, 4


def models(attention: str) -> Mapping[str, nn.Module]:
    """Small models whose attention drops weights while they train."""
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    gpt = GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=8192, vocab_size=WORDS, attn_pdrop=RATE,
                     attn_implementation=attention, **ends)
    bert = BertConfig(num_hidden_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=HEADS, vocab_size=WORDS,
                      intermediate_size=4 * WIDTH, max_position_embeddings=8192, attention_probs_dropout_prob=RATE,
                      attn_implementation=attention)
    return {"GPT-2": GPT2LMHeadModel(gpt), "BERT": BertForMaskedLM(bert)}


def step(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return run


def trained(model: nn.Module, ids: Tensor, steps: int, seed: int) -> float:
    """The mean loss of the last steps."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    run, losses = step(model, ids), []
    for _ in range(steps):
        losses.append(float(run()))
        optimizer.step()
    return statistics.mean(losses[-max(steps // 4, 1) :])


def row(name: str, attention: str, dtype: str, given: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    own = models(attention)[name].to(KINDS[dtype]).train()
    ids = torch.randint(0, WORDS, (1, given.length))

    def ours() -> nn.Module:
        torch._dynamo.reset()
        return reattend.optimize(copy.deepcopy(own), policy=reattend.Policy(dropout="own"))

    counted = ours()
    calls = {"own": step(own, ids), "reattend": step(counted, ids)}
    for _ in range(WARM):
        calls["reattend"]()
    calls["own"]()
    spent: dict[str, list[float]] = {x: [] for x in calls}
    for _ in range(given.rounds):
        for x, call in calls.items():
            start = time.process_time()
            call()
            spent[x].append(time.process_time() - start)
    ms = {x: statistics.median(t) * 1e3 for x, t in spent.items()}
    kernels = sorted({s.kernel for s in reattend.report(counted).sites})
    losses = {
        "own": [trained(copy.deepcopy(own), ids, given.steps, seed) for seed in range(SEEDS)],
        "reattend": [trained(ours(), ids, given.steps, seed) for seed in range(SEEDS)],
    }
    spread = {x: f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for x, v in losses.items()}
    print(
        f"{name:5} {attention:5} {dtype:4}  own {ms['own']:7.1f} ms  reattend {ms['reattend']:7.1f} ms  "
        f"{ms['own'] / ms['reattend']:.2f}×  loss {spread['reattend']}, own {spread['own']}  "
        f"{', '.join(kernels)}",
        flush=True,
    )
    return {"model": name, "attention": attention, "dtype": dtype, "length": given.length, "milliseconds": ms,
            "kernels": kernels, "losses": losses, "steps": given.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtypes", default="f32,bf16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    print(f"{timing.processor()}, torch {torch.__version__}, {given.length} tokens, {given.threads} thread(s)")
    rows = [
        row(name, attention, dtype, given)
        for dtype in given.dtypes.split(",") for attention in ("eager", "sdpa") for name in ("GPT-2", "BERT")
    ]
    print(f"written to {timing.write('dropout_cpu', rows, rounds=given.rounds)}")


if __name__ == "__main__":
    main()
