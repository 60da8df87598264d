"""Never slower: real models at real lengths and widths, as rewritten and as written, CPU time in turn.

    python benchmarks/never_slower.py [--only bert gpt2 …] [--tokens 512 1024] [--inductor] [--resume] [--rounds 7]

Models have the widths that their configurations have by default and one or two layers, random weights, and one thread. A
cell is a process of its own with a time box, forked from one that has imported everything. Both ways are called until
whatever is timed at run time has been (`WARM` calls), then in rounds of written, rewritten, written: the ratio of a
round is rewritten over the mean of both written ones, its A/A ratio one of them over the other. A cell whose median of
these, or whose ratio of least times, is above `LIMIT` is timed again with five times the rounds, and fails where both are.

With --inductor it is torch.compile(backend="reattend") over torch.compile(). Prints a table, writes JSON as cells end: cells
of the file that are not timed now stay, and --resume times none that is there. Exit code 1 where a cell failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from models import _LAYERS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from timing import RESULTS, processor
from torch import Tensor, nn

LIMIT = 1.03
# Calls before the first that counts: all that is timed at run time is over by then.
WARM = 22
MORE = 5
Row = dict[str, Any]
# A way to run a model and a length → a call.
Called = Callable[[Any, int], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """A model by name, and how it is called at a length. `lengths` are its own where it takes no other."""

    name: str
    build: Callable[[], nn.Module]
    called: Called
    lengths: tuple[int, ...] = ()


def on(*given: Tensor, **named: Any) -> Callable[[Any], Callable[[], object]]:
    return lambda way: lambda: way(*given, **named)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- transformers ---------------------------------------------------------------------------------------------------


def _config(kind: str, layers: int, settings: Mapping[str, Any]) -> Any:
    import transformers

    config = transformers.CONFIG_MAPPING[kind]()
    few = {n: layers for n in _LAYERS if isinstance(getattr(config, n, None), int)}
    changed = {**few, "vocab_size": 1024, "pad_token_id": 0, **settings}
    return transformers.CONFIG_MAPPING[kind](**{n: x for n, x in changed.items() if hasattr(config, n) or n in settings})


def _transformer(kind: str, layers: int, settings: Mapping[str, Any], attn: str) -> nn.Module:
    import transformers

    config = _config(kind, layers, settings)
    try:
        return transformers.AutoModel.from_config(config, attn_implementation=attn)
    except ValueError:
        return transformers.AutoModel.from_config(config)


def _ids(tokens: int) -> Tensor:
    return torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(1))


def _text(way: Any, tokens: int) -> Callable[[], object]:
    config, given = way.config, {"input_ids": _ids(tokens)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = _ids(tokens // 4)
    return on(**given, **({"use_cache": False} if hasattr(config, "use_cache") else {}))(way)


def _step(way: Any, tokens: int) -> Callable[[], object]:
    """A decoding step behind so many tokens: what it adds to the cache is cut off again."""
    cache = way(input_ids=_ids(tokens), use_cache=True).past_key_values
    token = _ids(1)

    def step() -> object:
        out = way(input_ids=token, past_key_values=cache, use_cache=True)
        # a negative number is how many to take off
        cache.crop(-1)
        return out

    return step


def _audio(way: Any, frames: int) -> Callable[[], object]:
    return on(numbers(1, 320 * frames + 80))(way)


def _heard(way: Any, tokens: int) -> Callable[[], object]:
    shape = (1, way.config.num_mel_bins, 2 * way.config.max_source_positions)
    return on(numbers(*shape), decoder_input_ids=_ids(tokens), use_cache=False)(way)


def _picture(way: Any, side: int) -> Callable[[], object]:
    return on(numbers(1, 3, side, side))(way)


# Kind, layers, settings beside its own. One layer where two are alike.
_TEXTS: Mapping[str, tuple[str, int, Mapping[str, Any]]] = {
    "gpt2": ("gpt2", 2, {}), "bert": ("bert", 2, {"max_position_embeddings": 4096}),
    "llama": ("llama", 1, {
        "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}),
    "mistral, window 256": ("mistral", 1, {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
        "sliding_window": 256, "head_dim": 64}),
    "gemma2": ("gemma2", 2, {"hidden_size": 1024, "intermediate_size": 4096, "sliding_window": 256}),
    "t5": ("t5", 1, {}), "bart": ("bart", 1, {"d_model": 768, "max_position_embeddings": 4096}),
    "deberta": ("deberta", 1, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 4096}),
    "deberta-v2": ("deberta-v2", 1, {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"], "position_buckets": 256, "share_att_key": True, "max_position_embeddings": 4096}),
    "xlnet": ("xlnet", 1, {"d_model": 768, "n_head": 12, "d_inner": 3072}),
    "bloom": ("bloom", 1, {"hidden_size": 1024, "n_head": 16}), "mpt": ("mpt", 1, {"d_model": 1024, "n_heads": 16}),
    "modernbert": ("modernbert", 2, {}), "roformer": ("roformer", 1, {"max_position_embeddings": 4096}),
    "esm": ("esm", 1, {"hidden_size": 640, "num_attention_heads": 20, "intermediate_size": 2560,
                       "position_embedding_type": "rotary", "max_position_embeddings": 4096}),
    "nystromformer": ("nystromformer", 1, {"max_position_embeddings": 4096, "segment_means_seq_len": 512}),
    "gpt_neox": ("gpt_neox", 1, {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}),
}


def transformers_cases(attn: str) -> Iterator[Case]:
    for name, (kind, layers, settings) in _TEXTS.items():
        yield Case(name, partial(_transformer, kind, layers, settings, attn), _text)
    toy = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    for name, (kind, layers, settings) in {"toy": ("llama", 4, toy), **{n: _TEXTS[n] for n in ("llama", "gpt2")}}.items():
        lengths = {"toy": (100,), "llama": (512, 2048), "gpt2": (512,)}[name]
        yield Case(f"{name}, one token", partial(_transformer, kind, layers, settings, attn), _step, lengths)
    conformer = {"position_embeddings_type": "relative"}
    yield Case("conformer", partial(_transformer, "wav2vec2-conformer", 1, conformer, attn), _audio, (499, 999))
    yield Case("whisper", partial(_transformer, "whisper", 1, {}, attn), _heard, (64,))
    for kind, side in (("vit", 224), ("swin", 224), ("sam_vision_model", 1024)):
        yield Case(kind, partial(_transformer, kind, 2, {}, attn), _picture, (side,))


# --- pictures, and what no library has ------------------------------------------------------------------------------


def _timm(name: str, settings: Mapping[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **settings)
    return model


_TIMM: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "samvit_base_patch16": (512, {"img_size": 512, "depth": 3, "global_attn_indexes": (2,)}),
    "samvit_base_patch16_224": (224, {"depth": 2}),
    "xcit_nano_12_p16_224": (224, {"depth": 2}), "davit_tiny": (224, {"depths": (1, 1, 2, 1)}),
    "swin_tiny_patch4_window7_224": (224, {"depths": (2, 2, 2, 2)}),
    "swinv2_tiny_window8_256": (256, {"depths": (2, 2, 2, 2)}),
    "vit_relpos_small_patch16_224": (224, {"depth": 2}), "beit_base_patch16_224": (224, {"depth": 2}),
    "maxvit_tiny_tf_224": (224, {}), "coat_lite_tiny": (224, {}), "cait_xxs24_224": (224, {"depth": 2}),
    "levit_128s": (224, {}), "mvitv2_tiny": (224, {}), "halonet26t": (256, {}), "botnet26t_256": (256, {}),
    "volo_d1_224": (224, {}), "twins_svt_small": (224, {}), "pvt_v2_b0": (224, {}),
}


class CrossShaped(nn.Module):
    """CSWin's attention: half of the heads in stripes of rows, half in stripes of columns; values' neighbours added."""

    def __init__(self, width: int = 128, heads: int = 4, stripe: int = 4) -> None:
        super().__init__()
        self.heads, self.stripe = heads // 2, stripe
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.near = nn.ModuleList(nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        halves = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(-2)
        return x + self.out(torch.cat([self._stripes(y, d) for d, y in enumerate(halves)], -1))

    def _stripes(self, qkv: Tensor, dim: int) -> Tensor:
        """[b, rows, columns, 3, e]: attention inside stripes that are `stripe` wide along one dimension."""
        b, n, m, _, e = qkv.shape
        high, wide = (self.stripe, m) if dim == 0 else (n, self.stripe)
        q, k, v = (self._windows(t, high, wide) for t in qkv.unbind(3))
        near = self.near[dim](v.reshape(-1, high, wide, e).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(v.shape)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
        out = (weights @ v).transpose(1, 2).flatten(2) + near
        return out.view(b, n // high, m // wide, high, wide, e).transpose(2, 3).reshape(b, n, m, e)

    @staticmethod
    def _windows(x: Tensor, high: int, wide: int) -> Tensor:
        b, n, m, e = x.shape
        return x.view(b, n // high, high, m // wide, wide, e).transpose(2, 3).reshape(-1, high * wide, e)


class Agents(nn.Module):
    """Agent attention: few agents, pooled of the queries, gather from all keys, and all queries from them."""

    def __init__(self, width: int = 192, heads: int = 6, agents: int = 7) -> None:
        super().__init__()
        self.heads, self.agents = heads, agents
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, m, e = x.shape
        q, k, v = (t.view(b, n * m, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        pooled = nn.functional.adaptive_avg_pool2d(q.reshape(b * self.heads, n, m, -1).permute(0, 3, 1, 2), self.agents)
        a, scale = pooled.flatten(2).mT.unflatten(0, (b, self.heads)), q.shape[-1] ** -0.5
        gathered = (a * scale @ k.mT).softmax(-1) @ v
        out = (q * scale @ a.mT).softmax(-1) @ gathered
        return x + self.out(out.transpose(1, 2).reshape(b, n, m, e))


class Recurrence(nn.Module):
    """Transformer-XL's attention: keys of the stretch before, positions by a shifted product, u and v added to queries."""

    def __init__(self, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.r, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.u, self.v = (nn.Parameter(torch.randn(heads, width // heads) * 0.1) for _ in range(2))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        b, n, e = x.shape
        k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.kv(torch.cat([before, x], 1)).chunk(2, -1))
        m, q = k.shape[1], self.q(x).unflatten(-1, (self.heads, -1))
        rates = 1 / 10000 ** (torch.arange(0, e, 2, device=x.device) / e)
        angles = torch.arange(m - 1, -1, -1, device=x.device)[:, None] * rates
        r = self.r(torch.cat([angles.sin(), angles.cos()], -1)).unflatten(-1, (self.heads, -1))
        near = torch.einsum("bphe,mhe->bhpm", q + self.v, r)
        near = nn.functional.pad(near, (1, 0)).view(b, self.heads, m + 1, n)[:, :, 1:].view(b, self.heads, n, m)
        scores = (torch.einsum("bphe,bmhe->bhpm", q + self.u, k) + near) * (e // self.heads) ** -0.5
        hidden = torch.ones(n, m, dtype=torch.bool, device=x.device).triu(1 + m - n)
        weights = scores.masked_fill(hidden, -1e30).softmax(-1)
        return x + self.out(torch.einsum("bhpm,bmhe->bphe", weights, v).reshape(b, n, e))


def _plane(width: int) -> Called:
    return lambda way, side: on(numbers(1, side, side, width))(way)


def _stretches(way: Any, tokens: int) -> Callable[[], object]:
    return on(*numbers(2, 1, tokens, 512))(way)


def pictures_and_others() -> Iterator[Case]:
    yield Case("CSWin", CrossShaped, _plane(128), (32, 64))
    yield Case("agent attention", Agents, _plane(192), (28, 56))
    yield Case("Transformer-XL", Recurrence, _stretches, (256, 512))
    for name, (side, settings) in _TIMM.items():
        yield Case(f"timm {name}", partial(_timm, name, settings), _picture, (side,))


# --- timing ---------------------------------------------------------------------------------------------------------


def measured(written: Callable[[], object], rewritten: Callable[[], object], rounds: int) -> Row:
    """Ratios of rounds of written, rewritten, written."""
    taken = []
    for i in range(rounds):
        first, ours, again = (seconds(f) for f in (written, rewritten, written))
        # every second round counts the other way round
        taken.append((first, ours, again) if i % 2 == 0 else (again, ours, first))
    ratios = [2 * ours / (a + b) for a, ours, b in taken]
    noise, end = sorted(b / a for a, _, b in taken), rounds // 8
    least = min(min(a, b) for a, _, b in taken)
    return {
        "ratio": statistics.median(ratios), "least_ratio": min(t[1] for t in taken) / least,
        "aa": statistics.median(noise), "aa_spread": noise[-1 - end] / noise[end],
        "written_ms": 1e3 * statistics.median(t[0] for t in taken), "rounds": rounds,
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def is_slower(row: Row) -> bool:
    """By the median of rounds and by the least times: noise moves either, and hardly both."""
    return min(row["ratio"], row["least_ratio"]) > LIMIT


def timed(case: Case, length: int, options: argparse.Namespace) -> Row:
    """One cell: both ways warm, timed in turn, and again where the first rounds say slower."""
    import reattend
    from reattend import backend

    torch.manual_seed(0)
    model = case.build().eval().requires_grad_(False)
    other = copy.deepcopy(model)
    written: Any = torch.compile(other) if options.inductor else other
    rewritten: Any = torch.compile(model, backend=backend.reattend) if options.inductor else reattend.optimize(model)
    with torch.no_grad():
        ways = case.called(written, length), case.called(rewritten, length)
        for way, calls in zip(ways, (2, 3 if options.inductor else WARM), strict=True):
            for _ in range(calls):
                way()
        row = measured(*ways, options.rounds)
        if max(row["ratio"], row["least_ratio"]) > LIMIT:
            row = measured(*ways, MORE * options.rounds) | {"at_first": row["ratio"]}
    report = reattend.report(rewritten)
    return row | {
        "slower": is_slower(row), "kernels": dict(Counter(s.choice for p in report.pieces for s in p.sites)),
        "as_written": report.as_written, "lost": len(report.slower), "errors": [p.error for p in report.pieces if p.error],
        "differ": [c.why for c in report.checks if not c.ok],
    }


def cell(case: Case, length: int, options: argparse.Namespace) -> Row:
    """A cell in a forked process; what it said until its time box ended."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_said, args=(there, case, length, options))
    process.start()
    there.close()
    row: Row = {"model": case.name, "length": length}
    try:
        row |= here.recv() if here.poll(options.box) else {"error": f"not done within {options.box:.0f} s"}
    except EOFError:
        row["error"] = "the process died"
    process.kill()
    process.join()
    return row


def _said(to: Connection, case: Case, length: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    try:
        to.send(timed(case, length, options))
    except Exception as error:
        to.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


# --- the table ------------------------------------------------------------------------------------------------------


def shown(rows: list[Row]) -> Table:
    """A line a cell, the slowest first."""
    table = Table(title="rewritten over written, CPU time")
    for column in ("model", "length", "written ms", "ratio", "of least", "A/A", "spread", "rounds", "kernels", "as written"):
        table.add_column(column, justify="left" if column in ("model", "kernels") else "right")
    for r in sorted(rows, key=lambda r: -r.get("ratio", 0.0)):
        if "error" in r:
            table.add_row(r["model"], str(r["length"]), *[""] * 6, r["error"])
            continue
        ratio = f"{r['ratio']:.3f}{' slower' if r['slower'] else ''}"
        kernels = ", ".join(f"{k} {n}×" for k, n in r["kernels"].items())
        figures = (f"{r['written_ms']:.1f}", ratio, f"{r['least_ratio']:.3f}", f"{r['aa']:.3f}", f"{r['aa_spread']:.2f}")
        table.add_row(r["model"], str(r["length"]), *figures, str(r["rounds"]), kernels, str(r["as_written"]))
    return table


def write(path: Path, rows: list[Row], options: argparse.Namespace) -> None:
    head = {
        "processor": processor(), "threads": 1, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "beside": "Inductor" if options.inductor else "the model as written", "attn": options.attn, "limit": LIMIT,
    }
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="models by the beginnings of their names (all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048], help="lengths of texts")
    parser.add_argument("--attn", default="eager", choices=("eager", "sdpa"), help="how transformers' models attend")
    parser.add_argument("--inductor", action="store_true", help="beside torch.compile() instead of the model as written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--box", type=float, default=600.0, help="seconds that a cell may take")
    parser.add_argument("--resume", action="store_true", help="leave the cells that are in the file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import transformers

    import reattend.rewriter.run.session  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    path: Path = options.out or RESULTS / f"never_slower_{'inductor' if options.inductor else 'cpu'}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    cases = [*transformers_cases(options.attn), *pictures_and_others()]
    wanted = [c for c in cases if not options.only or any(c.name.startswith(n) for n in options.only)]
    cells = [(c, n) for c in wanted for n in c.lengths or options.tokens]
    done = {(r["model"], r["length"]) for r in rows}
    if options.resume:
        cells = [(c, n) for c, n in cells if (c.name, n) not in done]
    # cells that are not timed now stay
    again = {(c.name, n) for c, n in cells}
    rows = [r for r in rows if (r["model"], r["length"]) not in again]
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(cells))
        for case, length in cells:
            bar.update(task, description=f"{case.name} {length}")
            rows.append(cell(case, length, options))
            write(path, rows, options)
            bar.advance(task)
    console.print(shown(rows))
    return int(any(r.get("slower") or "error" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
