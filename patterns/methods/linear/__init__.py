"""Methods whose rows are linear states: products of features for the exponential, alone or beside a window or tiles."""
