"""Models that select keys themselves, or carry a state, as their own code computes it on this CPU and as we do.

    python benchmarks/own_sparsity.py [--models dsa,msa] [--lengths 512,2048] [--cached 2048] [--threads 1] [--rounds 5]

One decoder layer of transformers with random weights: `dsa` DeepSeek-V3.2's attention (16 heads of 32 + 16, latents of 128,
8 index heads, 64 keys a row: the published widths cut by 8, 4 and 32), `msa` MiniMax-M3's (16 heads over 2, 4 blocks of 32
keys), each by `eager`, with a feed-forward of 32; `alone` is its attention module by itself, in decoding. `mamba` is one
layer of Mamba with 512 channels of 16 numbers, prefill alone (matrix states: benchmarks/scans.py). One process,
both in turn, medians of processor time (with one thread);
the first call, with what is captured and checked, is made before and not counted. Writes
benchmarks/results/own_sparsity_cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import timing
import torch
import transformers
from torch import Tensor

import reattend

COMMON = {
    "hidden_size": 512, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 16, "vocab_size": 128,
    "max_position_embeddings": 1 << 15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dsa": ("deepseek_v32", {
        "num_key_value_heads": 16, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 32, "index_topk": 64, "index_n_heads": 8, "index_head_dim": 32, "first_k_dense_replace": 1,
        "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    }),
    "msa": ("minimax_m3_vl_text", {
        "num_key_value_heads": 2, "head_dim": 32, "rotary_dim": 16, "dense_intermediate_size": 32, "index_n_heads": 2,
        "index_head_dim": 32, "index_block_size": 32, "index_topk_blocks": 4, "mlp_layer_types": ["dense"],
        "layer_types": ["minimax_m3_sparse"], "num_local_experts": 2, "num_experts_per_tok": 1,
    }),
    # 512 channels, by the token loop that it runs eagerly; its associative scan is traced in a graph alone
    "mamba": ("mamba", {
        "hidden_size": 256, "state_size": 16, "expand": 2, "intermediate_size": 512, "use_mambapy": False,
        "use_associative_scan": False,
    }),
}
# Those whose decoding is one step of the same code, which is none of a loop.
PREFILLED = frozenset(("mamba",))


def model(kind: str) -> torch.nn.Module:
    name, more = MODELS[kind]
    config = transformers.AutoConfig.for_model(name, **{**COMMON, **more}, attn_implementation="eager")
    torch.manual_seed(0)
    made: torch.nn.Module = transformers.AutoModel.from_config(config)
    return made.eval()


def prefill(m: torch.nn.Module, length: int) -> Callable[[], Tensor]:
    x = torch.randn(1, length, m.config.hidden_size, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, arg-type]
    return lambda: m(inputs_embeds=x, use_cache=False).last_hidden_state


def cache_of(m: torch.nn.Module, length: int) -> Any:
    """The cache after so many tokens, a few hundred at a time: all scores of 16 Ki tokens would be 17 GB."""
    x = torch.randn(1, length, 512, generator=torch.Generator().manual_seed(1))
    cache = None
    for part in x.split(512, 1):
        cache = m(inputs_embeds=part, past_key_values=cache, use_cache=True).past_key_values
    return cache


def decode(m: torch.nn.Module, filled: Any) -> Callable[[], Tensor]:
    """One token after a cache, which stays as it was: each call gets a copy, made outside of the clock."""
    x = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(2))
    cache: list[Any] = []

    def call() -> Tensor:
        out: Tensor = m(inputs_embeds=x, past_key_values=cache.pop(), use_cache=True).last_hidden_state
        return out

    call.prepare = lambda: cache.append(copy.deepcopy(filled))  # type: ignore[attr-defined]
    return call


class Output(torch.nn.Module):
    """A module's first output: nobody reads its weights."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **given: Any) -> Tensor:
        out: Tensor = self.inner(*args, **given)[0]
        return out


def alone(m: torch.nn.Module, filled: Any) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], Callable[[], Tensor]]]:
    """The attention module of a model, and what calls it, or what it became, as `decode` calls the model."""
    module = m.layers[0].self_attn  # type: ignore[index, union-attr]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    call = decode(m, filled)
    call.prepare()  # type: ignore[attr-defined]
    call()
    hook.remove()
    ((args, given),) = seen
    name = next(k for k, x in given.items() if hasattr(x, "get_seq_length"))

    def of(made: torch.nn.Module) -> Callable[[], Tensor]:
        cache: list[Any] = []

        def call() -> Tensor:
            out: Tensor = made(*args, **{**given, name: cache.pop()})
            return out

        call.prepare = lambda: cache.append(copy.deepcopy(filled))  # type: ignore[attr-defined]
        return call

    return Output(module).eval(), of


def compared(calls: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], float]:
    """Median milliseconds of each, in turn, and the largest difference over the largest value."""
    first = {}
    for name, call in calls.items():
        for _ in range(3):
            getattr(call, "prepare", lambda: None)()
            first[name] = call()
    a, b = first.values()
    off = float((a - b).abs().max() / a.abs().max())
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            getattr(call, "prepare", lambda: None)()
            start = time.process_time()
            call()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(x) * 1e3 for name, x in spent.items()}, off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--cached", default="2048")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for kind in given.models.split(","):
        own = model(kind)
        for length in map(int, filter(None, given.lengths.split(","))):
            ours = reattend.optimize(copy.deepcopy(own), policy=reattend.Policy(tune=False))
            calls = {"original": prefill(own, length), "reattend": prefill(ours, length)}
            rows.append(row(kind, "prefill", length, *compared(calls, given.rounds), ours))
        for length in () if kind in PREFILLED else map(int, filter(None, given.cached.split(","))):
            ours = reattend.optimize(copy.deepcopy(own), policy=reattend.Policy(tune=False))
            filled = cache_of(own, length)
            calls = {"original": decode(own, filled), "reattend": decode(ours, filled)}
            rows.append(row(kind, "decode", length, *compared(calls, 4 * given.rounds), ours))
            module, of = alone(own, filled)
            ours = reattend.optimize(copy.deepcopy(module), policy=reattend.Policy(tune=False))
            calls = {"original": of(module), "reattend": of(ours)}
            rows.append(row(kind, "alone", length, *compared(calls, 4 * given.rounds), ours))
    print(f"written to {timing.write('own_sparsity_cpu', rows, rounds=given.rounds, transformers=transformers.__version__)}")


def row(kind: str, phase: str, length: int, ms: dict[str, float], off: float, ours: torch.nn.Module) -> dict[str, Any]:
    sites = [f"{s.kind} {s.choice} {s.chosen.why.partition(';')[0]}" for s in reattend.report(ours).plan.sites]
    out = {"model": kind, "phase": phase, "length": length, "milliseconds": ms, "difference": off, "sites": sites}
    ratio = ms["original"] / ms["reattend"]
    times = "  ".join(f"{name} {x:.2f} ms" for name, x in ms.items())
    print(f"{kind} {phase:7} {length:6}  {times}  {ratio:5.2f}×  off {off:.1e}  {', '.join(sites)}", flush=True)
    return {**out, "ratio": ratio}


if __name__ == "__main__":
    main()
