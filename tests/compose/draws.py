"""A draw: one choice of every part of an attention module, as plain data that repeats, shrinks and prints.

    draw(seed, number)   →   Draw(layout="fused", heads_map="expand", mask="window", …)

Each list of choices has its simplest first: a finding is shrunk by going there, part after part.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

LENGTHS = (5, 1, 2, 3, 7, 8, 16, 17, 31, 33, 48, 64, 65)
SIZES = (8, 1, 2, 3, 4, 7, 12, 15, 16, 17, 20, 24, 32, 33, 40, 48, 64, 65, 80)
LAYOUTS = (
    "bhpe", "bphe", "flat", "pbhe", "projected", "fused", "chunk", "interleaved", "split", "transposed", "strided", "stacked",
    "plane", "pages",
)
# One tensor holds queries, keys and values: as many of each.
SELF = ("fused", "chunk", "interleaved", "stacked", "split")
MODEL = ("projected", "fused", "chunk", "interleaved", "split")
DATA_MASKS = ("padding_bool", "padding_int", "padding_float", "lengths", "documents", "data", "spans")
POSITION_MASKS = (
    "causal", "triu", "positions", "upper_left", "window", "near", "blocks", "prefix", "stride", "per_head", "dilated",
    "reach",
)
MASKS = ("none", *POSITION_MASKS, *DATA_MASKS)
# Keys that a row of a moving window has: its own and those before it.
WINDOW = 5
# How a mask as data lies over batch, heads, queries and keys: a letter is whole, a 1 broadcast.
SPREADS = ("11pm", "b1pm", "1hpm", "bhpm", "b11m", "b1p1", "bhp1", "1h1m", "pm", "1pm")
FORMS = (
    "masked_fill", "masked_fill_", "where", "where_tensor", "added", "added_", "added_data", "arithmetic", "subtracted",
    "logarithm", "multiplied_after", "zeroed_after", "index_put_",
)
SOFTMAX = (
    "softmax", "softmax32", "float", "log_softmax", "logsumexp", "manual", "manual_where", "sdpa", "sink", "sink_log",
    "sink32", "sink_lse", "off_by_one", "temperature",
)
POINTWISE = ("sigmoid", "relu2", "relu_norm", "square_norm", "abs_norm", "linear", "elu", "softplus_norm")
BIASES = (
    "none", "alibi", "alibi_keys", "alibi_constant", "table", "buckets", "swin", "data", "per_head", "padded", "joined",
    "relative", "keyed", "gaussian",
)

CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": ("f32", "bf16", "f16", "f64"),
    "autocast": ("", "bf16", "f16"),
    "grad": ("none", "inputs", "all"),
    "again": (0, 1, 2, 7, 18, 33, 50),
    "batch": (1, 2, 3),
    "kv_heads": (1, 2, 3, 4),
    "group": (1, 2, 3, 4),
    "queries": LENGTHS,
    "keys": (0, *LENGTHS),
    "size": SIZES,
    "value": (0, *SIZES),
    "spread": (1.0, 0.1, 5.0),
    "layout": LAYOUTS,
    "keys_map": ("plain", "cat", "cache", "written", "select", "gathered", "flip", "drop", "pad", "bias_kv", "roll", "index"),
    "heads_map": ("interleave", "expand", "repeat", "index", "index_select", "grouped", "folded", "broadcast"),
    "shape": ("4d", "merged", "moving"),
    "product": ("matmul", "einsum", "bmm", "baddbmm", "mulsum", "reverse", "linear", "weighed", "vecdot"),
    "second": ("matmul", "einsum", "bmm", "mulsum", "reverse", "weighed", "vecdot"),
    "scale": ("after", "divided", "query", "both", "none", "learned_exp", "per_head", "clamped", "inplace"),
    "norm": ("none", "l2", "rms", "layer"),
    "rope": ("none", "half", "pairs"),
    "bias": BIASES,
    "bias_spread": SPREADS,
    "bias_inplace": (False, True),
    "cap": (0.0, 3.0, 30.0),
    "mask": MASKS,
    "second_mask": MASKS,
    "join": ("and", "or"),
    "mask_spread": SPREADS,
    "form": FORMS,
    "fill": ("-inf", "lowest", "-1e9", "-1e4", "-100", "lowest32"),
    "empty": (False, True),
    "row": (*SOFTMAX, *POINTWISE),
    "after": ("none", "dropout", "nan_to_num", "zeroed", "any", "cast"),
    "out": ("bhpf", "merged", "projected", "permuted"),
    "seed": (0,),
}


@dataclass(frozen=True)
class Draw:
    """One composed attention. Sizes in elements; `keys` 0: as many as queries, `value` 0: as large as `size`.

    `again`: queries of a second call, 0 for none. `empty`: masks of data leave some rows without a key.
    """

    dtype: str = "f32"
    autocast: str = ""
    grad: str = "none"
    again: int = 0
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    queries: int = 5
    keys: int = 0
    size: int = 8
    value: int = 0
    spread: float = 1.0
    layout: str = "bhpe"
    keys_map: str = "plain"
    heads_map: str = "interleave"
    shape: str = "4d"
    product: str = "matmul"
    second: str = "matmul"
    scale: str = "after"
    norm: str = "none"
    rope: str = "none"
    bias: str = "none"
    bias_spread: str = "11pm"
    bias_inplace: bool = False
    cap: float = 0.0
    mask: str = "none"
    second_mask: str = "none"
    join: str = "and"
    mask_spread: str = "11pm"
    form: str = "masked_fill"
    fill: str = "-inf"
    empty: bool = False
    row: str = "softmax"
    after: str = "none"
    out: str = "bhpf"
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def f(self) -> int:
        """The size of a value."""
        return self.value or self.size

    def __str__(self) -> str:
        """Its choices that are not the simplest, as text that `read` takes."""
        default = Draw()
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({n: v for n, v in said.items() if v != getattr(default, n)})


def read(text: str) -> Draw:
    return valid(Draw(**json.loads(text)))


def as_data(d: Draw) -> dict[str, object]:
    return asdict(d)


# How often a part keeps its simplest choice: most attentions have few oddities at once.
_PLAIN = {
    "dtype": 0.4, "autocast": 0.9, "grad": 0.7, "again": 0.8, "batch": 0.3, "queries": 0.1, "keys": 0.5, "value": 0.7, "spread": 0.7,
    "layout": 0.25, "keys_map": 0.6, "heads_map": 0.15, "shape": 0.8, "product": 0.5, "second": 0.6, "scale": 0.4, "norm": 0.85,
    "rope": 0.9, "bias": 0.5, "bias_inplace": 0.7, "cap": 0.85, "mask": 0.25, "second_mask": 0.7, "join": 0.7, "form": 0.3, "fill": 0.4,
    "empty": 0.6, "row": 0.35, "after": 0.7, "out": 0.5, "group": 0.5,
}


def draw(seed: int, number: int) -> Draw:
    """The draw of this number; the same for the same seed."""
    r = random.Random(f"{seed}:{number}")
    chosen: dict[str, Any] = {}
    for name, choices in CHOICES.items():
        plain = r.random() < _PLAIN.get(name, 0.0)
        chosen[name] = choices[0] if plain else r.choice(choices)
    chosen["seed"] = r.randrange(1 << 30)
    return valid(Draw(**chosen))


def simpler(d: Draw) -> Iterator[Draw]:
    """Draws with one part made simpler, the simplest first."""
    for f in fields(d):
        choices, now = CHOICES[f.name], getattr(d, f.name)
        for choice in choices[: choices.index(now)] if now in choices else choices:
            part: dict[str, Any] = {f.name: choice}
            other = valid(replace(d, **part))
            if other != d:
                yield other


def shrunk(d: Draw, still: Callable[[Draw], bool], most: int = 120) -> Draw:
    """The simplest draw near this one of which `still` holds, after `most` tries at the most."""
    tried: set[Draw] = {d}
    found = True
    while found:
        found = False
        for other in simpler(d):
            if other in tried or len(tried) > most:
                continue
            tried.add(other)
            if still(other):
                d, found = other, True
                break
    return d


def valid(d: Draw) -> Draw:
    """The nearest draw whose parts go together."""
    while (better := _mended(d)) != d:
        d = better
    return d


def _mended(d: Draw) -> Draw:
    def put(**parts: Any) -> None:
        nonlocal d
        d = replace(d, **parts)

    if d.group == 1:
        put(heads_map="interleave")
    if d.heads_map == "broadcast":
        put(kv_heads=1)
    if d.layout in ("fused", "chunk", "interleaved", "stacked") and d.group != 1:
        put(layout="split")
    if d.layout in SELF:
        put(keys=0, value=0)
    if d.layout == "pages":
        put(keys=max(4, (d.keys or d.queries) // 4 * 4))
    if d.keys == d.queries and d.layout != "pages":
        put(keys=0)
    if d.keys_map == "cache" and d.layout in MODEL:
        put(keys_map="cat")
    if d.keys_map == "drop" and (d.keys or min(d.queries, d.again or d.queries)) < 2:
        put(keys_map="plain")
    if d.value == d.size:
        put(value=0)
    if d.autocast:
        put(dtype="f32")
    if d.rope != "none" and d.size % 2:
        put(rope="none")
    if d.shape == "merged" and d.heads_map in ("grouped", "broadcast"):
        put(heads_map="interleave")
    if d.shape == "merged" and d.row == "sdpa":
        put(shape="4d")
    if d.shape != "merged" and d.product in ("bmm", "baddbmm") and d.heads_map in ("grouped", "broadcast"):
        put(product="matmul")
    if d.second == "bmm" and d.heads_map in ("grouped", "broadcast"):
        put(second="matmul")
    if d.shape == "moving":
        plain = ("matmul", "einsum", "mulsum")
        put(
            keys=0, keys_map="plain", row="softmax" if d.row == "sdpa" else d.row,
            layout="bhpe" if d.layout == "pages" else d.layout,
            product=d.product if d.product in plain else "matmul", second=d.second if d.second in plain else "matmul",
            bias=d.bias if d.bias in ("none", "data", "per_head") else "none",
            heads_map="interleave" if d.heads_map in ("grouped", "folded", "broadcast") else d.heads_map,
        )
    if d.shape == "merged" or d.heads_map in ("grouped", "folded", "broadcast"):
        put(product="einsum" if d.product in ("weighed", "vecdot") else d.product)
        put(second="einsum" if d.second in ("weighed", "vecdot") else d.second)
    if d.heads_map == "folded" and (d.product not in ("matmul", "reverse") or d.second not in ("matmul", "reverse")):
        put(product="matmul", second="matmul")
    if d.shape == "merged" and d.heads_map == "folded":
        put(heads_map="repeat")
    if d.bias == "none" or d.bias not in ("data",):
        put(bias_spread="11pm")
    if d.bias == "none":
        put(bias_inplace=False)
    if d.mask == "none" and d.second_mask != "none":
        put(mask=d.second_mask, second_mask="none")
    if d.mask == d.second_mask:
        put(second_mask="none")
    if d.second_mask == "none":
        put(join="and")
    if "data" not in (d.mask, d.second_mask):
        put(mask_spread="11pm")
    if d.mask == "none":
        put(form="masked_fill", fill="-inf", empty=False)
    if d.mask not in DATA_MASKS and d.second_mask not in DATA_MASKS:
        put(empty=False)
    if d.row in POINTWISE and d.form not in ("masked_fill", "zeroed_after", "masked_fill_"):
        put(form="zeroed_after")
    if d.row in POINTWISE and d.row != "sigmoid":
        put(form="zeroed_after" if d.mask != "none" else "masked_fill")
    if d.row in POINTWISE and d.after in ("nan_to_num",):
        put(after="none")
    if d.form in ("logarithm", "multiplied_after", "zeroed_after"):
        put(fill="-inf")
    if d.form in ("arithmetic", "subtracted") and d.fill == "-inf":
        put(fill="lowest")
    if d.after in ("zeroed", "any") and d.mask == "none":
        put(after="none")
    if d.row == "sdpa":
        put(
            product="matmul", second="matmul", scale="after", cap=0.0, after="none", bias_inplace=False,
            form=d.form if d.form in ("masked_fill", "added", "added_data") else "masked_fill",
        )
        if d.heads_map in ("grouped", "folded", "broadcast"):
            put(heads_map="expand")
    if d.norm != "none" and d.size == 1:
        put(norm="none")
    return d
