"""Attentions as plain data: their candidates, masks and counts, and the same at other sizes."""
