"""How good an approximation is, and what it needs beyond an exact candidate."""
