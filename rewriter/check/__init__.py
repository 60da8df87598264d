"""A rewritten site held against the model's own code."""
