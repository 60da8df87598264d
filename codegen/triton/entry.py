"""Prints the host's functions of an emitted module, from tensors to a launch.

    sizes_of    sizes from shapes, checked            kept       the mask in torch
    plan_of     output shape, grid, key tiles         walk_of    key tiles of every row block under the mask
    attention   tensors in, tensor out
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy

from ...cost_model.count.subject import FEW_ROWS
from ...patterns import expr as ex
from ...patterns.cascade import Size, as_size
from ...patterns.mapping import TileMapping
from ..files.library import functions
from ..text import print_torch
from .device_function import KernelNames, atom
from .holes import mask_ranks
from .streaming import Streaming


def is_static(s: Streaming) -> bool:
    """Do the tile classes depend on sizes alone?"""
    return not ex.loads(s.mask.keep)


def needs_lists(s: Streaming) -> bool:
    """May a mask say which key tiles a row block visits? Not for a few query rows: they visit all."""
    queries = s.extent[s.attention.query]
    listed = s.mask.keep is not ex.TRUE and s.span is None
    return listed and not (isinstance(queries, int) and queries < FEW_ROWS)


def mask_tensors(s: Streaming) -> tuple[str, ...]:
    loaded = {str(x.attr) for x in ex.loads(s.mask.keep)}
    return tuple(t for t in s.inputs if t in loaded)


def unbound(s: Streaming) -> tuple[str, ...]:
    """Sizes that no tensor's shape shows, and that a caller gives by name."""
    return tuple(_bound(s, KernelNames(s))[1])


def printed(s: Streaming, mapping: TileMapping) -> list[str]:
    """The texts of the host's functions."""
    names = KernelNames(s)
    masked = [*_kept(s, names), _walk_of(s, names, mapping)] if needs_lists(s) else []
    return [_sizes_of(s, names), _plan_of(s, names, mapping), *masked, _attention(s, names, mapping)]


# --- sizes ------------------------------------------------------------------------------------------------------


def _size(size: Size, names: KernelNames) -> str:
    return print_torch.size_source(size, names.symbols)


def _product(sizes: Iterable[Size], names: KernelNames) -> str:
    texts = [_size(n, names) for n in sizes if n != 1]
    if all(t.isdigit() for t in texts):
        return str(math.prod(map(int, texts)))
    return " * ".join(map(atom, texts)) if len(texts) > 1 else texts[0]


def _tuple(texts: Iterable[str]) -> str:
    parts = list(texts)
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _symbols(s: Streaming, names: KernelNames) -> list[str]:
    return [names.symbols[n] for n in s.cascade.free_symbols]


def _bound(s: Streaming, names: KernelNames) -> tuple[Mapping[str, str], list[str]]:
    """Texts of the sizes that the inputs' shapes give, in order, and the symbols that they do not give."""
    known: dict[str, str] = {}
    left = list(s.cascade.free_symbols)
    dims = [(names.operands[t.name].name, d, size) for t in s.cascade.inputs for d, size in enumerate(t.shape)]
    while found := next(
        ((n, t, d, solved) for n in left for t, d, size in dims if (solved := _solved(n, size, set(known)))), None
    ):
        symbol, tensor, d, (factor, rest) = found
        text = f"{tensor}.shape[{d}]"
        if rest != 0:
            text += f" - {atom(_size(rest, names))}"
        if factor != 1:
            text = f"{text if rest == 0 else f'({text})'} // {atom(_size(factor, names))}"
        known[symbol] = text
        left.remove(symbol)
    return known, left


def _solved(symbol: str, size: Size, known: set[str]) -> tuple[Size, Size] | None:
    """(factor, rest) where size = factor·symbol + rest and both are known."""
    if not isinstance(size, sympy.Expr):
        return None
    x = next((x for x in size.free_symbols if str(x) == symbol), None)
    if x is None:
        return None
    size = sympy.expand(size)
    factor, rest = size.coeff(x, 1), size.coeff(x, 0)
    others = {str(y) for y in factor.free_symbols | rest.free_symbols}
    if sympy.expand(size - factor * x - rest) != 0 or not others <= known:
        return None
    return as_size(factor), as_size(rest)


def _sizes_of(s: Streaming, names: KernelNames) -> str:
    known, missing = _bound(s, names)
    tensors = [names.operands[t.name].name for t in s.cascade.inputs]
    keywords = [names.symbols[n] for n in missing]
    lines = [
        f"def sizes_of({', '.join([*tensors, *(['*', *keywords] if keywords else [])])}):",
        f'    """Sizes {_tuple(_symbols(s, names))} of the inputs. Raises ValueError where their shapes contradict."""',
        *(f"    {names.symbols[n]} = {text}" for n, text in known.items()),
        "    for name, tensor, shape in (",
        *(
            f'        ("{names.operands[t.name].name}", {names.operands[t.name].name}, '
            f"{_tuple(_size(n, names) for n in t.shape)}),"
            for t in s.cascade.inputs
        ),
        "    ):",
        "        if tensor.shape != shape:",
        '            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the others make it {shape}")',
        f"    return {_tuple(_symbols(s, names))}",
    ]
    return "\n".join(lines)


def _plan_of(s: Streaming, names: KernelNames, mapping: TileMapping) -> str:
    out = s.attention.cascade.tensor[s.cascade.outputs[0]]
    keys = atom(_product([s.extent[s.key]], names)) if s.extent[s.key] != 1 else "1"
    full = f"{keys} // {mapping.tile_m}" if s.mask.keep is ex.TRUE else "0"
    rows = atom(_product((s.extent[r] for r in s.rows), names)) if any(s.extent[r] != 1 for r in s.rows) else "1"
    programs = _product((s.extent[r] for r in s.grid), names) if s.grid else "1"
    return "\n".join([
        f"def plan_of({', '.join(_symbols(s, names))}):",
        '    """Shape of the output, programs, row blocks of each, (full, all) key tiles of a block that visits all."""',
        f"    shape = {_tuple(_size(n, names) for n in out.shape)}",
        f"    return shape, {programs}, -(-{rows} // {mapping.tile_p}), ({full}, -(-{keys} // {mapping.tile_m}))",
    ])


# --- the mask ---------------------------------------------------------------------------------------------------


def _mask_arguments(s: Streaming, names: KernelNames) -> list[str]:
    return [names.operands[t].name for t in mask_tensors(s)] + _symbols(s, names)


def _kept(s: Streaming, names: KernelNames) -> list[str]:
    """The mask as a torch function of rows and keys, over all tile lists, and the helpers it calls."""
    query, key = names.ranks[s.attention.query], names.ranks[s.key]
    scope = print_torch.TorchScope(
        names=names.leaves((*s.grid, s.attention.query, s.key)),
        tensors={t: names.operands[t].name for t in s.inputs},
        shapes={t: o.shape for t, o in names.operands.items()},
        extent=s.extent,
        views=False,
    )
    body = print_torch.TorchBody(scope, [s.mask.keep])
    body.taken |= set(names.ranks.values())
    result = body.term(s.mask.keep)
    lines = [
        f"def kept({', '.join([*_mask_arguments(s, names), query, key])}):",
        '    """Which keys a row keeps: bool [lists, rows, keys]."""',
    ]
    over = mask_ranks(s)
    if over:
        count = _product((s.extent[r] for r in over), names)
        lines.append(f"    i = torch.arange({count}, device={key}.device)[:, None, None]")
    for r in reversed(over):
        size = atom(_product([s.extent[r]], names))
        rest = [f"    i = i // {size}"] if r != over[0] else []
        lines += [f"    {names.ranks[r]} = i % {size}" if rest else f"    {names.ranks[r]} = i", *rest]
    helpers = [functions("cpu")[h] for h in sorted(body.helpers)]
    return [*helpers, "\n".join([*lines, *body.lines, f"    return {result}"])]


def _walk_of(s: Streaming, names: KernelNames, mapping: TileMapping) -> str:
    query, key = names.ranks[s.attention.query], names.ranks[s.key]
    keys, queries = (_product([s.extent[r]], names) for r in (s.key, s.attention.query))
    over = [s.extent[r] for r in mask_ranks(s)]
    lists = _product(over, names) if over else "1"
    ragged = str(int(keys) % mapping.tile_m != 0) if keys.isdigit() else f"{atom(keys)} % {mapping.tile_m} != 0"
    arguments = _mask_arguments(s, names)
    text = "\n".join([
        f"def walk_of({', '.join([*arguments, 'device'])}):",
        '    """The key tiles that every row block visits under the mask, as `launch` takes them."""',
        "    classes = tile_classes(",
        f"        lambda {query}, {key}: kept({', '.join([*arguments, query, key])}),",
        f'        {lists}, {queries}, {keys}, {mapping.tile_p}, {mapping.tile_m}, "{s.skipping}", device,',
        "    )",
        f"    return tile_lists(classes, {ragged}, heavy_first={mapping.heavy_first})",
    ])
    return f"@lru_cache(maxsize=64)\n{text}" if is_static(s) else text


# --- the way in -------------------------------------------------------------------------------------------------


def _attention(s: Streaming, names: KernelNames, mapping: TileMapping) -> str:
    _, missing = _bound(s, names)
    keywords = [names.symbols[n] for n in missing]
    shapes = s.attention.cascade.tensor
    tensors = {t: names.operands[t].name for t in s.inputs}
    read = ", ".join([*(tensors[t.name] for t in s.cascade.inputs), *(f"{k}={k}" for k in keywords)])
    first = next(tensors[t.name] for t in s.cascade.inputs if t.shape)
    inputs = _tuple(n if shapes[t].shape else f"{n}.to({first}.device)" for t, n in tensors.items())
    symbols = _symbols(s, names)
    eights = f", {s.eights}" if s.eights else ""
    lines = [
        f"def attention({', '.join([*tensors.values(), *(['*', *keywords] if keywords else [])])}):",
        f'    """{_signature(s)}',
        *([f"\n    {', '.join(keywords)}: sizes that no shape shows."] if keywords else []),
        '    """' if keywords else "",
        f"    {_tuple(symbols)[1:-1]} = sizes = sizes_of({read})" if symbols else f"    sizes = sizes_of({read})",
        f"    shape, programs, row_blocks, walk = plan_of({', '.join(symbols)})",
        *_choose_walk(s, names, first),
        f"    out = torch.empty(shape, dtype={print_torch.TYPES[shapes[s.cascade.outputs[0]].dtype]}, "
        f"device={first}.device)",
        f"    return {launcher(s, mapping)}, out, {inputs}, sizes, programs, row_blocks, walk{eights})",
    ]
    if not keywords:
        lines[1] += '"""'
    return "\n".join(line for line in lines if line)


def launcher(s: Streaming, mapping: TileMapping) -> str:
    if mapping.split_m > 1:
        return f"launch_split((stream, merge), (CONSTANTS, MERGE), {len(s.state.carried)}"
    return "launch(stream, CONSTANTS"


def _choose_walk(s: Streaming, names: KernelNames, first: str) -> list[str]:
    if not needs_lists(s):
        return []
    call = f"walk = walk_of({', '.join([*_mask_arguments(s, names), f'{first}.device'])})"
    queries = _product([s.extent[s.attention.query]], names)
    if queries.isdigit():
        return [f"    {call}"]
    return [f"    if {queries} >= {FEW_ROWS}:", f"        {call}"]


def _signature(s: Streaming) -> str:
    def show_tensor(name: str) -> str:
        t = s.attention.cascade.tensor[name]
        return f"{name}: {t.dtype}[{', '.join(map(str, t.shape))}]"

    return f"{show_tensor(s.cascade.outputs[0])} from {'; '.join(map(show_tensor, s.inputs))}"
