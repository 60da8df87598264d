"""Our CPU kernels: tiled torch code with two bodies, and one fused pass in C++."""
