"""Structures made with a potential: perturbed frames, reference runs, and the ensembles of dynamics."""
