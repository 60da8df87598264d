"""Hand-written loops with holes: what is printed from a cascade is filled into one of these."""
