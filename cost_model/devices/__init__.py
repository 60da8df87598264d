"""What a device can do: numbers with a source on each line, as data files."""
