"""Methods from the literature, approximate: each a law that makes another, cheaper attention of one."""
