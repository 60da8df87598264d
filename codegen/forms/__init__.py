"""What any kernel must know of an attention before a line of it is printed."""
