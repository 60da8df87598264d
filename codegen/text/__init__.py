"""A term as text, one printer a language."""
