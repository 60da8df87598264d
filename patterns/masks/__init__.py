"""Which keys a row keeps, tile by tile: empty, full or partial, in closed form or by intervals."""
