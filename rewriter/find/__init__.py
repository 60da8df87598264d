"""A lifted graph → its attentions, and where each begins and ends."""
