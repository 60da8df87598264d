"""Cascades of the papers, as data for the tests, the search and the documents."""
