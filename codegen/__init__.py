"""Cascade + mapping → source that runs: Triton, CPU, the vendors' calls."""
