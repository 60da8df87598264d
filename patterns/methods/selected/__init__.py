"""Methods that look at queries and keys first, and visit the tiles that these name."""
