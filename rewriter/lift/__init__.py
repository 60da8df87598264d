"""One node → one term: operator by operator, spellings vanish here."""
