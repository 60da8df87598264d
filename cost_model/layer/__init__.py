"""What a model does outside of its attentions: counted with sizes open, priced by rooflines, added up to a step."""
