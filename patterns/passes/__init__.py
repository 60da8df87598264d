"""Rewrites with conditions: cascade → cascade."""
