"""Prints the CPU kernel whose tiles are computed by torch's own SDPA on slices of the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..patterns import expr as ex
from ..patterns.expr import Expr
from ..patterns.mapping import Mapping as Tiling
from .cpu_form import Form, Softmax
from .cpu_plan import planned
from .cpu_print import (
    Function,
    Printer,
    allocation,
    coordinates,
    einsum,
    header,
    operands,
    signature,
    sizes,
    skeleton,
    tiling,
    used_names,
)  # fmt: skip
from .print_torch import TYPES, Body, literal
from .skeletons import cpu as loops
from .tile_terms import relative_parts

# Up to this many scores a head, finding out which keys to skip costs more than they do.
FEW = 4096
LARGEST = 3.4028234663852886e38


def text(f: Form, s: Softmax, m: Tiling, version: str) -> str:
    """The kernel's file."""
    p = Printer(f)
    a = f.attention
    functions: list[Function] = []
    near = relative_parts(s.score.added, a.query, a.key) if s.score.added is not None else ()
    for i, part in enumerate(near):
        name = "relative" if len(near) == 1 else f"relative_{i}"
        functions.append(p.function(name, f"What varies with {p.ranks[a.key]} - {p.ranks[a.query]} alone.", [("r", part)]))
    shared = s.score.added is not None and near == (s.score.added,)
    if s.score.added is not None and not shared:
        cuts = {part: "near" if len(near) == 1 else f"near_{i}" for i, part in enumerate(near)}
        functions.append(p.function("bias", "What the scores get added.", [("b", s.score.added)], named=cuts))
    if s.ending.finish is not None:
        leaves = {x: str(x.attr) for x in ex.loads(s.ending.finish) if str(x.attr) in ("o", "lse")}
        functions.append(p.function("end", "The end of a row, from SDPA's output and log-sum-exp.",
                                    [("r", s.ending.finish)], ("o", "lse"), named=leaves))  # fmt: skip
    tiled = f.rule != "never"
    always = s.full.added is not None
    if tiled:
        functions.append(planned(p, always))
    body = glue(p, s, functions, near, shared, tiled)
    printed = "\n\n\n".join([*(x.text for x in functions), body])
    constants = [tiling(m)]
    if not ex.symbols(s.score.scale):
        constants.append(f"SCALE = {Body(p.scope({}), []).real(s.score.scale)}")
    decision = [
        f"Tiles of {m.tile_p} queries and {m.tile_m} keys; SDPA on slices of the keys.",
        {"always": "Tiles without a kept key are skipped.", "never": "Every query sees every key.",
         "guarded": "Tiles without a kept key are skipped where all rows of a tile keep some key."}[f.rule],
    ]  # fmt: skip
    loop = skeleton(loops, used_names(printed))
    parts = [header(f, decision, version), imports("\n".join([printed, *loop])), "\n".join(constants), *loop, printed]
    return "\n\n\n".join(parts) + "\n"


def imports(code: str) -> str:
    used = used_names(code)
    lines = ["from __future__ import annotations", ""]
    if "math" in used:
        lines.append("import math")
    if "Callable" in used:
        lines.append("from collections.abc import Callable")
    if "lru_cache" in used:
        lines.append("from functools import lru_cache")
    if "NamedTuple" in used:
        lines.append("from typing import NamedTuple")
    if lines[-1]:
        lines.append("")
    lines.append("import torch")
    if "Tensor" in used:
        lines.append("from torch import Tensor")
    if used & {"inf", "nan"}:
        lines += ["", 'inf, nan = float("inf"), float("nan")']
    return "\n".join(lines)


def glue(
    p: Printer, s: Softmax, functions: Sequence[Function], near: Sequence[Expr], shared: bool, tiled: bool
) -> str:  # fmt: skip
    """`attention`, which puts everything together."""
    f, a, n = p.f, p.f.attention, p.names
    table = {x.name: x for x in functions}
    lines = sizes(p)
    lines += [f"{n.tensors[e.out.tensor]} = {einsum(p, e)}" for e in a.prelude]
    over = s.product.over
    q, _ = operands(p, a.query, s.product.near, over)
    k, k_share = operands(p, a.key, s.product.far, over)
    v, v_share = operands(p, a.key, f.values, (a.value,))
    heads = n.rank(f.heads.head) if f.heads.head else "1"
    if k_share != v_share:
        k, v = (_spread(x, share, heads) for x, share in ((k, k_share), (v, v_share)))
    lines += [f"q, k, v = {_same_type(p, s, (q, k, v))}"]
    inner = _part(p, s, table, near, shared)
    lines += coordinates(p, "\n".join(inner))
    lines += allocation(p)
    lines += ["", "def part(z0, z1, plan):", *(f"    {x}" if x else "" for x in inner), ""]
    queries, keys = n.rank(a.query), n.rank(a.key)
    added = s.score.added is not None
    few = f"[(0, {p.batch}, strips({queries}, {keys}, {queries}, {added}))]"
    if tiled:
        parts = f"{few} if {queries} * {keys} <= {FEW} else {table['planned'].call({})}"
    elif added:
        parts = f"[(0, {p.batch}, strips({queries}, {keys}, TILE_P, True))]"
    else:
        parts = few
    lines += [f"parts = {parts}", "for z0, z1, plan in parts:", "    part(z0, z1, plan)", "return out"]
    head = f'def attention({signature(p)}):\n    """The output {f.cascade.outputs[0]}."""\n'
    return head + "\n".join(f"    {x}" if x else "" for x in lines)


def _part(
    p: Printer, s: Softmax, table: Mapping[str, Function], near: Sequence[Expr], shared: bool
) -> list[str]:  # fmt: skip
    """Lines that compute a range of the batch along its plan."""
    f, a = p.f, p.f.attention
    query, key = p.ranks[a.query], p.ranks[a.key]
    batch = {p.ranks[r]: f"{p.ranks[r]}[z0:z1]" for r in f.heads.lead}
    lines: list[str] = []
    for i, _ in enumerate(near):
        suffix = "" if len(near) == 1 else f"_{i}"
        made = table[f"relative{suffix}"]
        make = made.name if made.params == (query, key) else f"lambda {query}, {key}: {made.call(batch)}"
        lines.append(f"near{suffix} = Near(plan, {make})")
    arguments = ["q[z0:z1], k[z0:z1], v[z0:z1], rows[z0:z1]", _scale(p, s), "plan"]
    if shared:
        arguments.append("near.cut")
    elif s.score.added is not None:
        at = {**batch, query: f"{query}[p0:p1]", key: f"{key}[m0:m1]"}
        at |= {x: f"{x}.cut(p0, p1, m0, m1)" for x in table["bias"].params if x.split("_")[0] == "near"}
        lines += ["", "def added(p0, p1, m0, m1):", f"    return {table['bias'].call(at)}", ""]
        arguments[2:] = ["single(plan)", "added"]
    if (empty := _empty(f, s)) is not None:
        arguments.append(literal(empty) if s.score.added is not None else f"empty={literal(empty)}")
    if s.ending.finish is not None:
        at = {r: f"{r}[z0 + y0 : z0 + y1]" for r in batch} | {query: f"{query}[p0:p1]", "lse": "lse.unsqueeze(3)"}
        lines += ["", "def finish(o, lse, y0, y1, p0, p1):", f"    return {table['end'].call(at)}", ""]
        arguments.append("finish=finish")
    return [*lines, f"sdpa({', '.join(arguments)})"]


def _empty(f: Form, s: Softmax) -> float | None:
    """What a row without a key yields, where torch's kernel does not give it by itself."""
    if s.score.added is None or (s.ending.finish is None and s.ending.empty == 0):
        return None
    lowest = sum(x for x in f.mask.fills)
    loaded = any(x.is_float and f.attention.key in x.ranks for x in ex.loads(s.score.added))
    return s.ending.empty if loaded or lowest < -LARGEST else None


def _scale(p: Printer, s: Softmax) -> str:
    return Body(p.scope({}), [s.score.scale]).real(s.score.scale) if ex.symbols(s.score.scale) else "SCALE"


def _spread(x: str, share: int, heads: str) -> str:
    """An operand with one element a head, where keys and values are shared differently."""
    if share == 0:
        return f"{x}.expand(-1, {heads}, -1, -1)"
    return x if share == 1 else f"{x}.repeat_interleave({share}, 1)"


def _same_type(p: Printer, s: Softmax, parts: tuple[str, str, str]) -> str:
    """The operands in their common type: SDPA takes one."""
    terms = (s.product.near, s.product.far, p.f.values)
    kinds = [t.dtype if t.op == "load" else p.f.real for t in terms]
    common = kinds[0]
    for x in kinds[1:]:
        common = ex.promote(common, x)
    return ", ".join(t if x == common else f"{t}.to({TYPES[common]})" for t, x in zip(parts, kinds))
