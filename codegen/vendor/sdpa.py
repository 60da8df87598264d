"""SDPA as a candidate: `scale · QK` plus a term under softmax, handed to torch's function, with each backend's conditions.

    keep is `key ≤ query`, as many keys as queries      is_causal=True
    rows without a key give 0, or there are none        a boolean mask
    any other term                                      a mask of numbers, fills as written
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from ...cost_model.count.eager import strided
from ...cost_model.devices.architecture import OLDEST_FLASH
from ...cost_model.devices.device import Device
from ...cost_model.time.predict import VENDORS, VendorUse
from ...patterns import expr as ex
from ...patterns.cascade import Cascade, bind
from ...patterns.expr import TRUE, Expr
from ...patterns.terms.conditions import conjuncts
from ...patterns.verdict import Obstacle, Refusal
from ..files.tile_plan import without_causal
from ..files.torch_file import Printer, common_type, operand_type, operands, query_operand, shared_alike
from ..forms.form import Form, Softmax, form, rows_keep_a_key, softmax
from ..text.print_torch import TYPES, TorchBody, is_number
from ..text.printer import PrintError
from .call import VendorCall, Whole, axes, file, function, result

NAME = "sdpa"
BACKENDS = ("cudnn", "flash", "efficient", "math")
SIXTEEN_BITS = ("f16", "bf16")


@lru_cache(maxsize=256)
def sdpa(c: Cascade, *, keyed: bool = False) -> VendorCall | Refusal:
    """SDPA for a cascade, or why it would compute something else. `keyed`: every row is known to keep a key."""
    f = form(c)
    if isinstance(f, Obstacle):
        return Refusal(NAME, str(f))
    s = softmax(f)
    if isinstance(s, str):
        return Refusal(NAME, s)
    if s.chosen:
        return Refusal(NAME, f"the fill {max(f.mask.fills):g} replaces scores, and drowns them only while they are small")
    if s.ending.finish is not None:
        return Refusal(NAME, "the row ends with more than a division by its sum, which SDPA does not give")
    mask = _mask(f, s, keyed)
    if isinstance(mask, Refusal):
        return mask
    try:
        return _call(f, s, mask)
    except PrintError as no:
        return Refusal(NAME, str(no))


def _mask(f: Form, s: Softmax, keyed: bool) -> Expr | Refusal | None:
    """What SDPA is given as its mask: a predicate, numbers, or nothing; or why no mask keeps the model's rows."""
    if s.score.added is None:
        return None
    a = f.attention
    if f.hidden:
        return Refusal(NAME, "a row may be all −∞ by a fill that data scales: NaN in the model, 0 in SDPA")
    never = keyed or f.mask.keep is TRUE or not rows_keep_a_key(a, f.mask.keep)
    rule = "never" if never else f.no_key
    if rule == "nan":
        return Refusal(NAME, "a row without a key gives NaN in the model and 0 in SDPA, and rows may have none")
    if rule == "varies":
        return Refusal(NAME, "what a row without a key gives depends on data, and rows may have none")
    if s.full.added is None and f.mask.keep is not TRUE and (rule == "zero" or (never and f.mask.vanishing)):
        return f.mask.keep
    narrow = min(f.mask.fills, default=0.0)
    if rule == "uniform" and _dtype(f) == "f16" and narrow > -math.inf:
        return Refusal(NAME, "float16 holds no fill that drowns every score in a row without a key")
    return s.score.added


def _dtype(f: Form) -> str:
    return f.products[0].near.dtype


def _causal(f: Form, p: Printer, mask: Expr | None) -> bool:
    """Is the mask `key ≤ query` and nothing else, with as many keys as queries?"""
    a = f.attention
    square = a.cascade.rank[a.query].size == a.cascade.rank[a.key].size
    return mask is not None and mask.dtype == "b1" and square and len(conjuncts(mask)) == 1 and without_causal(p) is TRUE


def _call(f: Form, s: Softmax, mask: Expr | None) -> VendorCall:
    p = Printer(f, cached=False)
    a = f.attention
    q = query_operand(p, s.product.near, s.product.over)
    k_given, v_given = operands(p, a.key, s.product.far, s.product.over), operands(p, a.key, f.values, (a.value,))
    k, v = shared_alike(p, k_given, v_given)
    grouped = k_given[1] == v_given[1] != 1 and bool(f.heads.head)
    causal = _causal(f, p, mask)
    terms = (s.product.near, s.product.far, f.values)
    lines = [
        f"q, k, v = {common_type(p, terms, (q, k, v))}",
        "# torch lays its result out by the strides of the queries, and on CPUs writes rows of other strides than it reads",
        "q = q.contiguous() if 1 in q.stride()[:-1] else q",
    ]
    arguments = ["q, k, v"]
    if causal:
        arguments.append("is_causal=True")
    elif mask is not None:
        lines += _mask_lines(p, mask)
        arguments.append("attn_mask=mask")
    scale = TorchBody(p.scope({}), []).real(s.score.scale)
    arguments.append(f"scale={scale}")
    if grouped:
        arguments.append("enable_gqa=True")
    lines.append(f"out = torch.nn.functional.scaled_dot_product_attention({', '.join(arguments)})")
    out = a.cascade.tensor[a.cascade.outputs[0]].dtype
    lines.append(f"return {result(p, 'out')}{'' if out == _common(f) else f'.to({TYPES[out]})'}")
    text = file(f, "Attention by torch's SDPA, printed by reattend.", [], [function(p, NAME, lines)])
    return VendorCall(NAME, text, f.cascade, None if causal else mask, causal, grouped)


def _common(f: Form) -> str:
    """The type in which torch gets the operands."""
    terms = (f.products[0].near, f.products[0].far, f.values)
    return operand_type(terms, f.real)


def _as_it_is(f: Form, mask: Expr) -> bool:
    """Is it a tensor of the operands' type, which torch's kernels widen by themselves?"""
    return mask.op == "load" and mask.dtype == _common(f)


def _mask_lines(p: Printer, mask: Expr) -> list[str]:
    """Lines that make the mask, with four dimensions that broadcast and one element a key."""
    body = Whole.of(p, [mask], frozenset({mask} if _as_it_is(p.f, mask) else ()))
    kind = "b1" if mask.dtype == "b1" else p.f.real
    text = body.term(mask) if kind == "b1" else body.real(mask)
    if is_number(mask, p.scope({}).numbers):
        text = f"torch.full((1,), {text}, dtype={TYPES[kind]}, device=q.device)"
    lines = [*(x.strip() for x in body.lines), f"mask = {text}"]
    lead, key = p.f.heads.lead, p.f.attention.key
    n = max(4, len(lead) + 3)
    lines.append(f"mask = mask[(None,) * ({n} - mask.dim())]")
    if len(lead) > 1:
        whole = ", ".join(p.names.rank(r) for r in lead)
        lines.append(f"mask = mask.expand({whole}, -1, -1, -1).flatten(0, {len(lead) - 1})")
    if key not in mask.ranks:
        lines.append(f"mask = mask.expand(-1, -1, -1, {p.names.rank(key)})")
    if mask.dtype != "b1":
        lines += ["if q.device.type != \"cpu\":", "    # masks of another type than the query have no fused kernel there",
                  "    mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)"]
    return [*axes(p, "\n".join(lines)), *lines]


# --- which of SDPA's kernels takes it ---------------------------------------------------------------------------


def backends(call: VendorCall, device: Device, sizes: Mapping[str, int], *, gradients: bool = False) -> dict[str, str]:
    """For each of SDPA's kernels, in the order in which torch tries them: why it cannot take the call, or "".

    Source: torch's sdp_utils.cpp (CUDA and C++), 2.11 to 2.13, and profiles of the CPU's kernels.
    """
    f = form(call.cascade)
    assert not isinstance(f, Obstacle)
    dtype = _dtype(f)
    e, v = (int(bind(f.cascade.rank[r].size, sizes)) for r in (f.products[0].over[0], f.attention.value))
    if device.kind == "cpu":
        return {"flash": _cpu_flash(call, e, v, gradients), "math": ""}
    order = BACKENDS if _favours_cudnn(device) else ("flash", "efficient", "cudnn", "math")
    why = {
        "cudnn": _cudnn(device, dtype, e, v),
        "flash": _flash(call, device, dtype, e, v),
        "efficient": _efficient(call, device, dtype, e, v),
        "math": "",
    }
    return {b: why[b] for b in order}


def _cpu_flash(call: VendorCall, e: int, v: int, gradients: bool) -> str:
    if e != v:
        return f"keys are {e} wide and values {v}: the kernel takes equal widths"
    if not _lies_by_rows(call):
        return "the elements of a query, a key or a value do not lie side by side, as the kernel reads them"
    if gradients and call.mask is not None and call.mask.dtype != "b1" and any(x.is_float for x in ex.loads(call.mask)):
        return "the mask may want a gradient"
    return ""


def _lies_by_rows(call: VendorCall) -> bool:
    """Is the innermost dimension of every operand that is a view of an input the head's?"""
    f = form(call.cascade)
    assert not isinstance(f, Obstacle)
    (product,) = f.products
    inner = [(product.near, product.over[-1]), (product.far, product.over[-1]), (f.values, f.attention.value)]
    views = [(x, r) for x, r in inner if x.op == "load" and strided(x) and r in x.ranks]
    return all(x.args[-1] is ex.index(r) for x, r in views)


def _favours_cudnn(device: Device) -> bool:
    return device.kind == "cuda" and device.architecture.cudnn_first


def _cudnn(device: Device, dtype: str, e: int, v: int) -> str:
    if device.kind != "cuda":
        return "not built for this device"
    limit = 256 if _favours_cudnn(device) else 128
    if dtype not in SIXTEEN_BITS:
        return f"{dtype} is not float16 or bfloat16"
    if max(e, v) > limit or e % 8 or v % 8:
        return f"head sizes {e} and {v}: it takes multiples of 8 up to {limit}"
    return ""


def _flash(call: VendorCall, device: Device, dtype: str, e: int, v: int) -> str:
    if call.mask is not None:
        return "it takes no mask tensor"
    if dtype not in SIXTEEN_BITS:
        return f"{dtype} is not float16 or bfloat16"
    if e != v or e > 256:
        return f"head sizes {e} and {v}: it takes equal ones up to 256"
    if not device.architecture.takes_flash:
        return f"{device.arch} is older than {OLDEST_FLASH}"
    return ""


def _efficient(call: VendorCall, device: Device, dtype: str, e: int, v: int) -> str:
    if dtype == "f64":
        return "f64 is not float16, bfloat16 or float32"
    alignment = 8 if dtype in SIXTEEN_BITS else 4
    if e % alignment or v % alignment:
        return f"head sizes {e} and {v} are no multiples of {alignment}"
    if call.grouped and device.kind == "hip":
        return "it takes no grouped heads on this device"
    return ""


def use(call: VendorCall, device: Device, sizes: Mapping[str, int], *, gradients: bool = False) -> VendorUse:
    """How torch would run the call on a device: the first kernel that takes it, and what its mask costs."""
    backend = next(b for b, why in backends(call, device, sizes, gradients=gradients).items() if not why)
    if call.mask is None:
        return VendorUse(backend, skips=call.causal and not VENDORS[backend].eager)
    rank = call.cascade.rank
    count = math.prod(int(bind(rank[r].size, sizes)) for r in call.mask.ranks if r in rank)
    bare, dtype = call.mask.op == "load", call.mask.dtype
    operators = 0 if bare else sum(1 for x in ex.walk(call.mask) if x.op not in ("const", "index", "symbol", "load"))
    if device.kind == "cpu" and dtype != "b1":
        f = form(call.cascade)
        assert not isinstance(f, Obstacle)
        # numbers are made in fp32; a tensor of another type than the operands' is widened first
        bare = bare and (_as_it_is(f, call.mask) or dtype == "f32")
        dtype = dtype if bare else "f32"
    return VendorUse(backend, False, count, dtype, 0 if bare else count, operators)
