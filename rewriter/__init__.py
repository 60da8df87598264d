"""Graph ↔ cascade: capture, lift, find, choose, splice, run."""
