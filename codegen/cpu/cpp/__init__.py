"""The struct Program of the fused loop: one row, one step over its scores, its end, in C++."""
