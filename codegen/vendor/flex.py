"""FlexAttention as a candidate: score and mask functions printed from the cascade, and a block mask from tile intervals.

    score_mod(score, b, h, q, kv)    the score where the mask keeps the key
    mask_mod(b, h, q, kv)            keep
    blocks                           some and every point kept, over the corners of 128 × 128 tiles: never P × M elements
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ...cost_model.devices.device import Device
from ...cost_model.time.predict import VendorUse
from ...patterns import expr as ex
from ...patterns.cascade import Cascade
from ...patterns.expr import TRUE, Expr
from ...patterns.verdict import Obstacle, Refusal
from ..files.tile_plan import tile_lines
from ..files.torch_file import (
    Printer,
    common,
    common_type,
    indented,
    operands,
    query_operand,
    shared_alike,
    used_names,
)
from ..forms.form import Form, form, rows_keep_a_key
from ..forms.operands import element_type
from ..forms.scaled import Ending, ending
from ..text.print_torch import TYPES, TorchBody, identifier
from ..text.printer import ATOM, PrintError, Text
from .call import VendorCall, file, function, result

NAME = "flex"
TYPES_TAKEN = ("f16", "bf16", "f32")
MODULE = "torch.nn.attention.flex_attention"
BLOCK = 128


@lru_cache(maxsize=256)
def flex(c: Cascade, *, keyed: bool = False) -> VendorCall | Refusal:
    """FlexAttention for a cascade, or why it would compute something else. `keyed`: every row is known to keep a key."""
    f = form(c)
    if isinstance(f, Obstacle):
        return Refusal(NAME, str(f))
    if len(f.products) != 1:
        return Refusal(NAME, f"the score has {len(f.products)} products, FlexAttention has one")
    end = ending(f.attention, f.state)
    if isinstance(end, str):
        return Refusal(NAME, end)
    if f.hidden:
        return Refusal(NAME, "a row may be all −∞ by a fill that data scales: NaN in the model, 0 in FlexAttention")
    why = ("" if keyed else _rows(f, end)) or _operands_fit(f)
    if why:
        return Refusal(NAME, why)
    try:
        return _Flex(f, end).call()
    except PrintError as no:
        return Refusal(NAME, str(no))


def use(call: VendorCall, device: Device, _: Mapping[str, int], *, gradients: bool = False) -> VendorUse | Refusal:
    """How the call runs on a device, or why it cannot run there (or not for training)."""
    if device.kind == "cpu" and gradients:
        return Refusal(NAME, "FlexAttention has no backward on the CPU, and gradients are wanted here")
    if device.kind == "cpu" and "AuxRequest" in call.source:
        return Refusal(NAME, "the row's end needs the log-sum-exp, which FlexAttention does not give on the CPU")
    return VendorUse("flex", skips="BlockMask" in call.source)


def _rows(f: Form, end: Ending) -> str:
    """Why rows without a key would differ: FlexAttention gives them 0."""
    if f.mask.keep is TRUE or not rows_keep_a_key(f.attention, f.mask.keep):
        return ""
    rule = f.no_key
    if not f.skips or rule in ("zero", "never"):
        return ""
    return f"a row without a key gives {_RULE.get(rule, rule)} in the model and 0 in FlexAttention, and rows may have none"


_RULE = {"nan": "NaN", "uniform": "the mean of all values", "varies": "what data say"}


def _operands_fit(f: Form) -> str:
    kinds = [element_type(t, f.real) for t in (f.products[0].near, f.products[0].far, f.values)]
    kind = common(kinds)
    return "" if kind in TYPES_TAKEN else f"FlexAttention takes no {kind}"


class _Flex:
    """The text of one call."""

    def __init__(self, f: Form, end: Ending) -> None:
        self.f, self.end, self.p = f, end, Printer(f, cached=False)
        a = f.attention
        # a mask whose masked weights do not vanish is part of the score
        self.masked = f.mask.keep is not TRUE and f.skips
        (product,) = f.products
        score = f.mask.full if self.masked else a.score
        self.load = ex.load(product.name, a.products[0].out.index, a.cascade.tensor[product.name].dtype)
        if not (product.outside.is_const and product.outside.value == 1):
            score = ex.substitute(score, {self.load: self.load * product.outside})
        self.score, self.scale = _scaled(score, self.load)

    def call(self) -> VendorCall:
        f, p, a = self.f, self.p, self.f.attention
        (product,) = f.products
        q = query_operand(p, product.near, product.over)
        k_given, v_given = operands(p, a.key, product.far, product.over), operands(p, a.key, f.values, (a.value,))
        k, v = shared_alike(p, k_given, v_given)
        grouped = k_given[1] == v_given[1] != 1 and bool(f.heads.head)
        terms = (product.near, product.far, f.values)
        lines = [f"q, k, v = {common_type(p, terms, (q, k, v))}"]
        arguments = ["q, k, v"]
        if self.score is not self.load:
            lines += ["", *self._function("score_mod", self.score, ("score",), {self.load: "score"}), ""]
            arguments.append("score_mod=score_mod")
        if self.masked:
            lines += ["", *self._function("mask_mod", f.mask.keep, (), {}), ""]
            lines.append(f"block_mask = {self.blocks()[0]}")
            arguments.append("block_mask=block_mask")
        arguments.append(f"scale={self.scale}")
        if grouped:
            arguments.append("enable_gqa=True")
        attend = f"attention({', '.join(arguments)}"
        if self.end.finish is not None:
            lines += [f"out, aux = {attend}, return_aux=AuxRequest(lse=True))", *self._end(self.end.finish)]
        else:
            lines.append(f"out = {attend})")
        out = a.cascade.tensor[a.cascade.outputs[0]].dtype
        given = common([element_type(t, f.real) for t in terms])
        same = out == given and self.end.finish is None
        lines.append(f"return {result(p, 'out')}{'' if same else f'.to({TYPES[out]})'}")
        functions = [ATTEND, *([LISTS, self.blocks()[1]] if self.masked else []), function(p, NAME, lines)]
        text = file(f, "Attention by torch's FlexAttention, printed by reattend.", [], functions, self._imports())
        return VendorCall(NAME, text, f.cascade, grouped=grouped, compiled=True)

    def _imports(self) -> list[str]:
        names = [*(["AuxRequest"] if self.end.finish is not None else []), *(["BlockMask"] if self.masked else [])]
        return [f"from {MODULE} import {', '.join([*names, 'flex_attention'])}"]

    def _function(self, name: str, root: Expr, first: Sequence[str], named: dict[Expr, str]) -> list[str]:
        """A function of scalar coordinates, inside which the tensors of the call are at hand."""
        p, at = self.p, self.f.heads
        body = _Scalar(p.scope(named, views=False), [root])
        text = body.term(root) if root.dtype == "b1" else body.real(root)
        lead = [p.ranks[r] for r in at.lead]
        batch = lead[0] if len(lead) == 1 else identifier("z", p.taken)
        head = p.ranks[at.head] if at.head else identifier("h", p.taken)
        split, inner = [], ""
        if len(lead) > 1:
            for r in reversed(at.lead):
                split.append(f"{p.ranks[r]} = {batch}{f' // ({inner})' if inner else ''} % ({p.names.rank(r)})")
                inner = f"{p.names.rank(r)} * {inner}" if inner else p.names.rank(r)
        parameters = [*first, batch, head, p.ranks[self.f.attention.query], p.ranks[self.f.attention.key]]
        lines = [*split, *(x.strip() for x in body.lines), f"return {text}"]
        return [f"def {name}({', '.join(parameters)}):", *indented(lines)]

    def blocks(self) -> tuple[str, str]:
        """The call that makes the block mask, and its function."""
        p, a = self.p, self.f.attention
        queries, keys = p.names.rank(a.query), p.names.rank(a.key)
        lines = tile_lines(p, self.f.mask.keep, None, (BLOCK, BLOCK), (str(BLOCK), str(BLOCK)))
        used = used_names("\n".join(lines))
        coordinates, counts = [], []
        for letter, size, after in (("p", queries, 1), ("m", keys, 0)):
            size = size if size.isidentifier() or size.isdigit() else f"({size})"
            counts.append(f"-(-{size} // {BLOCK})")
            n = f"{letter}n"
            coordinates.append(f"{n} = {p.names.axis(counts[-1], after)}")
            coordinates.append(f"{letter}0, {letter}1 = {n} * {BLOCK}, ({n} * {BLOCK} + {BLOCK - 1}).clamp(max={size} - 1)")
        coordinates += [f"{p.ranks[r]} = {p.coordinate(r)}" for r in self.f.heads.order if p.ranks[r] in used]
        lists = f"lists(some, every, ({', '.join(counts)}), mask_mod, ({queries}, {keys}))"
        body = [*coordinates, *lines, f"return {lists}"]
        used = used_names("\n".join(body))
        tensors = [x for x in p.names.tensors.values() if x in used]
        parameters = ["mask_mod", *tensors, *(x for x in p.names.symbols.values() if x in used)]
        head = f'def blocks({", ".join(parameters)}):\n    """Which blocks of {BLOCK} × {BLOCK} scores the mask keeps."""'
        return f"blocks({', '.join(parameters)})", "\n".join([head, *indented(body)])

    def _end(self, finish: Expr) -> list[str]:
        """Lines that end the rows from FlexAttention's output and log-sum-exp."""
        p = self.p
        named = {x: str(x.attr) for x in ex.loads(finish) if str(x.attr) in ("o", "lse")}
        body = TorchBody(p.scope(named, views=False), [finish])
        text = body.real(finish)
        lines = ["o, lse = out, aux.lse.unsqueeze(-1)", *(x.strip() for x in body.lines), f"out = {text}"]
        used = used_names("\n".join(lines))
        places = [*self.f.heads.order, self.f.attention.query, self.f.attention.value]
        return [*(f"{p.ranks[r]} = {p.coordinate(r)}" for r in places if p.ranks[r] in used), *lines]


class _Scalar(TorchBody):
    """Terms over one point, as FlexAttention traces them."""

    def _where(self, e: Expr) -> Text:
        cond, yes, no = e.args
        a, b = (self._real(x) if e.is_float else self._integer(x, e.dtype) for x in (yes, no))
        return Text(f"torch.where({self.term(cond)}, {a.code}, {b.code})", ATOM)


ATTEND = '''def fused(q, k, v, options):
    return flex_attention(q, k, v, **options)


@lru_cache
def compiled(threads):
    """For as many threads as run it: before 2.13 PyTorch's cache on disk gave kernels out whatever their threads."""
    return torch.compile(fused, options={"cpp.threads": threads})


def overruns(q, k):
    """Does Inductor's product on vectors of 8 write behind its scores? It takes 16 keys at a time where channels are few."""
    few = k.shape[-1] < 24 and min(q.shape[-2], k.shape[-2]) <= 128
    return few and k.shape[-2] % 16 != 0 and k.device.type == "cpu"


def attention(q, k, v, **options):
    """FlexAttention, compiled where that is right; a tracer sees the function itself."""
    if torch.compiler.is_compiling():
        return fused(q, k, v, options)
    if torch._guards.detect_fake_mode((q, k, v)) is None and not overruns(q, k):
        return compiled(torch.get_num_threads())(q, k, v, options)
    with warnings.catch_warnings():
        # that the uncompiled form is slow does not matter to a tracer, nor for few scores
        warnings.simplefilter("ignore")
        return fused(q, k, v, options)'''

LISTS = '''def lists(some, every, shape, mask_mod, lengths):
    """A block mask: for every row of blocks, those that need the mask, and those that do not."""
    some, every = (x.expand(*x.shape[:-2], *shape)[(None,) * (4 - x.dim())] for x in (some, every))
    partial, full = some & ~every, every & some
    parts = []
    for x in torch.broadcast_tensors(partial, full):
        parts += [x.sum(-1, dtype=torch.int32), (~x).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)]
    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=lengths)'''


def _scaled(score: Expr, load: Expr) -> tuple[Expr, str]:
    """The score over scaled products, and the scale, where all it reads is one multiple of the product."""
    readers = {e for e in ex.walk(score) if load in e.args}
    if len(readers) == 1:
        (e,) = readers
        other = e.args[1] if e.op == "mul" and e.args[0] is load else None
        if other is not None and other.is_const:
            return ex.substitute(score, {e: load}), repr(float(other.value))
    return score, "1.0"
