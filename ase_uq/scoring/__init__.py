"""Finished trajectories: every frame with its uncertainties, written to disk, taken up again after a kill."""
