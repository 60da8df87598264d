"""Our Triton kernel backwards: what its skeleton needs of an attention, its holes, and the file that is trained."""
