"""The main job on a real model: optimise a Mistral-shaped model; print its plan, its speed against the original, its error.

Weights are random; the configuration is Mistral's, made small. `./run demo` runs this; sizes and device are options.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MistralConfig, MistralForCausalLM

import reattend


def build(args: argparse.Namespace, attention: str) -> MistralForCausalLM:
    config = MistralConfig(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=args.layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=4096, max_position_embeddings=max(args.seq, 4096),
        sliding_window=args.window, attn_implementation=attention,
    )
    torch.manual_seed(0)
    return MistralForCausalLM(config).eval().to(args.device, getattr(torch, args.dtype))


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, interleaved, so that a busy moment of the machine hits all of them."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: statistics.median(t) for name, t in taken.items()}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seq", type=int, default=4096, help="tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=256, help="each token sees this many tokens back")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = options()
    tokens = torch.randint(0, 4096, (1, args.seq), device=args.device)
    original = build(args, "sdpa")
    eager = build(args, "eager")
    ours = reattend.optimize(copy.deepcopy(original))

    def forward(model: MistralForCausalLM) -> Callable[[], torch.Tensor]:
        return lambda: model(tokens, use_cache=False).logits

    print(f"Mistral-shaped, {args.layers} layers, 8 heads on 2, window {args.window}, {args.seq} tokens, "
          f"{args.dtype} on {args.device}, {torch.get_num_threads()} threads\n")
    compile_seconds = seconds(forward(ours), args.device)
    print(reattend.report(ours).plan, "\n")

    expected, actual = forward(original)().float(), forward(ours)().float()
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    print(f"error against the original: {error:.1e} of the largest logit\n")

    taken = medians(
        {"original, eager": forward(eager), "original, SDPA": forward(original), "reattend": forward(ours)},
        args.rounds, args.device,
    )
    print(
        f"whole model, median of {args.rounds} interleaved runs (first call, planning included: {compile_seconds:.1f} s)"
    )
    for name, t in taken.items():
        print(f"  {name:16} {t * 1e3:9.1f} ms   {t / taken['reattend']:5.2f}× reattend's time")

    limit = 1e-5 if args.dtype == "float32" else 5e-2
    assert error <= limit, f"the error {error:.1e} is above {limit:.0e}"


if __name__ == "__main__":
    main()
