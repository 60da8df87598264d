"""The algebra of selections: steps from queries and keys to a table of the tiles that are visited."""
