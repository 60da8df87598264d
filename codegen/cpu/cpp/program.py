"""Prints `struct LoopProgram`: the holes of the fused CPU loop, from an attention's score, mask and row state.

    load      pointers, strides and sizes by name        row       what belongs to a row alone
    fetch     what the scores of a row will read
    step      a row's scores to weights                  finish    the end of a row, a loop over its values
    save      row scalars that are handed over
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ....patterns import expr as ex
from ....patterns.attention.rowstate import Carried
from ....patterns.expr import Expr
from ...text.print_cpp import STORED, CppBody
from .names import Around, LoopProgram, mentions
from .step import DECLARED, TileStep


def text(p: LoopProgram) -> str:
    """The struct, and what it needs before it."""
    partial, full = p.tiles
    if partial == full:
        steps = _step(["    " + x for x in TileStep(p, partial).lines()])
    else:
        inner = [
            "    if constexpr (PARTIAL) {", *("      " + x for x in TileStep(p, partial).lines()),
            "    } else {", *("      " + x for x in TileStep(p, full).lines()), "    }",
        ]
        steps = _step(inner)
    finish = [*_finish(p), *([] if p.saved is None else ["", *_save(p, p.saved)])]
    row = p.fields.text()
    fetching = fetch(p, steps)
    code = "\n".join(["", *steps, *finish, *row])
    parts = [DECLARED[r] for r in sorted(p.reductions)]
    members, loading = load(p, set(re.findall(r"[^\W\d]\w*", code)))
    first = " ".join(f"state[{i}] = {_identity(c)};" for i, c in enumerate(p.state.carried))
    parts.append("\n".join([
        "struct Program {", *("  " + x for x in members), *([""] if members else []),
        *("  " + x for x in loading), "",
        *("  " + x if x else "" for x in row), "",
        f"  static void start(float* state) {{ {first} }}".replace("{  }", "{}"), "",
        *("  " + x for x in fetching), "",
        *("  " + x for x in steps), "",
        *("  " + x if x else "" for x in finish), "};",
    ]))
    return "\n\n".join(parts)


def _step(inner: Sequence[str]) -> list[str]:
    head = "INLINE float step(const Row& row, float* const* x, float* w, float* state, int64_t m0, int n) const {"
    doc = "// n scores of a row from key m0 on: its weights, its new state, and the factor of what was summed before"
    return [doc, "template <bool PARTIAL>", head, *(x[2:] for x in inner), "}"]


def fetch(p: LoopProgram, steps: Sequence[str]) -> list[str]:
    """A cache line after the other of what has an element for each query and key."""
    key = p.ranks[p.a.key]
    read = [n for n, tensor in p.fields.pointers.items() if p.by_pairs(tensor) and any(f"{n}[{key}]" in x for x in steps)]
    line = "for (int i = 0; i < n; i += 64 / int(sizeof *row.{x})) __builtin_prefetch(row.{x} + m0 + i, 0, 2);"
    lines = [line.format(x=x) for x in read]
    head = "INLINE void fetch(const Row& row, int64_t m0, int n) const {"
    return ["// n elements from key m0 on of what a row's scores read", head, *(f"  {x}" for x in lines), "}"]


def load(p: LoopProgram, used: set[str]) -> tuple[list[str], list[str]]:
    """Members, and the function that fills them: tensors in order, their strides one after the other, then sizes."""
    members, lines, at = [], [], 0
    for i, t in enumerate(p.tensors):
        x = p.scope.tensors[t]
        members.append(f"const {STORED[x.dtype]}* {x.name};")
        lines.append(f"self.{x.name} = static_cast<const {STORED[x.dtype]}*>(tensors[{i}]);")
        wanted = [(s, at + d) for d, s in enumerate(x.strides) if s in used]
        if wanted:
            members.append(f"int64_t {', '.join(s for s, _ in wanted)};")
        lines += [f"self.{s} = sizes[{d}];" for s, d in wanted]
        at += len(x.strides)
    for i, n in enumerate(p.symbols):
        name = p.scope.names[ex.symbol(n)]
        if name in used:
            members.append(f"int32_t {name};")
            lines.append(f"self.{name} = int32_t(sizes[{at + i}]);")
    head = "static Program load(const void* const* tensors, const int64_t* sizes) {"
    return members, [head, "  Program self;", *(f"  {x}" for x in lines), "  return self;", "}"]


def _finish(p: LoopProgram) -> list[str]:
    a = p.a
    body = CppBody(p.scope, [p.ending], set(p.taken), p.fields)
    value = ex.index(a.value)
    names = dict(p.scope.names) | {value: p.ranks[a.value]}
    loop = CppBody(replace(p.scope, names=names), [p.ending], body.taken, Around(p, body, a.value), value)
    for x in ex.loads(p.ending):
        if str(x.attr) in p.carried:
            _read_state(p, body, x)
        elif str(x.attr) == a.contraction.out.tensor:
            loop.bind(x, "acc[i]")
    result = loop.real(p.ending)
    inner = [*loop.lines, f"out[i] = OUT({result});"]
    if mentions(p.ranks[a.value], inner):
        inner.insert(0, f"const int32_t {p.ranks[a.value]} = i;")
    head = "INLINE void finish(const Row& row, const float* acc, const float* state, OUT* out) const {"
    return [
        "// the end of a row", head, *(f"  {x}" for x in [*p.fields.unpacked([*body.lines, *inner]), *body.lines]),
        "  #pragma omp simd", "  for (int i = 0; i < F; i++) {", *(f"    {x}" for x in inner), "  }", "}",
    ]


def _save(p: LoopProgram, saved: Sequence[Expr]) -> list[str]:
    """Row scalars that are handed over beside the output."""
    body = CppBody(p.scope, saved, set(p.taken), p.fields)
    for e in saved:
        for x in ex.loads(e):
            if str(x.attr) in p.carried:
                _read_state(p, body, x)
    written = [f"saved[{i}] = {body.real(e)};" for i, e in enumerate(saved)]
    lines = [*body.lines, *written]
    head = "INLINE void save(const Row& row, const float* state, float* saved) const {"
    return ["// what a row hands over", head, *(f"  {x}" for x in [*p.fields.unpacked(lines), *lines]), "}"]


def _identity(c: Carried) -> str:
    return "-INFINITY" if c.identity == -float("inf") else "INFINITY" if c.identity == float("inf") else f"{c.identity!r}f"


def _read_state(p: LoopProgram, body: CppBody, x: Expr) -> None:
    """Bind a carried scalar to its final value."""
    if x not in body.memo:
        name = str(x.attr)
        body.lines.append(f"const float {p.carried[name]} = state[{list(p.carried).index(name)}];")
        body.bind(x, p.carried[name])
