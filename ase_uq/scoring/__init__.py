"""Scores finished trajectories: frames are written to disk with their uncertainties, and killed runs can be resumed."""
