"""The plan: what was found, as a table, as JSON, as a page, at other sizes, beside another plan."""
