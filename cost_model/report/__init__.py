"""Reports of plans: one self-contained page that opens anywhere."""
