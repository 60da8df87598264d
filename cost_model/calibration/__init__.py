"""Rates of this machine in place of assumed ones, and how good predictions then are."""
