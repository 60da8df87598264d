"""A model → its graphs of pre-dispatch ATen operators."""
