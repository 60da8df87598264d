"""The plan as plain data: sites, candidates, what was left alone, and the same at other sizes."""
