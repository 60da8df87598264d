"""Unrolled loops of a graph: one body, how often it stands there, and what is handed from one to the next."""
