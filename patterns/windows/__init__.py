"""Windows of keys that move with their row, as keys under a mask: by `unfold`, by chunks that overlap, by their places."""
