"""How good uncertainties are on labelled frames, and where frames lie in the feature space of a potential."""
