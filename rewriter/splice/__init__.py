"""A chosen call put into the graph, behind its guards."""
