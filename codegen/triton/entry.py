"""Prints the host's functions of an emitted module, from tensors to a launch.

    sizes_of    sizes from shapes, checked            walk_of    key tiles of every row block under the mask
    plan_of     output shape, grid, key tiles         attention  tensors in, tensor out
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import sympy

from ...cost_model.count.subject import FEW_ROWS
from ...patterns import expr as ex
from ...patterns.cascade import Size, as_size
from ...patterns.mapping import TileMapping
from ..text import print_torch
from .device_function import KernelNames, atom
from .holes import mask_ranks, needs_lists
from .streaming import Streaming


def is_static(s: Streaming) -> bool:
    """Do the tile classes depend on sizes alone?"""
    return not ex.loads(s.mask.keep)


def unbound(s: Streaming, names: KernelNames | None = None) -> tuple[str, ...]:
    """Sizes that no tensor's shape shows, and that a caller gives by name."""
    return tuple(bound(s, names or KernelNames(s))[1])


def printed(s: Streaming, mapping: TileMapping) -> list[str]:
    """The texts of the host's functions."""
    names = KernelNames(s)
    masked = [walk_of(s, names, mapping)] if needs_lists(s) else []
    return [sizes_of(s, names), plan_of(s, names, mapping), *masked, _attention(s, names, mapping)]


# --- sizes ------------------------------------------------------------------------------------------------------


def size_text(size: Size, names: KernelNames) -> str:
    return print_torch.size_source(size, names.symbols)


def product_text(sizes: Iterable[Size], names: KernelNames) -> str:
    texts = [size_text(n, names) for n in sizes if n != 1]
    if all(t.isdigit() for t in texts):
        return str(math.prod(map(int, texts)))
    return " * ".join(map(atom, texts)) if len(texts) > 1 else texts[0]


def tuple_text(texts: Iterable[str]) -> str:
    parts = list(texts)
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def symbols(s: Streaming, names: KernelNames) -> list[str]:
    return [names.symbols[n] for n in s.cascade.free_symbols]


def bound(s: Streaming, names: KernelNames) -> tuple[Mapping[str, str], list[str]]:
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
            text += f" - {atom(size_text(rest, names))}"
        if factor != 1:
            text = f"{text if rest == 0 else f'({text})'} // {atom(size_text(factor, names))}"
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


def sizes_of(s: Streaming, names: KernelNames) -> str:
    known, missing = bound(s, names)
    tensors = [names.operands[t.name].name for t in s.cascade.inputs]
    keywords = [names.symbols[n] for n in missing]
    lines = [
        f"def sizes_of({', '.join([*tensors, *(['*', *keywords] if keywords else [])])}):",
        f'    """Sizes {tuple_text(symbols(s, names))} of the inputs. Raises ValueError where their shapes contradict."""',
        *(f"    {names.symbols[n]} = {text}" for n, text in known.items()),
        "    for name, tensor, shape in (",
        *(
            f'        ("{names.operands[t.name].name}", {names.operands[t.name].name}, '
            f"{tuple_text(size_text(n, names) for n in t.shape)}),"
            for t in s.cascade.inputs
        ),
        "    ):",
        "        if tensor.shape != shape:",
        '            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the others make it {shape}")',
        f"    return {tuple_text(symbols(s, names))}",
    ]
    return "\n".join(lines)


def plan_of(s: Streaming, names: KernelNames, mapping: TileMapping) -> str:
    out = s.attention.cascade.tensor[s.cascade.outputs[0]]
    keys = atom(product_text([s.extent[s.key]], names)) if s.extent[s.key] != 1 else "1"
    full = f"{keys} // {mapping.tile_m}" if s.mask.keep is ex.TRUE else "0"
    rows = atom(product_text((s.extent[r] for r in s.rows), names)) if any(s.extent[r] != 1 for r in s.rows) else "1"
    programs = product_text((s.extent[r] for r in s.grid), names) if s.grid else "1"
    return "\n".join([
        f"def plan_of({', '.join(symbols(s, names))}):",
        '    """Shape of the output, programs, row blocks of each, (full, all) key tiles of a block that visits all."""',
        f"    shape = {tuple_text(size_text(n, names) for n in out.shape)}",
        f"    return shape, {programs}, -(-{rows} // {mapping.tile_p}), ({full}, -(-{keys} // {mapping.tile_m}))",
    ])


# --- tile lists --------------------------------------------------------------------------------------------------


def walk_of(s: Streaming, names: KernelNames, mapping: TileMapping, listing: str = "LISTING", name: str = "walk_of") -> str:
    """The function that lists tiles of this mapping; `listing` says how."""
    queries, keys = (product_text([s.extent[r]], names) for r in (s.attention.query, s.key))
    lists = product_text([s.extent[r] for r in mask_ranks(s)] or [1], names)
    own = symbols(s, names)
    blocks = f"-(-{atom(queries)} // {mapping.tile_p})"
    arguments = f"inputs, sizes, {lists}, {blocks}, {keys}, {mapping.heavy_first}, device"
    lines = [
        f"def {name}(inputs, sizes):",
        '    """The key tiles that every row block visits under the mask, as `launch` takes them."""',
        "    device = next(t.device for t in inputs if t.dim())",
        *([f"    {tuple_text(own)[1:-1]} = sizes"] if own else []),
    ]
    made = f"tile_lists(list_tiles, {listing}, {arguments})"
    if is_static(s):
        lines += ["", "    def make():", f"        return {made}", ""]
        made = f"kept_lists(make, ({'' if name == 'walk_of' else repr(name) + ', '}sizes, device), device)"
    return "\n".join([*lines, f"    found = {made}", "    return *found, found[-1].shape[-1]"])


# --- the way in -------------------------------------------------------------------------------------------------


def _attention(s: Streaming, names: KernelNames, mapping: TileMapping) -> str:
    _, missing = bound(s, names)
    keywords = [names.symbols[n] for n in missing]
    shapes = s.attention.cascade.tensor
    tensors = {t: names.operands[t].name for t in s.inputs}
    read = ", ".join([*(tensors[t.name] for t in s.cascade.inputs), *(f"{k}={k}" for k in keywords)])
    first = next(tensors[t.name] for t in s.cascade.inputs if t.shape)
    inputs = tuple_text(n if shapes[t].shape else f"{n}.to({first}.device)" for t, n in tensors.items())
    own = symbols(s, names)
    eights = f", {s.eights}" if s.eights else ""
    planned = f", planned={mapping.split_m}" if mapping.split_m > 1 else ""
    lines = [
        f"def attention({', '.join([*tensors.values(), *(['*', *keywords] if keywords else [])])}):",
        f'    """{_signature(s)}',
        *([f"\n    {', '.join(keywords)}: sizes that no shape shows."] if keywords else []),
        '    """' if keywords else "",
        f"    {tuple_text(own)[1:-1]} = sizes = sizes_of({read})" if own else f"    sizes = sizes_of({read})",
        f"    shape, programs, row_blocks, walk = plan_of({', '.join(own)})",
        *([f"    inputs = {inputs}"] if needs_lists(s) else []),
        *choose_walk(s, names),
        f"    out = torch.empty(shape, dtype={print_torch.TYPES[shapes[s.cascade.outputs[0]].dtype]}, "
        f"device={first}.device)",
        f"    return {launcher(s, mapping)}, out, {'inputs' if needs_lists(s) else inputs}, sizes, programs, row_blocks, "
        f"walk{eights}{planned})",
    ]
    if not keywords:
        lines[1] += '"""'
    return "\n".join(line for line in lines if line)


def launcher(s: Streaming, mapping: TileMapping) -> str:
    if mapping.split_m > 1:
        return f"launch_split((stream, merge), (CONSTANTS, MERGE), {len(s.state.carried)}"
    return "launch(stream, CONSTANTS"


def choose_walk(s: Streaming, names: KernelNames) -> list[str]:
    if not needs_lists(s):
        return []
    queries = product_text([s.extent[s.attention.query]], names)
    call = "walk = walk_of(inputs, sizes)"
    return [f"    {call}"] if queries.isdigit() else [f"    if {queries} >= {FEW_ROWS}:", f"        {call}"]


def _signature(s: Streaming) -> str:
    def show_tensor(name: str) -> str:
        t = s.attention.cascade.tensor[name]
        return f"{name}: {t.dtype}[{', '.join(map(str, t.shape))}]"

    return f"{show_tensor(s.cascade.outputs[0])} from {'; '.join(map(show_tensor, s.inputs))}"
