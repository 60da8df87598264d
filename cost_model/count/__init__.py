"""Work counted from a cascade and a mapping, with sizes alone: it never meets a device."""
