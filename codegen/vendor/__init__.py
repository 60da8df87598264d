"""PyTorch's own kernels as candidates: SDPA and FlexAttention."""
