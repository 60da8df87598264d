"""The loops and launches of kernels that are trained: Triton's text, beside that of the forward."""
