"""Counts and a device's rates → seconds, with what bounds them."""
