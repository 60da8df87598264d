"""Methods whose keys are a function of positions alone."""
