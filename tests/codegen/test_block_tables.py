"""A mask that reads a table of blocks: kernels visit the tiles that it keeps, and no other."""

from __future__ import annotations

import pytest
import torch

from reattend.codegen.cpu import kernel
from reattend.patterns.evaluate import evaluate
from reattend.patterns.mapping import TileMapping
from reattend.patterns.methods.masked import block_table, masked
from reattend.patterns.verdict import Refusal
from tests.methods.attentions import view

N, HEADS, SIZES = 130, 2, {"B": 1, "H": 2, "E": 8, "F": 8}


@pytest.mark.parametrize("body", [pytest.param("fused", marks=pytest.mark.slow), "product", "sdpa"])
@pytest.mark.parametrize(("rows", "keys"), [(32, 32), (64, 64), (16, 32), (1, 32)])
def test_only_tiles_that_the_table_keeps_are_visited(body: str, rows: int, keys: int) -> None:
    """Blocks as long as tiles, of several tiles, and several to a tile. Values that no row keeps are NaN: read, they show."""
    a = view(P=N, M=N, **SIZES)
    table, keep = block_table(a, rows, keys)
    c = masked(a, keep, "blocks", (table,))
    assert not isinstance(c, Refusal)
    kept = torch.zeros(1, HEADS, -(-N // rows), -(-N // keys), dtype=torch.bool)
    # the first column and the own block of each row; no row but its own block sees the columns between
    kept[..., 0] = True
    for i in range(kept.shape[2]):
        kept[:, :, i, min(i * rows, N - 1) // keys] = True
        kept[:, 1, i, min(i * rows + rows - 1, N - 1) // keys] = True
    given = {n: torch.randn(1, HEADS, N, 8, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("QKV")}
    given[table.name] = kept
    wanted = evaluate(c, given, SIZES, widen=True)["O"]
    made = kernel.build(c, TileMapping(32, 32, body=body))
    assert not isinstance(made, Refusal), made
    assert (made.run(given, {}) - wanted).abs().max() < 1e-5
    # nobody of the last rows keeps the second column
    values = given["V"].clone().index_fill_(2, torch.arange(keys, keys + 32), torch.nan)
    assert not made.run({**given, "V": values}, {})[:, :, 128:].isnan().any()
