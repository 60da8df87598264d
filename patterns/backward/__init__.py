"""Gradients: what reaches each operand of a term, an attention, a cascade."""
