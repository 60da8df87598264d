"""Our Triton kernel: holes printed from the cascade, filled into a hand-written loop."""
