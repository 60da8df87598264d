"""The door of transformers beside eager attention, SDPA and `optimize`: CPU time of a window, of first calls and of steps.

    python benchmarks/doors.py [window] [first] [step] [--rounds 5]

window    a Mistral-shaped model with a window of 256, at 2048 and 4096 tokens: milliseconds of a call
first     the first call of tiny models in a process of its own, on kernels that are compiled already: seconds
step      one token of a four-layer Llama-shaped model behind a growing cache: milliseconds

One thread, CPU time of this process, the least of some rounds (of steps: the median), ways in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

WINDOW: Mapping[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000, "sliding_window": 256, "head_dim": 64, "max_position_embeddings": 8192,
}
STEP: Mapping[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000, "head_dim": 64,
}
TINY: Mapping[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "pad_token_id": 0,
}
FIRST: Mapping[str, Mapping[str, Any]] = {
    "llama": TINY, "mistral": {**TINY, "sliding_window": 8}, "gemma2": {**TINY, "head_dim": 16, "sliding_window": 8},
    "gpt_oss": {**TINY, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "dropout_rate": 0.0},
}


def build(name: str, settings: Mapping[str, Any], attention: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(name, **settings), attn_implementation=attention)
    return model.eval().requires_grad_(False)


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def window(rounds: int) -> None:
    import torch

    import reattend

    ways = {"sdpa": build("mistral", WINDOW, "sdpa"), "door": build("mistral", WINDOW, "reattend")}
    ways["optimize"] = reattend.optimize(build("mistral", WINDOW, "sdpa"))
    for tokens in (2048, 4096):
        ids = torch.randint(0, 1000, (1, tokens))
        for m in ways.values():
            m(ids)
        turns = [{way: cpu_seconds(lambda m=m, ids=ids: m(ids)) for way, m in ways.items()} for _ in range(rounds)]
        best = {way: 1e3 * min(t[way] for t in turns) for way in ways}
        print(f"window, {tokens} tokens: " + ", ".join(f"{way} {ms:.1f} ms" for way, ms in best.items()))


def one_first(name: str) -> dict[str, float]:
    """CPU seconds of the first and of the second call, and how many kinds of attention the model has."""
    import torch

    import reattend

    eager, door = (build(name, FIRST[name], way) for way in ("eager", "reattend"))
    given = {"input_ids": torch.randint(3, 120, (2, 24)), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    given["attention_mask"][0, :5] = 0
    if name == "t5":
        given["decoder_input_ids"] = given["input_ids"][:, :7]
    # what any first call of a process pays
    eager(**given)
    calls = [cpu_seconds(lambda: door(**given)) for _ in range(2)]
    return {"first": calls[0], "second": calls[1], "kinds": sum(p.capture_seconds > 0 for p in reattend.report(door).pieces)}


def first(rounds: int) -> None:
    for name in FIRST:
        command = [sys.executable, __file__, "--one", name]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds + 1)]
        # the first run compiles
        found = [json.loads(r.stdout.splitlines()[-1]) for r in runs[1:]]
        least = min(f["first"] for f in found)
        print(f"first call, {name}: {least:.2f} s of CPU, {found[0]['kinds']:.0f} kinds of attention")


def step(rounds: int) -> None:
    import torch

    ways = {way: build("llama", STEP, way) for way in ("eager", "sdpa", "reattend")}
    ids = torch.randint(0, 1000, (1, 100))
    for turn in range(rounds):
        medians = {}
        for way, m in ways.items():
            cache = m(ids, use_cache=True).past_key_values
            times = [cpu_seconds(lambda m=m, c=cache: m(ids[:, -1:], past_key_values=c, use_cache=True)) for _ in range(60)]
            medians[way] = 1e3 * statistics.median(times)
        print(f"step, turn {turn + 1}: " + ", ".join(f"{way} {ms:.2f} ms" for way, ms in medians.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="window | first | step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=list(FIRST), help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch
    import transformers

    import reattend

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    reattend.register()
    if options.one:
        print(json.dumps(one_first(options.one)))
        return
    for name, run in (("window", window), ("first", first), ("step", step)):
        if not options.what or name in options.what:
            run(options.rounds)


if __name__ == "__main__":
    main()
