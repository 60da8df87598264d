"""How our CPU kernels cut their work: numbers that the kernels and the model of their time share."""

from __future__ import annotations

# Query tiles are folded into the batch of one SDPA call: until it has so many scores, and pieces for every thread.
CALL_SCORES = 1 << 18
PIECES_PER_THREAD = 4
PIECE_ROWS = 64
# Scores a head up to which nothing is skipped.
FEW = 4096
# The product body's longest slice of keys, and its scores in flight for each thread.
SLICE = 512
SCORES = 1 << 18
# The selected body's elements of keys that are gathered at once for each thread, and the most rows that share a turn.
GATHERED = 1 << 20
GATHERED_ROWS = 256
