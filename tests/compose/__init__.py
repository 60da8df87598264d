"""Attention modules composed at random, and every way of ours to run them held against float64."""
