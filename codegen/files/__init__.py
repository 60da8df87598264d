"""Printed text → a file kept on disk → a loaded module or library."""
