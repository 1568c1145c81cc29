"""How good uncertainties are on labelled frames, and where frames lie in a potential's features."""
