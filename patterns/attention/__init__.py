"""What counts as attention in a cascade, and the one-pass state of its rows."""
