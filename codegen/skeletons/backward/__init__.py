"""The loops and launches of kernels that are trained, beside those of the forward."""
