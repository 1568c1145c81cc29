"""How good uncertainties are on labelled frames, where frames lie in feature space, and what potentials see of them."""
