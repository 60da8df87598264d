"""Reading graphs: what aliases what, what lives how long, which sizes are open."""
