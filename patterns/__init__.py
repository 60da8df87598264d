"""The vocabulary: terms, the cascade and its meaning, masks, what counts as attention."""
