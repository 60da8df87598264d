"""Doors: where a library lets people name an attention, ours runs by that name, and nothing is captured by Dynamo."""
